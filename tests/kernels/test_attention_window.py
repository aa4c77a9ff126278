"""Attention within a window, in the interpreter, against fxpress::window_attention."""

from typing import Any

import pytest
import torch
from attention_cases import check, inputs, interpreted, padded
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.ir.ops.window_attention import window_attention
from fxpress.kernels import attention as kernels


@settings(max_examples=25)
@given(data=st.data())
def test_it_is_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    length = draw(st.integers(1, 70))
    heads = draw(st.sampled_from([(1, 1), (2, 1)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    mask = padded(2, length, draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    check(
        window_attention,
        kernels,
        *inputs(length, length, heads, (6, 5), dtype=dtype),
        key_mask=mask if draw(st.booleans()) else None,
        left=draw(st.integers(0, 20)),
        right=draw(st.integers(0, 20)),
        globals=draw(st.sampled_from([0, 1, 3, 20, 90])),
        dilation=draw(st.sampled_from([1, 1, 2, 3, 17])),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        scale=draw(st.sampled_from([None, 0.7])),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"left": 30, "right": 30},
        {"left": 40, "causal": True, "globals": 4},
        {"left": 5, "right": 5, "globals": 3},
        {"left": 2, "right": 1, "dilation": 5, "globals": 2},
        {"left": 3, "right": 3, "dilation": 40, "causal": True, "globals": 17},
        {"left": -2, "right": 3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("before", [None, 0, 33])
def test_windows_with_and_without_padding(options: dict[str, Any], before: int | None) -> None:
    mask = None if before is None else padded(1, 100, before, 20)
    check(window_attention, kernels, *inputs(100, 100, dims=(8, 8), batch=1), key_mask=mask, **options)


def test_only_blocks_of_the_window_and_of_global_keys_are_read() -> None:
    query, key, value = inputs(96, 96)
    value[:, :, 16:48] = key[:, :, 16:48] = torch.nan
    with interpreted(kernels):
        found = kernels.window_attention(query, key, value, left=15, right=4, globals=3)
    assert found[:, :, :16].isnan().all()  # the first block has global rows, which see all
    assert found[:, :, 16:48].isnan().all()
    assert not found[:, :, 64:].isnan().any()


def test_a_few_queries() -> None:
    check(window_attention, kernels, *inputs(3, 3), left=1, globals=1, causal=True, key_mask=padded(2, 3, 1, 0))
