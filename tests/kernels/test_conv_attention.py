"""Attention by convolution, in the interpreter, against fxpress::conv_attention; and compiled ahead of time."""

import math
from typing import Any

import aot
import launched
import pytest
import torch
from attention_cases import interpreted, padded
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.equality import compare, widen
from fxpress.ir.ops import conv_attention as op
from fxpress.ir.ops.table import OPERATORS
from fxpress.kernels import conv_attention as kernels


def equal(value: Tensor, taps: Tensor, **options: Any) -> Tensor:
    reference = OPERATORS[op.conv_attention].reference
    with interpreted(kernels, None):
        found = kernels.conv_attention(value, taps, **options)
    eager, wide = reference(value, taps, **options), reference(widen(value), widen(taps), **options)
    comparison = compare([found], [eager], [wide])
    assert comparison.equal, comparison.reasons
    return found


@settings(max_examples=15)
@given(data=st.data())
def test_it_is_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    length, size, width = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
    groups, repeat = draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    fixed = draw(st.booleans())
    heads = groups * repeat
    taps = normal(*((heads, width) if fixed else (2, heads, length, width)), seed=1).softmax(-1).to(dtype)
    value = normal(2, groups, length, size).to(dtype)
    if draw(st.booleans()):  # heads third in memory, as a model's projections leave them
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    mask = padded(2, length, draw(st.integers(0, 9)), draw(st.integers(0, 70)))
    equal(value, taps, key_mask=mask if draw(st.booleans()) else None, causal=draw(st.booleans()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_taps_than_tokens(dtype: torch.dtype, causal: bool) -> None:
    equal(normal(1, 2, 3, 5).to(dtype), normal(2, 9).abs().to(dtype), causal=causal)


def test_rows_whose_taps_all_lie_on_padding() -> None:
    found = equal(normal(2, 2, 37, 4), normal(2, 3).abs(), key_mask=padded(2, 37, 0, 30))
    assert (found[0, :, 9:] == 0).all()


def test_taps_of_zero() -> None:
    taps = normal(2, 2, 20, 3).relu()
    taps[:, :, 5] = 0
    assert (equal(normal(2, 2, 20, 4), taps)[:, :, 5] == 0).all()


def test_masked_values_are_not_read() -> None:
    value, mask = normal(1, 2, 20, 4), padded(1, 20, 3, 4)
    value[:, :, :3] = value[:, :, 16:] = math.nan
    assert not equal(value, normal(2, 3).abs(), key_mask=mask).isnan().any()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.flatten().repeat(2)[1 : 1 + x.numel()].view(x.shape),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["columns", "every second", "unaligned", "expanded"],
)  # fmt: skip
def test_layouts(view: Any) -> None:
    mask = (normal(20, 2) > -0.5).T
    equal(view(normal(2, 2, 20, 5)), view(normal(2, 4, 20, 3).abs()), key_mask=mask)
    equal(view(normal(2, 2, 20, 5)), view(normal(4, 3).abs()), causal=True)


def test_no_tokens() -> None:
    assert kernels.conv_attention(normal(2, 2, 0, 5), normal(4, 3)).shape == (2, 4, 0, 5)


@pytest.mark.slow
def test_it_loads_and_stores_16_bytes() -> None:
    def call() -> None:
        taps = torch.empty(2, 8, 1024, 9, dtype=torch.bfloat16)
        kernels.conv_attention(launched.heads(4, 1024, 64), taps, torch.empty(2, 1024, dtype=torch.bool))

    jobs = {f"{arch}": launched.jobs(kernels, arch, call)["conv_attention_kernel"] for arch in (80, 90, 100)}
    for arch, results in aot.compiled(jobs).items():
        found = results[int(arch)]
        assert found.get("error") is None
        assert found["over"] is None
        assert {"ld.global.v4", "st.global.v4"} <= {*found["instructions"]}
