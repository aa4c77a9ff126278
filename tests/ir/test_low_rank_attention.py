"""Attention through summaries of the keys: its segments, its formulas, and where it is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.low_rank_attention import linformer_attention, nystrom_attention, pseudo_inverse, segments


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def inputs(length: int, dtype: torch.dtype = torch.float32, keys: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples, four heads that share two of keys, values of another size than the keys."""
    sizes = ((2, 4, length, 3), (2, 2, keys or length, 3), (2, 2, keys or length, 5))
    query, key, value = (normal(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes))
    return query, key, value


def mask_of(length: int) -> Tensor:
    """With holes in the first sample, and at least one key in both."""
    mask = normal(2, length, seed=3) > -0.5
    mask[:, 0] = mask[1] = True
    return mask


def nystrom(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, number: int) -> Tensor:
    return nystrom_attention(query, key, value, mask, number)


def linformer(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, number: int) -> Tensor:
    return linformer_attention(query, key, value, mask, None, number)


def weighted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, number: int) -> Tensor:
    return linformer_attention(query, key, value, mask, normal(4, 2, 3, seed=6).to(query.dtype), number)


Summaries = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
both = pytest.mark.parametrize("attend", [nystrom, linformer, weighted])

# --- segments --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=12), number=st.integers(1, 6))
def test_segments_are_runs_of_real_tokens(mask: list[bool], number: int) -> None:
    members, sizes = segments(torch.tensor([mask]), number)
    real = [place for place, allowed in enumerate(mask) if allowed]
    expected = torch.zeros(1, number, len(mask))
    for rank, place in enumerate(real):
        expected[0, rank * number // len(real), place] = 1
    assert torch.equal(members, expected) and torch.equal(sizes, expected.sum(-1))


@given(real=st.integers(1, 20), number=st.integers(1, 8))
def test_segments_are_equally_long_to_one(real: int, number: int) -> None:
    _, sizes = segments(torch.ones(1, real, dtype=torch.bool), number)
    assert sizes.max() - sizes.min() <= 1


# --- both ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("length", [1, 9])
def test_as_many_summaries_as_tokens_are_exact(attend: Summaries, length: int) -> None:
    given = inputs(length)
    close(attend(*given, None, 9), attention(*given))


@both
def test_each_sample_of_a_batch_is_exact_or_not_by_itself(attend: Summaries) -> None:
    """One has 5 tokens, one 12, and there are 6 summaries."""
    given, mask = inputs(12), torch.ones(2, 12, dtype=torch.bool)
    mask[0, 5:] = False
    found, exact = attend(*given, mask, 6), attention(*given, key_mask=mask)
    close(found[0, :, :5], exact[0, :, :5])
    assert (found[1] - exact[1]).abs().max() > 0.01


@both
def test_a_single_summary_gives_the_mean_to_all(attend: Summaries) -> None:
    """Whatever they ask for."""
    found = attend(*inputs(9), mask_of(9), 1)
    close(found, found[:, :, :1].expand_as(found))


@both
@pytest.mark.parametrize("ends", [(0, 30), (30, 0), (7, 5)], ids=["right", "left", "both"])
def test_padding_changes_nothing(attend: Summaries, ends: tuple[int, int]) -> None:
    given = inputs(11)
    wide = [F.pad(tensor, (0, 0, *ends), value=3.0) for tensor in given]
    mask = F.pad(torch.ones(2, 11, dtype=torch.bool), ends)
    close(attend(*wide, mask, 4)[:, :, ends[0] : ends[0] + 11], attend(*given, None, 4))


@both
@pytest.mark.parametrize("number", [2, 9])
def test_a_sample_without_a_key_is_zero(attend: Summaries, number: int) -> None:
    mask = mask_of(5)
    mask[0] = False
    found = attend(*inputs(5), mask, number)
    assert not found[0].any() and found[1].abs().amin() > 0


@both
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(attend: Summaries, half: torch.dtype) -> None:
    given = inputs(9, half)
    pooling = normal(4, 2, 3, seed=6).to(half)
    if attend is weighted:
        found, wide = (
            linformer_attention(*tensors, None, pooling, 4) for tensors in (given, [tensor.float() for tensor in given])
        )
    else:
        found, wide = (attend(*tensors, None, 4) for tensors in (given, [tensor.float() for tensor in given]))
    assert torch.equal(found, wide.to(half))


@both
@pytest.mark.parametrize("number", [2, 9])
def test_gradient(attend: Summaries, number: int) -> None:
    given = [tensor.requires_grad_() for tensor in inputs(5, torch.float64)]
    mask = mask_of(5)
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, mask, number), given)


@both
def test_heads_that_do_not_divide_are_an_error(attend: Summaries) -> None:
    query, key, value = inputs(5)
    with pytest.raises(RuntimeError):
        attend(query[:, :3], key, value, None, 2)


# --- nystrom ---------------------------------------------------------------------------------------------------


def test_nystrom_equals_its_formula() -> None:
    """Of one head with 12 tokens and 4 landmarks, with the pseudo-inverse's six steps."""
    query, key, value = (tensor[0, 0] for tensor in inputs(12))
    scale = 0.4
    query_marks, key_marks = (item.unflatten(0, (4, 3)).mean(1) for item in (query, key))
    first, middle, last = (
        (rows @ columns.t() * scale).softmax(-1)
        for rows, columns in ((query, key_marks), (query_marks, key_marks), (query_marks, key))
    )
    inverse, one = middle.t() / middle.sum(0).max(), torch.eye(4)
    for _ in range(6):
        product = middle @ inverse
        inverse = inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product))) / 4
    found = nystrom_attention(query[None, None], key[None, None], value[None, None], None, 4, 6, scale)
    close(found[0, 0], first @ inverse @ last @ value)


def test_many_steps_reach_the_pseudo_inverse() -> None:
    query, key, value = inputs(12, torch.float64)
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    query_marks, key_marks = (item.unflatten(2, (3, 4)).mean(3) for item in (query, key))
    first, middle, last = (
        (rows @ columns.transpose(-1, -2) * 3**-0.5).softmax(-1)
        for rows, columns in ((query, key_marks), (query_marks, key_marks), (query_marks, key))
    )
    close(nystrom_attention(query, key, value, None, 3, 60), first @ torch.linalg.pinv(middle) @ last @ value)


def test_pseudo_inverse_by_many_steps() -> None:
    matrix = normal(3, 5, 5, dtype=torch.float64).softmax(-1)
    close(pseudo_inverse(matrix, 40), torch.linalg.pinv(matrix))


def test_a_tensor_beside_another_does_not_change_its_inverse() -> None:
    """Each matrix has its own start, so a batch is its samples one by one."""
    given = inputs(12)
    alone = torch.cat([nystrom(*(tensor[[index]] for tensor in given), None, 4) for index in range(2)])
    close(nystrom(*given, None, 4), alone)


# --- linformer -------------------------------------------------------------------------------------------------


def by_loops(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, pooling: Tensor, rank: int) -> Tensor:
    batch, heads, length, size = query.shape
    result = torch.zeros(batch, heads, length, value.shape[3])
    for b in range(batch):
        real = [j for j in range(key.shape[2]) if mask[b, j]]
        for h in range(heads):
            group = h * key.shape[1] // heads
            keys, values, counts = [], [], []
            for segment in range(rank):
                own = [j for place, j in enumerate(real) if place * rank // len(real) == segment]
                if own:
                    k = key[b, group, own]
                    of_keys, of_values = ((k @ vector).softmax(0) for vector in pooling[h])
                    keys.append(of_keys @ k)
                    values.append(of_values @ value[b, group, own])
                    counts.append(float(len(own)))
            scores = query[b, h] @ torch.stack(keys).t() * size**-0.5 + torch.tensor(counts).log()
            result[b, h] = scores.softmax(-1) @ torch.stack(values)
    return result


@pytest.mark.parametrize("keys", [5, 9, 14])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_linformer_equals_its_definition(rank: int, keys: int) -> None:
    """With more or fewer keys than queries, too."""
    given = (*inputs(9, keys=keys), mask_of(keys), normal(4, 2, 3, seed=6))
    close(linformer_attention(*given, rank), by_loops(*given, rank))


def test_weights_of_zero_are_plain_means() -> None:
    given = (*inputs(9), mask_of(9))
    close(linformer_attention(*given, torch.zeros(4, 2, 3), 3), linformer_attention(*given, None, 3))


def test_equal_keys_are_exact_at_any_rank() -> None:
    """A mean counts as often as it has members: segments of 5 and 4 tokens, of equal keys each."""
    query, key, value = inputs(9)
    key, value = (torch.cat((t[:, :, :1].expand(-1, -1, 5, -1), t[:, :, 5:6].expand(-1, -1, 4, -1)), 2)
                  for t in (key, value))  # fmt: skip
    close(linformer(query, key, value, None, 2), attention(query, key, value))


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_weights_stay_finite(size: float) -> None:
    assert linformer_attention(*inputs(9), None, normal(4, 2, 3) * size, 3).isfinite().all()


def test_the_scale_of_linformer() -> None:
    given = inputs(9)
    found = linformer_attention(*given, None, None, 3, 0.5)
    close(found, linformer(given[0] * 0.5 * 3**0.5, *given[1:], None, 3))


def test_gradient_of_the_weights() -> None:
    given, pooling = inputs(5, torch.float64), normal(4, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: linformer_attention(*given, mask_of(5), w, 2), pooling)
