"""Attention to the blocks of a table, in the interpreter, against fxpress::block_attention."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import check, inputs, interpreted, padded
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.ops import block_attention as op
from fxpress.kernels import block_attention as kernels


def equal(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return check(op.block_attention, kernels, query, key, value, blocks=None, **options)


def table(batch: int, heads: int, row_blocks: int, blocks: int, width: int, seed: int = 0) -> Tensor:
    """Numbers of blocks, some of them twice, and some that are no block's."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-2, blocks + 2, (batch, heads, row_blocks, width), generator=random)


@settings(max_examples=15)
@given(data=st.data())
def test_it_is_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    length = draw(st.integers(1, 70))
    rows, block = draw(st.sampled_from([1, 3, 16, 20, 64])), draw(st.sampled_from([1, 4, 16, 24, 32, 64]))
    heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    row_blocks, blocks = -(-length // rows), -(-length // block)
    if row_blocks * heads[0] > 60:
        rows, row_blocks = 64, -(-length // 64)  # the interpreter takes its time for each program
    sizes = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, heads[0]])), row_blocks + draw(st.integers(0, 1))
    query, key, value = inputs(length, length, heads, (draw(st.integers(1, 20)), draw(st.integers(1, 20))), 2, dtype)
    if draw(st.booleans()):  # heads third in memory, as a model's projections leave them
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    full = torch.tensor(draw(st.sampled_from([[[0, -1]], [[row_blocks - 1, 99], [-1, -1]]])))
    mask = padded(2, length, draw(st.integers(0, 9)), draw(st.integers(0, 70)))
    equal(
        query,
        key,
        value,
        table=table(*sizes, blocks, draw(st.integers(1, 5)), seed=draw(st.integers(0, 9))),
        full=full if draw(st.booleans()) else None,
        key_mask=mask if draw(st.booleans()) else None,
        rows=rows,
        block=block,
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, -0.5, 0.0])),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_the_real_size(dtype: torch.dtype, causal: bool) -> None:
    tensors = inputs(100, 100, (4, 2), (40, 24), 1, dtype)
    equal(*tensors, table=table(1, 4, 3, 2, 2), full=torch.tensor([[1]]), causal=causal, key_mask=padded(1, 100, 3, 9))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("rows", "block"), [(1, 1), (1, 16), (5, 1)])
def test_a_row_for_each_query_and_a_block_for_each_key(rows: int, block: int, heads: int) -> None:
    named = table(1, heads, -(-19 // rows), -(-19 // block), 6)
    equal(*inputs(19, 19, (4, 2), (4, 6), 1), table=named, rows=rows, block=block, causal=True)


def test_a_block_named_twice_counts_once() -> None:
    tensors = inputs(64, 64, dims=(8, 8), batch=1)
    named = torch.tensor([3, 1, -1, 1, 3, 3, 0]).expand(1, 1, 4, 7)
    found = equal(*tensors, table=named, rows=16, block=16)
    once = equal(*tensors, table=torch.tensor([0, 1, 3]).expand(1, 1, 4, 3), rows=16, block=16)
    assert torch.equal(found, once)


@pytest.mark.parametrize(
    "options",
    [
        {"table": torch.full((1, 1, 3, 2), -1)},
        {"table": torch.zeros(1, 1, 3, 0, dtype=torch.int64)},
        {"table": torch.zeros(1, 1, 3, 0, dtype=torch.int64), "full": torch.tensor([[2]])},
        {"table": torch.full((1, 1, 3, 2), 2), "causal": True},
        {"table": torch.full((1, 1, 3, 1), 2), "key_mask": padded(1, 37, 0, 10)},
        {"table": torch.zeros(1, 1, 3, 1, dtype=torch.int64), "key_mask": padded(1, 37, 0, 37)},
    ],
    ids=["no number", "no place", "no place but all", "later blocks", "padding", "all padding"],
)  # fmt: skip
def test_rows_that_see_no_key(options: dict[str, Any]) -> None:
    found = equal(*inputs(37, 37, dims=(4, 4), batch=1), rows=16, block=16, **options)
    assert (found == 0).all(-1).any()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, -x], -1)[..., 0],
        lambda x: x.flatten().repeat(2)[1 : 1 + x.numel()].view(x.shape),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["columns", "every second", "unaligned", "expanded"],
)  # fmt: skip
def test_layouts(view: Any) -> None:
    query, key, value = inputs(40, 40)
    named = torch.stack([table(2, 2, 3, 3, 2), table(2, 2, 3, 3, 2)], -1)[..., 0]
    mask = (normal(40, 2) > -0.5).T
    equal(view(query), view(key), view(value), table=named, key_mask=mask, rows=16, block=16)


def test_large_scores() -> None:
    query, key, value = inputs(40, 40)
    equal(query * 1e3, key, value, table=table(2, 1, 3, 3, 3), rows=16, block=16)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_spreads_as_in_the_reference(number: float) -> None:
    tensors = inputs(40, 40, batch=1)
    tensors[1][0, 0, 5, 3] = number
    equal(*tensors, table=torch.tensor([0, 1]).expand(1, 1, 3, 2), rows=16, block=16)


def test_blocks_that_no_row_names_are_not_read() -> None:
    query, key, value = inputs(64, 64)
    value[:, :, 16:32] = key[:, :, 16:32] = torch.nan
    with interpreted(kernels, None):
        found = kernels.block_attention(query, key, value, torch.tensor([[[[0], [2], [1], [3]]]]), rows=16, block=16)
    assert (
        found[:, :, 32:48].isnan().all() and not found[:, :, :32].isnan().any() and not found[:, :, 48:].isnan().any()
    )


def test_offsets_that_need_64_bits(tmp_path: Path) -> None:
    stride = 2**27 + 3
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=18 * stride, dtype=torch.float16)
    tensors = [memory[start:].as_strided((1, 1, 18, 4), (1, 1, stride, 1)) for start in (0, 4, 8)]
    for seed, tensor in enumerate(tensors):
        tensor.copy_(normal(*tensor.shape, seed=seed))
    equal(*tensors, table=torch.tensor([[[[1], [0]]]]), rows=16, block=16)


def test_no_tokens() -> None:
    query, key, value = inputs(0, 0)
    assert kernels.block_attention(query, key, value, table(1, 1, 1, 1, 1)).shape == (2, 2, 0, 20)


def test_tiles_lie_within_blocks_where_they_can() -> None:
    for block, size in ((64, 64), (128, 64), (32, 32), (96, 32), (48, 32), (1, 32)):
        assert kernels.block_attention_config(64, 64, torch.float16, 90, 64, block)["BLOCK_N"] == size
