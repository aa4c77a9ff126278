"""Heads and neurons by family: what they are called, how many may stay, and which are cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.graph import Program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.units import ROUND, Family, cut_unread, families

HEADS, SIZE, INNER = 4, 2, 20
WIDTH = HEADS * SIZE
X = normal(2, 5, WIDTH)


class Block(nn.Module):
    """attend.{q,k,v,o}, then feed.{gate,up,down}, then the head; a norm and a residual addition before each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"})
        self.feed = nn.ModuleDict({name: nn.Linear(WIDTH, INNER) for name in ("gate", "up")})
        self.feed["down"] = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (WIDTH,))
        q, k, v = (
            self.attend[name](y).view(x.shape[0], x.shape[1], HEADS, SIZE).transpose(1, 2) for name in ("q", "k", "v")
        )
        y = torch.ops.fxpress.attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.attend["o"](y)
        y = F.layer_norm(x, (WIDTH,))
        x = x + self.feed["down"](F.silu(self.feed["gate"](y)) * self.feed["up"](y))
        found: Tensor = self.head(F.layer_norm(x, (WIDTH,)))
        return found


@functools.cache
def block() -> Program:
    """Not to be changed."""
    return program(Block(), X)


def found(traced: Program) -> list[Family]:
    return families(follow(traced))[0]


def zeroed(traced: Program, name: str, columns: Any) -> Program:
    """A copy with some columns of a weight at zero."""
    copy = traced.copy()
    node = next(node for node in copy.graph.nodes if node.op == "get_attr" and node.target == name)
    weight = copy.tensor(node).detach().clone()
    weight[:, columns] = 0
    copy.set_weight(node, weight)
    return copy


# --- families --------------------------------------------------------------------------------------------------


def test_heads_and_neurons_are_families_in_graph_order() -> None:
    described = [(family.kind, family.name, len(family.channels)) for family in found(block())]
    assert described == [("heads", "attend.o", HEADS), ("neurons", "feed.down", INNER)]


def test_a_family_knows_the_layers_that_make_and_read_it() -> None:
    heads, neurons = found(block())
    assert heads.layers == ("attend.q", "attend.k", "attend.v", "attend.o")
    assert neurons.layers == ("feed.gate", "feed.up", "feed.down")


def test_a_family_is_named_by_all_that_read_it() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(F.linear(x, m.u))
        return F.linear(h, m.d), F.linear(h, m.e)

    (family,) = found(program(forward, X, u=normal(16, WIDTH), d=normal(3, 16), e=normal(4, 16)))
    assert family.name == "d + e"
    assert [axis.weight.target for axis in family.columns] == ["d", "e"]


def test_rows_are_those_of_weights_and_biases() -> None:
    neurons = found(block())[1]
    rows = [f"{axis.weight.target}[{axis.axis}]" for axis in neurons.rows]
    assert rows == ["feed.gate.weight[0]", "feed.gate.bias[0]", "feed.up.weight[0]", "feed.up.bias[0]"]


def test_layers_whose_inputs_cannot_be_cut_are_refused_with_a_reason() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(F.linear(x, m.u), (16,)), m.d)

    every, refused = families(follow(program(forward, X, u=normal(16, WIDTH), d=normal(3, 16))))
    assert every == []
    assert list(refused) == ["d"]
    assert refused["d"].startswith("layer_norm (aten.layer_norm.default) needs all of linear")


def test_a_family_is_what_is_free_of_what_a_layer_reads() -> None:
    """Of the columns that read u, those that the output needs as well are none of it."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.linear(x, m.u)
        return F.linear(h, m.d), h[..., :4]

    every, refused = families(follow(program(forward, X, u=normal(16, WIDTH), d=normal(3, 16))))
    assert [len(family.channels) for family in every] == [12]
    assert refused["d"].startswith("slice_1 (aten.slice.Tensor) is an output of the model")


def test_one_channel_is_no_family() -> None:
    """Nothing stands beside it that could do its work."""
    assert found(program(lambda m, x: F.linear(F.linear(x, m.u), m.d), X, u=normal(1, WIDTH), d=normal(3, 1))) == []


def test_units_of_an_axis_are_counted_from_zero() -> None:
    heads, _ = found(block())
    assert heads.units(heads.rows[0]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert heads.units(heads.columns[0]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_belongs_to_no_unit_of_an_axis_is_marked() -> None:
    heads, neurons = found(block())
    assert heads.units(neurons.columns[0]).tolist() == [-1] * INNER


# --- how many may stay -----------------------------------------------------------------------------------------


def family(kind: str, size: int) -> Family:
    return Family(kind, "", torch.arange(size), (), ())


@pytest.mark.parametrize(
    ("kind", "size", "least"), [("heads", 12, 1), ("heads", 2, 1), ("neurons", 64, 8), ("neurons", 5, 5)]
)
def test_one_head_and_eight_neurons_stay_at_least(kind: str, size: int, least: int) -> None:
    assert family(kind, size).least == least
    assert family(kind, size).rounded(0) == least


@given(st.sampled_from(["heads", "neurons"]), st.integers(2, 100), st.integers(-5, 110))
def test_rounded_is_a_number_of_units_that_may_stay(kind: str, size: int, count: int) -> None:
    item = family(kind, size)
    rounded = item.rounded(count)
    assert item.least <= rounded <= size
    assert kind == "heads" or rounded % ROUND == 0 or rounded == size
    assert item.rounded(rounded) == rounded


@given(st.integers(2, 100), st.data())
def test_any_number_of_heads_may_stay(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    assert family("heads", size).rounded(count) == count


@given(st.integers(ROUND, 100), st.data())
def test_rounded_neurons_are_at_most_half_a_multiple_away(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(ROUND, size))
    assert abs(family("neurons", size).rounded(count) - count) <= ROUND / 2


def test_all_neurons_may_stay_however_many_they_are() -> None:
    assert family("neurons", 20).rounded(20) == 20
    assert family("neurons", 20).rounded(19) == 16


# --- what is not read ------------------------------------------------------------------------------------------


def test_units_are_cut_that_all_weights_read_as_zero() -> None:
    after = zeroed(block(), "feed.down.weight", slice(4, 16))
    assert cut_unread(after) == {"neurons": 12}
    assert torch.equal(after.module.feed.up.weight, block().module.feed.up.weight[[0, 1, 2, 3, 16, 17, 18, 19]])


def test_both_kinds_are_counted() -> None:
    after = zeroed(zeroed(block(), "feed.down.weight", slice(0, 12)), "attend.o.weight", slice(2, 6))
    assert cut_unread(after) == {"heads": 2, "neurons": 12}


def test_a_unit_that_one_reader_reads_stays() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(F.linear(x, m.u))
        return F.linear(h, m.d), F.linear(h, m.e)

    d, e = normal(3, 16), normal(4, 16)
    d[:, :12] = e[:, 8:] = 0  # of the zeros both have 8 to 12
    after = program(forward, X, u=normal(16, WIDTH), d=d, e=e)
    assert cut_unread(after) == {}
    e[:, 4:12] = 0
    after = program(forward, X, u=normal(16, WIDTH), d=d, e=e)
    assert cut_unread(after) == {"neurons": 8}


def test_a_head_that_is_read_in_part_stays() -> None:
    assert cut_unread(zeroed(block(), "attend.o.weight", [0, 2, 3, 5])) == {"heads": 1}


def test_one_number_that_is_not_zero_is_enough_to_stay() -> None:
    after = zeroed(block(), "feed.down.weight", slice(0, 12))
    after.module.feed.down.weight.data[3, :12] = 1e-30
    assert cut_unread(after) == {}


@pytest.mark.parametrize(("unread", "stay"), [(3, 20), (4, 16), (11, 16), (12, 8), (20, 8)])
def test_neurons_stay_in_multiples_of_eight(unread: int, stay: int) -> None:
    """As many of those that nothing reads as it takes."""
    after = zeroed(block(), "feed.down.weight", slice(0, unread))
    cut_unread(after)
    assert after.module.feed.up.weight.shape == (stay, WIDTH)


def test_a_last_head_stays() -> None:
    after = zeroed(block(), "attend.o.weight", slice(0, WIDTH))
    assert cut_unread(after) == {"heads": HEADS - 1}
    assert after.module.attend.o.weight.shape == (WIDTH, SIZE)


def test_few_neurons_are_never_cut() -> None:
    after = program(lambda m, x: F.linear(F.linear(x, m.u), m.d), X, u=normal(7, WIDTH), d=torch.zeros(3, 7))
    assert cut_unread(after) == {}


def test_what_cannot_be_cut_stays_though_nothing_reads_it() -> None:
    after = program(
        lambda m, x: F.linear(torch.softmax(F.linear(x, m.u), -1), m.d), X, u=normal(16, WIDTH), d=torch.zeros(3, 16)
    )
    assert cut_unread(after) == {}
