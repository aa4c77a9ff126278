"""What is found to quantize: linear layers by what they read, what is skipped or refused, and least values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, nn

from fxpress.ir.graph import Program
from fxpress.ir.layers import is_named
from fxpress.ir.quantization.sites import LEAST, least, linear_sites
from fxpress.ir.quantization.tables import tables

aten = torch.ops.aten


class Model(nn.Module):
    """embed -> (layers.0, layers.1) of one activation -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        return self.layers[0](x), self.head(F.relu(self.layers[1](x)))


IDS = torch.zeros(2, 3, dtype=torch.long)


def names(traced: Program, *skip: str) -> list[str]:
    return [site.name for site in linear_sites(traced, skip)[0]]


def reasons(traced: Program) -> list[str]:
    return [refusal.reason for refusal in linear_sites(traced, ())[1]]


def test_linears_that_read_one_activation_are_one_site() -> None:
    sites, _ = linear_sites(program(Model(), IDS), ())
    assert [site.name for site in sites] == ["layers.0 + layers.1", "head"]
    assert [site.multiplications for site in sites] == [8 * 8 + 4 * 8, 2 * 4]


def test_sites_stand_in_graph_order() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, m.second), m.first)

    assert names(program(forward, normal(2, 8), first=normal(8, 8), second=normal(8, 8, seed=1))) == ["second", "first"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("head", ["layers.0 + layers.1"]),
        ("h*", ["layers.0 + layers.1"]),
        ("layers", ["head"]),  # a beginning
        ("layers.0", ["layers.1", "head"]),
        ("layers.?", ["head"]),
        ("1", ["layers.0", "head"]),  # a part
        ("layer", ["layers.0 + layers.1", "head"]),  # no part, not even of a name
        ("Head", ["layers.0 + layers.1", "head"]),
        ("*", []),
    ],
)
def test_skipped_is_what_a_pattern_names(pattern: str, left: list[str]) -> None:
    assert names(program(Model(), IDS), pattern) == left


def test_skipped_linears_are_refused_with_their_name() -> None:
    _, refusals = linear_sites(program(Model(), IDS), ["head"])
    assert [refusal.reason for refusal in refusals] == ["head is to be skipped"]


@pytest.mark.parametrize(("pattern", "skipped"), [("embed", True), ("em*", True), ("head", False)])
def test_embeddings_are_skipped_by_name_too(pattern: str, skipped: bool) -> None:
    assert (tables(program(Model(), IDS), [pattern]) == []) is skipped


def test_a_weight_without_a_module_is_named_by_itself() -> None:
    traced = program(lambda m, x: F.linear(x, m.w), normal(2, 8), w=normal(4, 8))
    assert names(traced) == ["w"]
    assert is_named(traced.calls(aten.linear.default)[0], ["w"])


def test_tied_weights_are_sites_of_their_own_activations() -> None:
    tied = normal(8, 8)
    traced = program(lambda m, x: F.linear(F.relu(F.linear(x, m.a)), m.b), normal(2, 8), a=tied, b=tied)
    sites, _ = linear_sites(traced, ())
    assert len(sites) == 2
    assert sites[0].linears[0].args[1] is sites[1].linears[0].args[1]


def test_a_computed_weight_is_refused() -> None:
    assert reasons(program(lambda m, x: F.linear(x, m.w * 2), normal(2, 8), w=normal(4, 8))) == ["mul is no weight"]


def test_a_computed_bias_is_refused() -> None:
    given = {"w": normal(4, 8), "b": normal(4)}
    assert reasons(program(lambda m, x: F.linear(x, m.w, m.b * 2), normal(2, 8), **given)) == ["mul is no weight"]


def test_an_input_as_weight_is_refused() -> None:
    assert reasons(program(lambda m, x, y: F.linear(x, y), normal(2, 8), normal(4, 8))) == ["y is no weight"]


def test_a_weight_of_fp64_is_refused() -> None:
    wide = torch.float64
    traced = program(lambda m, x: F.linear(x, m.w), normal(2, 8, dtype=wide), w=normal(4, 8, dtype=wide))
    assert reasons(traced) == ["weight w is torch.float64"]


def test_a_vector_as_weight_is_refused() -> None:
    assert reasons(program(lambda m, x: F.linear(x, m.w), normal(2, 8), w=normal(8))) == ["weight w is no matrix"]


ACTIVATIONS = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_value_of_an_activation_function_is_below_its_least(name: str) -> None:
    """Looked for densely around the minimum, and far from it; nor is what is given far too low."""
    traced = program(lambda m, x: ACTIVATIONS[name](x), normal(2, 8))
    low = least(next(iter(traced.calls(*LEAST))))
    x = torch.cat([torch.linspace(-3, 0, 200_001), torch.linspace(-200, 200, 10_001)])
    values = ACTIVATIONS[name](x)
    assert low is not None and low <= values.min() < low + 2e-4


def test_least_looks_through_reshapes() -> None:
    traced = program(lambda m, x: F.relu(x).reshape(-1, 4).clone(), normal(2, 8))
    output = next(node for node in traced.graph.nodes if node.op == "output")
    assert least(output.args[0][0]) == 0.0


def test_least_of_anything_else_is_unknown() -> None:
    traced = program(lambda m, x: F.relu(x) - 1, normal(2, 8))
    output = next(node for node in traced.graph.nodes if node.op == "output")
    assert least(output.args[0][0]) is None
    assert least(next(node for node in traced.graph.nodes if node.op == "placeholder")) is None
