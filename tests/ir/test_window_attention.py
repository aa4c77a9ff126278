"""Attention within a window against loops that follow its definition, and against exact attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.window_attention import window_attention


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def inputs(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples, four heads that share two of keys, values of another size than the keys."""
    sizes = ((2, 4, length, 3), (2, 2, length, 3), (2, 2, length, 5))
    query, key, value = (normal(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes))
    return query, key, value


def padded(length: int, before: int, after: int) -> Tensor:
    """A key mask that hides some first and last keys of the first sample."""
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :before] = False
    mask[0, max(length - after, 0) :] = False
    return mask


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, left: int, right: int, globals: int, dilation: int,
    causal: bool, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    batch, heads, length, _ = query.shape
    result = torch.zeros(batch, heads, length, value.shape[3], dtype=query.dtype)
    for b in range(batch):
        real = [j for j in range(length) if mask[b, j]]
        for i in range(length):
            seen = {i + step * dilation for step in range(-left, right + 1)} | set(real[:globals])
            seen = set(range(length)) if i in real[:globals] else seen
            keys = [j for j in sorted(seen) if j in real and not (causal and j > i)]
            for h in range(heads if keys else 0):
                group = h * key.shape[1] // heads
                scores = key[b, group, keys] @ query[b, h, i] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                result[b, h, i] = torch.softmax(scores, 0) @ value[b, group, keys]
    return result


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 9),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    globals=st.integers(0, 3),
    dilation=st.integers(1, 3),
    causal=st.booleans(),
    scale=st.sampled_from([0.3, 2.0]),
    softcap=st.sampled_from([0.0, 0.7]),
)
def test_equals_its_definition(length: int, before: int, after: int, **options: Any) -> None:
    given = (*inputs(length), padded(length, before, after))
    close(window_attention(*given, **options), by_loops(*given, **options))


def test_the_scale_is_that_of_attention_unless_given() -> None:
    given = inputs(7)
    close(window_attention(*given, None, 2, 2), window_attention(*given, None, 2, 2, scale=3**-0.5))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"left": 8, "right": 8}, {"globals": 9}, {"globals": 12}], ids=str)
def test_what_covers_all_keys_is_attention(options: dict[str, int], causal: bool) -> None:
    given, mask = inputs(9), padded(9, 0, 2)
    exact = attention(*given, key_mask=mask, right=0 if causal else None)
    close(window_attention(*given, mask, **options, causal=causal), exact)


def test_without_global_tokens_and_holes_it_is_the_band_of_attention() -> None:
    given, mask = inputs(9), padded(9, 0, 2)
    close(window_attention(*given, mask, 3, 1), attention(*given, key_mask=mask, left=3, right=1))


def test_a_global_token_is_counted_once() -> None:
    """In the window and global: its weight does not double."""
    given = inputs(5)
    close(window_attention(*given, None, 4, 4, globals=2), window_attention(*given, None, 4, 4))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ends", [(0, 30), (30, 0), (7, 5)], ids=["right", "left", "both"])
def test_padding_changes_nothing(ends: tuple[int, int], causal: bool) -> None:
    """Global tokens are the first real ones, wherever these begin."""
    given = inputs(11)
    options: dict[str, Any] = {"left": 2, "right": 1, "globals": 2, "dilation": 2, "causal": causal}
    wide = [F.pad(tensor, (0, 0, *ends), value=3.0) for tensor in given]
    mask = F.pad(torch.ones(2, 11, dtype=torch.bool), ends)
    found = window_attention(*wide, mask, **options)[:, :, ends[0] : ends[0] + 11]
    close(found, window_attention(*given, None, **options))


def test_rows_without_a_key_are_zero() -> None:
    mask = torch.tensor([[True] * 3 + [False] * 6, [False] * 9])
    found = window_attention(*inputs(9), mask, 1, 1, globals=0)
    assert found[0, :, :4].abs().amin() > 0
    assert not found[0, :, 4:].any() and not found[1].any()


def test_no_token_changes_what_comes_before_it() -> None:
    options: dict[str, Any] = {"left": 3, "globals": 2, "causal": True}
    given = inputs(9)
    changed = [tensor.clone() for tensor in given]
    for tensor in changed:
        tensor[:, :, 1] = 9.0  # a global token
    found, expected = (window_attention(*tensors, None, **options) for tensors in (changed, given))
    assert torch.equal(found[:, :, :1], expected[:, :, :1])
    assert not torch.equal(found[:, :, 8], expected[:, :, 8])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(half: torch.dtype) -> None:
    given = inputs(9, half)
    wide = window_attention(*(tensor.float() for tensor in given), None, 2, 1, 1)
    assert torch.equal(window_attention(*given, None, 2, 1, 1), wide.to(half))


@pytest.mark.parametrize("causal", [False, True])
def test_gradient(causal: bool) -> None:
    given = [tensor.requires_grad_() for tensor in inputs(5, torch.float64)]
    mask = padded(5, 1, 1)
    assert torch.autograd.gradcheck(
        lambda *tensors: window_attention(*tensors, mask, 1, 1, 1, 2, causal, 0.7, 1.5), given
    )


def test_heads_that_do_not_divide_are_an_error() -> None:
    query, key, value = inputs(5)
    with pytest.raises(RuntimeError):
        window_attention(query[:, :3], key, value, None, 1, 1)
