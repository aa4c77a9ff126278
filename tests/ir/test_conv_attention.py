"""Convolution over tokens against loops that follow its definition, torch's own convolution, and ConvBERT's module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.conv_attention import conv_attention


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def taps(*sizes: int) -> Tensor:
    return normal(*sizes, seed=1).softmax(-1)


def kernel_of(dynamic: bool, batch: int, heads: int, length: int, width: int) -> Tensor:
    return taps(batch, heads, length, width) if dynamic else taps(heads, width)


def by_loops(value: Tensor, kernel: Tensor, mask: Tensor, causal: bool) -> Tensor:
    batch, groups, length, size = value.shape
    every = kernel if kernel.dim() == 4 else kernel[None, :, None].expand(batch, -1, length, -1)
    _, heads, _, width = every.shape
    result = torch.zeros(batch, heads, length, size)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                total = 0.0
                for t in range(width):
                    j = i + t - (width - 1 if causal else width // 2)
                    if 0 <= j < length and mask[b, j]:
                        total += float(every[b, h, i, t])
                        result[b, h, i] += every[b, h, i, t] * value[b, h * groups // heads, j]
                if total:
                    result[b, h, i] /= total
    return result


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    each=st.integers(1, 2),
    length=st.integers(1, 7),
    width=st.integers(1, 9),
    causal=st.booleans(),
    dynamic=st.booleans(),
)
def test_equals_its_definition(
    batch: int, groups: int, each: int, length: int, width: int, causal: bool, dynamic: bool
) -> None:
    value, mask = normal(batch, groups, length, 3), normal(batch, length, seed=2) > -0.5
    kernel = kernel_of(dynamic, batch, groups * each, length, width)
    close(conv_attention(value, kernel, mask, causal), by_loops(value, kernel, mask, causal))


@pytest.mark.parametrize("causal", [False, True])
def test_inside_the_sequence_it_is_torch_s_convolution(causal: bool) -> None:
    value, kernel = normal(2, 3, 20, 4), taps(3, 5)
    conv = F.conv2d(F.pad(value, (0, 0, 4, 0) if causal else (0, 0, 2, 2)), kernel[:, None, :, None], groups=3)
    inside = slice(4, 16)
    close(conv_attention(value, kernel, causal=causal)[:, :, inside], conv[:, :, inside])


@pytest.mark.parametrize("dynamic", [False, True])
def test_equal_values_stay_as_they_are(dynamic: bool) -> None:
    """The weights add up to 1 at the ends and around padding, too."""
    value, kernel = torch.ones(2, 3, 9, 4), kernel_of(dynamic, 2, 3, 9, 5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6] = False
    close(conv_attention(value, kernel, mask), value)


def test_one_tap_is_the_identity() -> None:
    value = normal(2, 3, 9, 4)
    close(conv_attention(value, torch.full((3, 1), 0.3)), value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_padding_changes_nothing(causal: bool, dynamic: bool) -> None:
    value, mask = normal(2, 3, 20, 4), normal(2, 20, seed=2) > -1
    kernel = kernel_of(dynamic, 2, 3, 20, 5)
    wide = F.pad(kernel, (0, 0, 0, 200), value=0.2) if dynamic else kernel
    padded = conv_attention(F.pad(value, (0, 0, 0, 200), value=3.0), wide, F.pad(mask, (0, 200)), causal)
    close(padded[:, :, :20], conv_attention(value, kernel, mask, causal))


def test_masked_values_are_not_read() -> None:
    value, mask = normal(1, 2, 6, 4), torch.tensor([[True, True, False, True, True, True]])
    poisoned = value.masked_fill(~mask[:, None, :, None], torch.nan)
    assert torch.equal(conv_attention(poisoned, taps(2, 3), mask), conv_attention(value, taps(2, 3), mask))


def test_no_token_changes_what_comes_before_it() -> None:
    value, kernel = normal(1, 2, 12, 4), taps(2, 5)
    changed = value.clone()
    changed[:, :, 7] = 9.0
    same = (conv_attention(value, kernel, causal=True) == conv_attention(changed, kernel, causal=True)).all(-1)
    assert same[:, :, :7].all()
    assert not same[:, :, 7].any()


def test_where_no_place_is_left_the_result_is_zero() -> None:
    mask = torch.tensor([[True, False, False, False, False]])
    assert not conv_attention(torch.ones(1, 2, 5, 4), taps(2, 3), mask)[:, :, 2:].any()


def test_half_precision_is_rounded_once() -> None:
    value, kernel = normal(2, 3, 9, 4).half(), taps(3, 5).half()
    wide = conv_attention(value.float(), kernel.float())
    assert torch.equal(conv_attention(value, kernel), wide.half())


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradient(dynamic: bool) -> None:
    value = normal(2, 1, 5, 2, dtype=torch.float64).requires_grad_()
    kernel = kernel_of(dynamic, 2, 2, 5, 3).double().requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert torch.autograd.gradcheck(lambda v, w: conv_attention(v, w, mask), (value, kernel))


def test_equals_the_convolution_of_convbert() -> None:
    """The half of ConvBertSelfAttention's result that is its span-based dynamic convolution, given its kernel.

    Inside the sequence it is the same. At the ends ConvBERT reads zeros and does not divide by the taps that are left:
    there ours, times their sum, is the same. Padding it reads like any other token.
    """
    module = pytest.importorskip("transformers.models.convbert.modeling_convbert")
    from transformers import ConvBertConfig

    heads, size, length, width = 2, 4, 12, 5
    config = ConvBertConfig(
        hidden_size=heads * 2 * size, num_attention_heads=2 * heads, head_ratio=2, conv_kernel_size=width
    )
    torch.manual_seed(0)
    layer = module.ConvBertSelfAttention(config).eval()
    hidden = normal(2, length, heads * 2 * size)
    with torch.no_grad():
        theirs = layer(hidden)[0].unflatten(-1, (2 * heads, size))[:, :, heads:].transpose(1, 2)
        span = layer.key_conv_attn_layer(hidden.transpose(1, 2)).transpose(1, 2) * layer.query(hidden)
        kernel = layer.conv_kernel_layer(span).unflatten(-1, (heads, width)).softmax(-1).transpose(1, 2)
        value = layer.conv_out_layer(hidden).unflatten(-1, (heads, size)).transpose(1, 2)
    place = torch.arange(length)[:, None] + torch.arange(width) - width // 2
    left = (kernel * ((place >= 0) & (place < length))).sum(-1, keepdim=True)
    close(conv_attention(value, kernel) * left, theirs)
