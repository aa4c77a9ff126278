"""Residual branches: which are found, which cannot be dropped, what is left without them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import inputs, normal, program
from torch import Tensor, nn

from fxpress.ir.graph import Program
from fxpress.ir.pruning.layers import Branch, Layer, branches, drop, grouped, least
from fxpress.ir.rewrite import untracked
from fxpress.ir.verify import verify

HEADS, SIZE, INNER = 2, 3, 8
WIDTH = HEADS * SIZE
X, Y = normal(2, 5, WIDTH), normal(2, 7, WIDTH, seed=1)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            layer(z).view(z.shape[0], z.shape[1], HEADS, SIZE).transpose(1, 2)
            for layer, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        mixed: Tensor = torch.ops.fxpress.attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.o(mixed)  # type: ignore[no-any-return]


class Feed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))


class Block(nn.Module):
    """One layer of a kind, without the branches `gone`."""

    def __init__(self, kind: str, gone: frozenset[str]) -> None:
        super().__init__()
        self.kind, self.gone = kind, gone
        self.attend, self.feed, self.cross = Attend(), Feed(), Attend()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "parallel":
            z = self.norms[0](x)
            return x if self.gone else x + (self.attend(z, z) + self.feed(z))
        branches: dict[str, Callable[[Tensor], Tensor]] = {
            "attend": lambda z: self.attend(z, z),
            **({"cross": lambda z: self.cross(z, y)} if self.kind == "cross" else {}),
            "feed": self.feed,
        }
        for norm, (name, branch) in zip(self.norms, branches.items(), strict=False):
            if self.kind == "post":
                x = norm(x if name in self.gone else branch(x) + x)
            else:
                x = x if name in self.gone else x + branch(norm(x))
        return x


class Stack(nn.Module):
    """blocks.0 and blocks.1; of `gone`, "0.attend" is a branch of the first."""

    def __init__(self, kind: str, *gone: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            Block(kind, frozenset(name[2:] for name in gone if name[0] == str(place))) for place in range(2)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, y)
        return x


@functools.cache
def stack(kind: str, *gone: str) -> Program:
    """Not to be changed."""
    return program(Stack(kind, *gone), X, Y)


def found(function: Callable[..., Any], *examples: Tensor) -> list[Branch]:
    """In a function with weights w and v."""
    return branches(program(function, *(examples or (X,)), w=normal(WIDTH, WIDTH), v=normal(WIDTH, WIDTH, seed=1)))


# --- branches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("pre", ["attend", "feed"]),
        ("post", ["attend", "feed"]),
        ("cross", ["attend", "cross", "feed"]),
    ],
)
def test_each_residual_addition_is_a_branch_in_graph_order(kind: str, parts: list[str]) -> None:
    names = [branch.name.rpartition(".")[0] for branch in branches(stack(kind))]
    assert names == [f"blocks.{place}.{part}" for place in range(2) for part in parts]


def test_attention_and_feed_forward_block_side_by_side_are_one_branch() -> None:
    names = [branch.name.split(".")[:2] for branch in branches(stack("parallel"))]
    assert names == [["blocks", "0"], ["blocks", "1"]]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + F.linear(x, m.w),
        lambda m, x: F.linear(x, m.w) + x,
        lambda m, x: x + F.linear(F.layer_norm(x, (WIDTH,)), m.w).sigmoid() * x,
        lambda m, x: x + F.linear(x.mean(1, keepdim=True), m.w),
    ],
    ids=["stream_first", "stream_last", "gated", "broadcast"],
)
def test_a_branch_is_what_linear_layers_make_of_the_stream(function: Callable[..., Any]) -> None:
    assert len(found(function)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + x.relu(),
        lambda m, x: F.linear(x, m.w) + F.linear(x, m.v),
        lambda m, x: x + m.w[0],
        lambda m, x: F.linear(x, m.w) + 1,
        lambda m, x: torch.add(x, F.linear(x, m.w), alpha=2),
        lambda m, x: (s := x.mean(1, keepdim=True)) + F.linear(s * x, m.w),
    ],
    ids=["no_linear", "two_of_one_input", "weight", "number", "scaled", "stream_of_another_size"],
)
def test_other_sums_are_no_branches(function: Callable[..., Any]) -> None:
    assert found(function) == []


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(9, WIDTH), nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.kinds(x)
        return found


def test_a_sum_of_embeddings_is_no_branch() -> None:
    assert branches(program(Embeddings(), torch.zeros(2, 5, dtype=torch.long), X)) == []


def test_a_branch_outside_of_any_module_has_the_name_of_its_sum() -> None:
    (branch,) = found(lambda m, x: x + F.linear(x, m.w))
    assert branch.name == branch.total.name == "add"


# --- fixed branches --------------------------------------------------------------------------------------------


def test_a_branch_of_which_the_model_gives_a_value_is_fixed_with_a_reason() -> None:
    first, second = found(lambda m, x: [x := x + F.linear(h := F.linear(x, m.w).relu(), m.v), x + F.linear(x, m.w), h])
    assert first.fixed is not None
    assert first.fixed.startswith("relu (aten.relu.default) is an output of the model")
    assert second.fixed is None


def test_streams_may_be_outputs() -> None:
    branch, _ = found(lambda m, x: [x, x := x + F.linear(x, m.w), x + F.linear(x, m.v)])
    assert branch.fixed is None


def test_a_layer_with_a_fixed_branch_is_fixed() -> None:
    total = next(iter(stack("pre").graph.nodes))
    free, fixed = Branch(total, total, "a"), Branch(total, total, "b", "because")
    assert Layer("layer", (free, free)).fixed is None
    assert Layer("layer", (free, fixed)).fixed == "because"


# --- layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pre", "post", "parallel", "cross"])
def test_branches_of_one_numbered_module_are_a_layer(kind: str) -> None:
    layers = grouped(branches(stack(kind)))
    assert [layer.name for layer in layers] == ["blocks.0", "blocks.1"]
    assert [branch for layer in layers for branch in layer.branches] == branches(stack(kind))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.0.attention.query", "encoder.layer.0"),
        ("encoder.layer.10.output", "encoder.layer.10"),
        ("stages.1.blocks.2.mlp", "stages.1"),
        ("0.attention", "0"),
        ("3", "3"),
        ("layer1.mlp", "layer1.mlp"),
        ("mlp.fc2", "mlp.fc2"),
        ("add_1", "add_1"),
    ],
)
def test_a_layer_is_named_up_to_its_first_number(name: str, layer: str) -> None:
    total = next(iter(stack("pre").graph.nodes))
    assert [item.name for item in grouped([Branch(total, total, name)])] == [layer]


# --- drop ------------------------------------------------------------------------------------------------------


def dropped(kind: str, place: int) -> Program:
    """A copy without a layer."""
    after = stack(kind).copy()
    drop(after, grouped(branches(after))[place])
    after.clean()
    verify(after)
    return after


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", ["pre", "post", "parallel", pytest.param("cross", marks=pytest.mark.slow)])
def test_without_a_layer_the_program_is_that_of_a_model_written_without_it(kind: str, place: int) -> None:
    after, by_hand = dropped(kind, place), stack(kind, *(f"{place}.{part}" for part in ("attend", "feed", "cross")))
    for base in (3, 6):
        given = inputs(stack(kind), base)
        assert torch.equal(after.run(given)[0], by_hand.run(given)[0])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attend", "cross", "feed"])
def test_without_a_branch_the_program_is_that_of_a_model_written_without_it(part: str) -> None:
    after, by_hand = stack("cross").copy(), stack("cross", f"1.{part}")
    (branch,) = [item for item in branches(after) if item.name.startswith(f"blocks.1.{part}")]
    drop(after, Layer("", (branch,)))
    after.clean()
    verify(after)
    for base in (3, 6):
        given = inputs(after, base)
        assert torch.equal(after.run(given)[0], by_hand.run(given)[0])


def test_weights_of_a_dropped_layer_go() -> None:
    after = dropped("pre", 0)
    assert {name.split(".")[1] for name, _ in after.module.named_parameters()} == {"_1"}


def test_norms_of_the_stream_stay() -> None:
    left = {name for name, _ in dropped("post", 0).module.named_parameters() if name.startswith("blocks._0")}
    assert left == {f"blocks._0.norms._{place}.{kind}" for place in range(2) for kind in ("weight", "bias")}


def test_all_layers_can_go() -> None:
    after = stack("pre").copy()
    for layer in grouped(branches(after)):
        drop(after, layer)
    after.clean()
    verify(after)
    assert torch.equal(after.run(inputs(stack("pre")))[0], inputs(stack("pre"))[0])


def test_what_is_left_has_the_other_branches() -> None:
    assert [branch.name for branch in branches(dropped("cross", 0))] == [
        branch.name for branch in branches(stack("cross"))[3:]
    ]


# --- least -----------------------------------------------------------------------------------------------------

BATCHES = [[normal(2, 5, WIDTH, seed=seed), normal(2, 7, WIDTH, seed=seed + 9)] for seed in range(3)]


@pytest.mark.parametrize("small", ["0", "1"])
@pytest.mark.parametrize("kind", ["pre", "post", "parallel"])
def test_least_is_the_layer_whose_branches_add_next_to_nothing(kind: str, small: str) -> None:
    model = Stack(kind)
    for name, weight in model.blocks[int(small)].named_parameters():
        if "attend.o" in name or "feed.2" in name:
            weight.data *= 1e-3
    traced = program(model, X, Y)
    assert least(grouped(branches(traced)), traced, BATCHES, untracked).name == f"blocks.{small}"


def turns(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two branches; and an attention, which reads a mask."""
    return x + F.linear(x, m.a), x + F.linear(x, m.b)


def test_least_compares_directions_and_not_lengths() -> None:
    """a adds much but along the stream, b little but across it."""
    across = torch.eye(WIDTH).roll(1, 0)
    traced = program(turns, X, a=torch.eye(WIDTH) * 9, b=across * 0.1)
    layers = grouped(branches(traced))
    assert least(layers, traced, [[X]], untracked) is layers[0]


def padded(m: Any, x: Tensor, mask: Tensor) -> list[Tensor]:
    mixed = torch.ops.fxpress.attention(x[:, None], x[:, None], x[:, None], key_mask=mask)
    return [*turns(m, x), mixed]


def test_least_does_not_look_at_padding() -> None:
    """a turns the first half of the columns, where tokens are; b the second half, where only padding is."""
    half = WIDTH // 2
    x, mask = torch.zeros(2, 5, WIDTH), torch.tensor([[True, True, False, False, False]] * 2)
    x[:, :2, :half], x[:, 2:, half:] = normal(2, 2, half), normal(2, 3, half)
    a = torch.zeros(WIDTH, WIDTH)
    a[:half, :half] = torch.eye(half).roll(1, 0) * 0.5
    b = torch.zeros(WIDTH, WIDTH)
    b[half:, half:] = torch.eye(half).roll(1, 0) * 5
    traced = program(padded, x, mask, a=a, b=b)
    layers = grouped(branches(traced))
    assert len(layers) == 2
    assert least(layers, traced, [[x, mask]], untracked) is layers[1]
