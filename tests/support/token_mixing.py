"""Operators that replace attention: called as in a model, and lowered to ONNX at every length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import save, to_onnx
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program

HEADS, SIZE = 4, 8
Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mixing(nn.Module):
    """`mix(query, key, value, key_mask)` of one tensor [B, N, HEADS * SIZE], with fewer heads of keys and values."""

    def __init__(self, mix: Mix, groups: int) -> None:
        super().__init__()
        self.mix, self.groups = mix, groups

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        rows = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        few = rows[:, : self.groups]
        return self.mix(rows, few.flip(1), few * 2, key_mask).transpose(1, 2).flatten(2)


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """With holes in the key mask, no key at all in the last sample and, of three samples, all in the first."""
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.rand(batch, length, generator=generator) > 0.5
    key_mask[-1] = False
    if batch > 2:
        key_mask[0] = True
    return torch.randn(batch, length, HEADS * SIZE, generator=generator), key_mask


def mixing(mix: Mix, groups: int = 2) -> Program:
    """Traced with a batch and a length of any size."""
    model = Mixing(mix, groups).eval()
    axes = {0: Dim("batch"), 1: Dim("length", min=2)}
    return trace(model, bind_example(model, inputs(2, 6)), {"x": axes, "key_mask": axes})


def session(program: Program, folder: Path) -> Session:
    """The program in ONNX Runtime, by the first lowering that takes each node."""
    choices = {node: supported(node)[0][0] for node in program.calls(*LOWERINGS)}
    save(to_onnx(program, choices), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


def check_in_onnx(mix: Mix, folder: Path, sizes: Sequence[tuple[int, int]], groups: int = 2) -> None:
    """ONNX Runtime gives what the references do, at each batch and length."""
    program = mixing(mix, groups)
    run = session(program, folder).run
    for size in sizes:
        tensors = inputs(*size)
        found = [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = program.run(tensors)
        assert compare(found, expected, run_float64(program, tensors)).reasons == (), size
