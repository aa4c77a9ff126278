"""The printer: readable, stable, and by the graph's own names."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.printer import print_program


def tiny() -> Program:
    def forward(m: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, m.w).view(x.shape[0], x.shape[1] * 6)
        return y.to(torch.float64), x.masked_fill(mask, 0.0).new_zeros(x.shape[0], device="cpu")

    return program(forward, normal(2, 5, 8), normal(2, 5, 1) > 0, w=normal(6, 8))


def test_text(golden: Any) -> None:
    golden(print_program(tiny()))


def test_names_are_those_of_the_nodes() -> None:
    made = tiny()
    shown = re.findall(r"^  %(\w+):", print_program(made), re.M)
    assert shown == [node.name for node in made.graph.nodes if node.op == "call_function"]


def test_sizes_are_named_in_order_of_the_inputs() -> None:
    text = print_program(program(lambda m, y, x: y @ x, normal(2, 3), normal(3, 5)))
    assert text.startswith("program(%y: f32[d0, d1], %x: f32[d1, d2]):")


def test_two_traces_print_the_same() -> None:
    assert print_program(tiny()) == print_program(tiny())


def test_several_results() -> None:
    text = print_program(program(lambda m, x: x.split(4, -1), normal(2, 8), dynamic=None))
    assert "%split: (f32[2, 4], f32[2, 4]) = aten.split.Tensor(%x, 4, -1)" in text
    assert "%getitem: f32[2, 4] = operator.getitem(%split, 0)" in text
