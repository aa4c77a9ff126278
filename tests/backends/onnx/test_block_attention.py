"""Attention by blocks and its tables in ONNX equal the references at every length, and no tensor holds all pairs."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.block_attention import LEAST
from fxpress.backends.onnx.lowerings.table import LOWERINGS
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.block_attention import block_attention, dynamic_blocks, expander_blocks, random_blocks

HEADS, SIZE = 4, 8
Options = dict[str, Any]


class Sparse(nn.Module):
    """A table made from one tensor [B, N, HEADS * SIZE] with a key mask, and the attention that reads it."""

    def __init__(self, table: Any, groups: int, options: Options, causal: bool, rows: int, padded: bool) -> None:
        super().__init__()
        self.table, self.groups, self.options, self.padded = table, groups, options, padded
        self.reads = {"rows": rows, "block": options["block"], "causal": causal}

    def forward(self, x: Tensor, key_mask: Tensor) -> tuple[Tensor, ...]:
        query = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        key = query[:, : self.groups].roll(1, 3)
        value = torch.cat((key * 2, key[..., :1]), 3)
        mask = key_mask if self.padded else None
        if self.table is dynamic_blocks:
            table, full = dynamic_blocks(query, key, mask, **self.options), None
        else:
            table, full = self.table(query, mask, **self.options)
        found = block_attention(query, key, value, table, full, mask, **self.reads)
        return (found, table) if full is None else (found, table, full)


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Padding at the end, and hidden keys before it; the last sample has none of its keys where there are several."""
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.rand(batch, length, generator=generator) > 0.2
    for sample in range(batch):
        key_mask[sample, length - length * sample // (batch + 1) :] = False
    if batch > 2:
        key_mask[-1] = False
    return torch.randn(batch, length, HEADS * SIZE, generator=generator), key_mask


def sparse(
    table: Any, groups: int = 2, causal: bool = False, rows: int | None = None, padded: bool = True, **options: Any
) -> Program:
    if table is not expander_blocks:
        options["causal"] = causal
    if table is dynamic_blocks:
        options["rows"] = rows or options["block"]
    model = Sparse(table, groups, options, causal, rows or options["block"], padded).eval()
    axes = {0: Dim("batch"), 1: Dim("length", min=2)}
    return trace(model, bind_example(model, inputs(2, 6)), {"x": axes, "key_mask": axes})


def session(traced: Program, folder: Path) -> Session:
    nodes = traced.calls(block_attention, dynamic_blocks, expander_blocks, random_blocks)
    save(to_onnx(traced, {node: LOWERINGS[node.target][0] for node in nodes}), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


CASES: dict[str, Callable[[], Program]] = {
    "random": lambda: sparse(random_blocks, block=16),
    "random, many": lambda: sparse(random_blocks, 4, block=8, window=4, globals=2, random=5, seed=3),
    "random, causal": lambda: sparse(random_blocks, 1, causal=True, block=16),
    "window alone": lambda: sparse(random_blocks, 4, padded=False, block=32, globals=0, random=0),
    "expander": lambda: sparse(expander_blocks, block=16, degree=4),
    "expander of tokens": lambda: sparse(expander_blocks, 4, block=1, degree=6, hubs=2),
    "dynamic, top_k": lambda: sparse(dynamic_blocks, block=16, top_k=2),
    "dynamic, mass": lambda: sparse(dynamic_blocks, 1, padded=False, rows=48, block=16, mass=0.1, scale=1.0),
    "dynamic, negative scale": lambda: sparse(dynamic_blocks, 1, padded=False, block=16, mass=0.1, scale=-1.0),
    "dynamic, causal": lambda: sparse(dynamic_blocks, causal=True, rows=32, block=16, mass=0.2, similarity=0.08),
    "dynamic, each query": lambda: sparse(dynamic_blocks, causal=True, rows=1, block=32, top_k=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_at_every_length(name: str, tmp_path: Path) -> None:
    """Tables, which are integers, must be the very same; beyond LEAST the blocks are computed, below it one mask."""
    traced = CASES[name]()
    run = session(traced, tmp_path).run
    for batch, length in ((2, 6), (1, 1), (3, 16), (1, 129), (1, LEAST), (3, LEAST + 1), (1, LEAST + 64), (2, 701)):
        tensors = inputs(batch, length)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = traced.run(tensors)
        assert compare(found, expected, run_float64(traced, tensors)).reasons == (), (batch, length)


class Read(nn.Module):
    """Attention whose table is an input."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, table: Tensor, full: Tensor) -> Tensor:
        return block_attention(x, x, x, table, full, **self.options)


@pytest.mark.slow
@pytest.mark.parametrize("length", [30, LEAST + 30])
def test_a_table_may_hold_anything(length: int, tmp_path: Path) -> None:
    """Repeated blocks, numbers that are no block's, rows without any, more rows than needed, one head and sample."""
    model = Read(rows=20, block=12).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, HEADS, length, SIZE, generator=generator)
    table = torch.randint(-5, length // 12 + 5, (1, 1, length // 20 + 3, 9), generator=generator)
    table[:, :, 1] = -1
    full = torch.tensor([[2, -1, 2, 999]])
    traced = trace(model, bind_example(model, (x, table, full)), None)
    (found,) = session(traced, tmp_path).run([x.numpy(), table.numpy(), full.numpy()])
    assert not found[:, :, 20:30].any()
    expected = traced.run((x, table, full))
    assert compare([torch.from_numpy(found)], expected, run_float64(traced, (x, table, full))).reasons == ()


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    model = Read(rows=16, block=16).eval()
    x = torch.randn(1, HEADS, LEAST + 30, SIZE, generator=torch.Generator().manual_seed(0)).half()
    table, full = random_blocks(x, block=16)
    traced = trace(model, bind_example(model, (x, table, full)), None)
    (found,) = session(traced, tmp_path).run([x.numpy(), table.numpy(), full.numpy()])
    expected = traced.run((x, table, full))
    assert compare([torch.from_numpy(found)], expected, run_float64(traced, (x, table, full))).reasons == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "random, causal", "expander"])
def test_no_tensor_of_all_queries_and_keys(name: str, tmp_path: Path) -> None:
    length = 2**16  # a boolean mask of all pairs would take 4 GB
    run = session(CASES[name](), tmp_path).run
    x = inputs(1, length)[0].numpy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = run([x, numpy.ones((1, length), dtype=bool)])[0]
    assert found.shape == (1, HEADS, length, SIZE + 1) and abs(found).max() > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # 1 GB
