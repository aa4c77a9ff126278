"""Attention to gathered places, in the interpreter, against fxpress::gathered_attention; and compiled ahead of time."""

import math
from collections.abc import Callable
from typing import Any

import aot
import launched
import pytest
import torch
from attention_cases import inputs, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.equality import compare, widen
from fxpress.ir.ops import lsh_attention as op
from fxpress.ir.ops.table import OPERATORS
from fxpress.kernels import gathered_attention as kernels

TENSOR_CORES = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05"}


def equal(*operands: Tensor, scale: float = 0.3, shared: bool = False) -> tuple[Tensor, Tensor]:
    reference = OPERATORS[op.gathered_attention].reference
    with interpreted(kernels, None):
        found = kernels.gathered_attention(*operands, scale, shared)
    wide = [widen(item) if item.is_floating_point() else item for item in operands]
    for one, eager, judge in zip(
        found, reference(*operands, scale, shared), reference(*wide, scale, shared), strict=True
    ):
        comparison = compare([one], [eager], [judge])
        assert comparison.equal, comparison.reasons
    return found


def places(batch: int, heads: int, chunks: tuple[int, int], width: int, length: int, seed: int = 0) -> Tensor:
    """[batch, heads, rounds, chunks, width], some of them twice."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, length, (batch, heads, *chunks, width), generator=random)


def gathered(
    num_rows: int, width: int, chunks: tuple[int, int] = (2, 3), heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (12, 20), dtype: torch.dtype = torch.float32, length: int = 40,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Operands: queries that see a part of their chunk's columns, and some that see none."""
    rows = places(2, heads[0], chunks, num_rows, length, 1)
    first = places(2, heads[0], chunks, num_rows, width, 2)
    end = places(2, heads[0], chunks, num_rows, width + 2, 3)
    columns = places(2, heads[0], chunks, width, length, 4)
    return *inputs(length, length, heads, dims, 2, dtype), rows, columns, first, end


@settings(max_examples=15)
@given(data=st.data())
def test_it_is_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    operands = gathered(
        draw(st.integers(1, 40)),
        draw(st.integers(1, 70)),
        draw(st.sampled_from([(1, 1), (2, 2), (1, 3)])),
        draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])),
        (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        draw(st.sampled_from([torch.float32, torch.float16])),
    )
    equal(*operands, scale=draw(st.sampled_from([0.3, -0.5, 0.0])), shared=draw(st.booleans()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_of_the_real_size(dtype: torch.dtype) -> None:
    equal(*gathered(64, 128, (1, 2), (2, 1), (64, 40), dtype, 200))


def test_a_query_that_sees_its_own_place_only() -> None:
    query, key, value = inputs(8, 8, dims=(4, 4))
    rows = torch.arange(8).expand(2, 2, 1, 1, 8)
    totals, found = equal(query, key, value, rows, rows, rows, rows + 1, shared=True)
    assert torch.equal(found[:, :, 0, 0], value)
    assert (totals == -1e5).all()


def test_a_query_that_sees_nothing() -> None:
    query, key, value = inputs(8, 8, dims=(4, 4))
    rows = torch.arange(8).expand(2, 2, 1, 1, 8)
    totals, found = equal(query, key, value, rows, rows, rows, rows)
    assert (totals < -9e29).all()
    torch.testing.assert_close(found[:, :, 0, 0], value.mean(2, keepdim=True).expand_as(value))


def test_places_that_no_chunk_names_are_not_read() -> None:
    query, key, value, rows, columns, first, end = gathered(5, 9)
    rows, columns = rows.clamp(max=29), columns.clamp(max=29)
    expected = equal(query, key, value, rows, columns, first, end)
    query[:, :, 30:] = key[:, :, 30:] = value[:, :, 30:] = math.nan
    found = equal(query, key, value, rows, columns, first, end)
    assert all(map(torch.equal, found, expected))


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
def test_layouts(view: Callable[[Tensor], Tensor]) -> None:
    equal(*map(view, gathered(5, 9)))


def test_no_chunks() -> None:
    totals, found = kernels.gathered_attention(*gathered(5, 9, (2, 0)), 0.3)
    assert (totals.shape, found.shape) == ((2, 2, 2, 0, 5), (2, 2, 2, 0, 5, 20))


@pytest.mark.slow
def test_it_is_compiled_with_tensor_cores_and_without_spills() -> None:
    def call() -> None:
        heads: list[Any] = [launched.heads(4, 1024, 64) for _ in range(3)]
        rows, columns = (torch.empty(2, 4, 2, 16, width, dtype=torch.int64) for width in (64, 128))
        kernels.gathered_attention(*heads, rows, columns, rows, rows, 0.125, True)

    jobs = {f"{arch}": launched.jobs(kernels, arch, call)["gathered_attention_kernel"] for arch in (80, 90, 100)}
    for arch, results in aot.compiled(jobs).items():
        found = results[int(arch)]
        assert found.get("error") is None
        assert found["over"] is None
        assert {TENSOR_CORES[arch], "cp.async.v4", "st.global.v4"} <= {*found["instructions"]}
