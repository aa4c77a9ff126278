"""Packed tokens in ONNX: each way to compute attention of one sample after the other equals the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.onnx.export import check, save, to_onnx
from fxpress.backends.onnx.lowerings.table import LOWERINGS, supported
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.padding import pack_tokens, packed_attention, real_tokens, unpack_tokens

HEADS = 4
PADDINGS = ("none", "end", "beginning", "holes", "all but one", "all")


def run(found: Session, given: Sequence[Tensor]) -> Tensor:
    return torch.from_numpy(numpy.asarray(found.run([item.numpy() for item in given])[0]))


class Packed(nn.Module):
    """Attention of packed tokens with `groups` heads of keys, `size` columns each, the values of `wide`."""

    def __init__(self, groups: int, size: int, wide: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.size, self.wide, self.options = groups, size, wide, options

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        rows = pack_tokens(x, real_tokens(key_mask)).unflatten(-1, (HEADS, self.size)).transpose(1, 2)
        key = rows[:, : self.groups].flip(1)
        found = packed_attention(rows, key, key[..., : self.wide] * 2, key_mask, **self.options)
        return unpack_tokens(found.transpose(1, 2).flatten(2), key_mask)


def inputs(batch: int, length: int, padding: str, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of two samples or more the first is full; "all" hides all of them."""
    generator = torch.Generator().manual_seed(length)
    key_mask = torch.ones(batch, length, dtype=torch.bool)
    hidden: dict[str, Any] = {
        "end": slice(length // 2, None),
        "beginning": slice(length // 2),
        "holes": slice(1, None, 2),
    }
    if padding in hidden:
        key_mask[-1, hidden[padding]] = False
    elif padding != "none":
        key_mask[slice(0 if padding == "all" else 1, None)] = False
    return torch.randn(batch, length, HEADS * size, generator=generator).to(dtype), key_mask


def traced(
    groups: int = HEADS,
    size: int = 8,
    wide: int = 8,
    dtype: torch.dtype = torch.float32,
    fixed: bool = False,
    **options: Any,
) -> Program:
    model = Packed(groups, size, wide, options).eval()
    axes = {0: Dim("batch"), 1: Dim("length", min=2)}
    example = inputs(3, 6, "end", size, dtype)
    return trace(model, bind_example(model, example), None if fixed else {"x": axes, "key_mask": axes})


def session(program: Program, folder: Path) -> Session:
    assert check(program) == []
    choices = {node: supported(node)[0][0] for node in program.calls(*LOWERINGS)}
    save(to_onnx(program, choices), folder / "model.onnx")
    return Session(folder / "model.onnx", threads=1)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide values": {"wide": 4},
    "grouped heads": {"groups": 2},
    "soft cap": {"softcap": 2.0, "scale": 0.3},
    "negative scale": {"scale": -0.3},
    "causal": {"causal": True},
    "causal, grouped heads": {"causal": True, "groups": 1, "softcap": 1.0},
    "causal, odd heads": {"causal": True, "size": 5, "wide": 5},
    "float16": {"dtype": torch.float16},
    "causal float16": {"causal": True, "dtype": torch.float16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, tmp_path: Path) -> None:
    size, dtype = KINDS[kind].get("size", 8), KINDS[kind].get("dtype", torch.float32)
    program = traced(**KINDS[kind])
    found = session(program, tmp_path)
    for batch, length in ((3, 6), (1, 1), (1, 7), (5, 2), (2, 33)):
        for padding in PADDINGS:
            given = inputs(batch, length, padding, size, dtype)
            verdict = compare([run(found, given)], program.run(given), run_float64(program, given))
            assert verdict.equal, (batch, length, padding, verdict.reasons)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["plain", "causal"])
def test_long_samples_in_the_kernels_for_them(options: dict[str, Any], tmp_path: Path) -> None:
    """More than 2^20 scores; steps of causal attention; short ones beside."""
    program = traced(**options)
    found = session(program, tmp_path)
    given = inputs(2, 600, "none", 8, torch.float32)
    for kept in (600, 590, 3):
        given[1][1] = torch.arange(600) < kept
        verdict = compare([run(found, given)], program.run(given), run_float64(program, given))
        assert verdict.equal, (kept, verdict.reasons)


def test_sizes_may_be_fixed(tmp_path: Path) -> None:
    program = traced(fixed=True)
    found = session(program, tmp_path)
    for padding in PADDINGS:
        given = inputs(3, 6, padding, 8, torch.float32)
        assert compare([run(found, given)], program.run(given), run_float64(program, given)).equal


def test_a_sample_is_the_same_alone(tmp_path: Path) -> None:
    """To the last bit, whatever is beside it and however much padding it has."""
    found = session(traced(), tmp_path)
    x, key_mask = inputs(3, 9, "end", 8, torch.float32)
    key_mask[0] = False
    batch = run(found, (x, key_mask))
    alone = run(found, (x[2:, :4], key_mask[2:, :4]))
    assert torch.equal(batch[2, :4], alone[0])


def test_padding_may_hold_anything(tmp_path: Path) -> None:
    found = session(traced(), tmp_path)
    x, key_mask = inputs(3, 9, "end", 8, torch.float32)
    expected = run(found, (x, key_mask))
    result = run(found, (x.masked_fill(~key_mask[..., None], torch.nan), key_mask))
    assert torch.equal(result, expected)


def test_float64_is_refused() -> None:
    program = traced(dtype=torch.float64)
    assert any("float32 and float16, found torch.float64" in problem for problem in check(program))
