"""Dimensions inside heads: another basis changes nothing, and the last dimensions can be cut in all heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import assert_equal, before_after, inputs, normal, program
from torch import Tensor

from fxpress.ir.equality import run_float64
from fxpress.ir.graph import Program, arguments
from fxpress.ir.ops.attention import attention
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.costs import unit_macs
from fxpress.ir.pruning.head_dims import HeadDims, cut_unread, find, turn
from fxpress.ir.pruning.masks import fold, put
from fxpress.ir.pruning.sensitivity import reach
from fxpress.ir.pruning.structured import put_masks
from fxpress.ir.rewrite import PassResult, untracked
from fxpress.ir.verify import verify

HEADS, SIZE = 4, 16
WIDTH, INNER = 24, HEADS * SIZE
X = normal(2, 5, WIDTH)
CALIBRATION = [[normal(3, length, WIDTH, seed=length)] for length in (4, 7, 9)]


def weights(groups: int = HEADS) -> dict[str, Tensor]:
    rows = {"q": INNER, "k": groups * SIZE, "v": groups * SIZE}
    made = {name: normal(size, WIDTH, seed=place) / 4 for place, (name, size) in enumerate(rows.items())}
    biases = {f"{name}b": normal(size, seed=9 + place) / 4 for place, (name, size) in enumerate(rows.items())}
    return {**made, **biases, "o": normal(WIDTH, INNER, seed=3) / 8, "ob": normal(WIDTH, seed=4)}


def heads(m: Any, x: Tensor, name: str) -> Tensor:
    made = F.linear(x, getattr(m, name), getattr(m, f"{name}b"))
    return made.view(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2)


def joined(m: Any, y: Tensor) -> Tensor:
    return F.linear(y.transpose(1, 2).flatten(2), m.o, m.ob)


def attend(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (heads(m, x, name) for name in ("q", "k", "v"))
    return x + joined(m, torch.ops.fxpress.attention(q, k, v, **options))


def traced(groups: int = HEADS, **options: Any) -> Program:
    return program(lambda m, x: attend(m, x, **options), X, **weights(groups))


def turned(before: Program) -> tuple[Program, list[HeadDims], list[Tensor]]:
    """A copy whose heads have other bases, its dimensions and what they are worth."""
    after = before.copy()
    dims = find(after).dims
    reaches = reach(after, [item.judge.layer for item in dims], CALIBRATION, None, untracked)
    worths = turn(after, dims, CALIBRATION, untracked, reaches)
    verify(after)
    return after, dims, worths


def narrowed(before: Program, *stay: int) -> Program:
    """A copy in other bases whose last dimensions are gone: those of queries and keys, and of values."""
    after, dims, _ = turned(before)
    for item, count in zip(dims, stay, strict=True):
        put_masks(after, item.family, torch.arange(SIZE) < count)
    fold(after)
    cut_unread(after)
    verify(after)
    return after


def widths(after: Program) -> tuple[int, int]:
    (node,) = after.calls(attention)
    given = arguments(node)
    return given["query"].meta["val"].shape[-1], given["value"].meta["val"].shape[-1]


# --- what there is ---------------------------------------------------------------------------------------------------


def test_queries_with_keys_and_values_are_two_families() -> None:
    found = find(traced())
    assert not found.refused
    described = [(item.family.kind, item.family.name, len(item.family.channels)) for item in found.dims]
    assert described == [("dims", "q + k", SIZE), ("dims", "v + o", SIZE)]
    assert [len(item.family.columns) for item in found.dims] == [0, 1]
    assert found.dims[0].family.layers == ("q", "k")


def test_places_are_those_of_heads() -> None:
    queries, values = find(traced(2)).dims
    rows = torch.arange(INNER).view(HEADS, SIZE)
    assert torch.equal(queries.turned.places, rows) and torch.equal(values.undone.places, rows)
    assert torch.equal(queries.undone.places, rows[:2]) and torch.equal(values.turned.places, rows[:2])


def test_heads_may_be_laid_out_dimension_by_dimension() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, getattr(m, name)).view(*x.shape[:2], SIZE, HEADS).permute(0, 3, 1, 2)
            for name in ("q", "k", "v")
        )
        return joined(m, torch.ops.fxpress.attention(q, k, v))

    before = program(forward, X, **weights())
    expected = torch.arange(INNER).view(SIZE, HEADS).T
    assert torch.equal(find(before).dims[0].turned.places, expected)
    assert_equal(before, turned(before)[0], inputs(before))


def test_a_dimension_costs_its_rows_and_columns_and_its_part_of_attention() -> None:
    before, batch, length = traced(), 2, 5
    each = batch * length * 2 * HEADS * WIDTH + batch * HEADS * length * length
    assert [unit_macs(before, follow(before), item.family) for item in find(before).dims] == [each, each]


def doubled(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(m, x, name) for name in ("q", "k", "v"))
    return joined(m, torch.ops.fxpress.attention(q * 2, k, v))


def shown(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads(m, x, name) for name in ("q", "k", "v"))
    return joined(m, torch.ops.fxpress.attention(q, k, v)), k


def same(m: Any, x: Tensor) -> Tensor:
    q, v = heads(m, x, "q"), heads(m, x, "v")
    return joined(m, torch.ops.fxpress.attention(q, q, v))


def gated(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(m, x, name) for name in ("q", "k", "v"))
    return joined(m, torch.ops.fxpress.attention(q, k, v).sigmoid())


def twice(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(m, x, name) for name in ("q", "k", "v"))
    y = torch.ops.fxpress.attention(q, k, v)
    return joined(m, y) + y.sum()


def given(m: Any, x: Tensor) -> Tensor:
    q, v = heads(m, x, "q"), heads(m, x, "v")
    return joined(m, torch.ops.fxpress.attention(q, x.unsqueeze(1).expand(-1, HEADS, -1, -1)[..., :SIZE], v))


def shared(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(m, x, name) for name in ("q", "k", "v"))
    y = joined(m, torch.ops.fxpress.attention(q, k, v))
    return y + F.linear(x, m.q).sum()


@pytest.mark.parametrize(
    ("forward", "kind", "reason"),
    [
        (doubled, "query and key", "stands between attention (fxpress.attention"),
        (shown, "query and key", "is also read by output"),
        (same, "query and key", "are the same"),
        (gated, "value", "sigmoid (aten.sigmoid.default) stands between"),
        (twice, "value", "is read in 2 places"),
        (given, "query and key", "stands between"),
        (shared, "query and key", "its weight q is also read by"),
    ],
)
def test_what_stands_in_the_way_is_named(forward: Callable[..., Any], kind: str, reason: str) -> None:
    """The other dimensions of the attention can go."""
    found = find(program(forward, X, **weights()))
    (name,) = found.refused
    assert name == f"{kind} of attention" and reason in found.refused[name]
    assert len(found.dims) == 1


def test_another_basis_would_mix_masks() -> None:
    before = traced()
    node = next(node for node in before.graph.nodes if node.target == "v")
    put(before, node, torch.arange(WIDTH) < 4)
    assert "have masks" in find(before).refused["value of attention"]


# --- another basis ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_another_basis_changes_nothing(groups: int) -> None:
    before = traced(groups)
    after, _, worths = turned(before)
    for base in (1, 3, 6):
        assert_equal(before, after, inputs(before, base))
    assert not torch.allclose(before.module.q, after.module.q)
    for worth in worths:
        assert (worth[:-1] >= worth[1:]).all() and worth.sum() > 0


def test_both_sides_are_as_long() -> None:
    after, dims, _ = turned(traced())
    for item in dims:
        sides = []
        for side, name in ((item.turned, "vq"[not item.family.columns]), (item.undone, "ok"[not item.family.columns])):
            sides.append(getattr(after.module, name).movedim(side.axis, 0)[side.places].norm(dim=-1))
        assert torch.allclose(*sides, rtol=1e-3)


def low_rank(rank: int, **options: Any) -> Program:
    """Whose heads give or read no more than some directions, of which no basis vector is one."""
    made = weights()
    for head in range(HEADS):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        for name, seed in (("k", 20 + head), ("v", 30 + head)):
            directions = normal(SIZE, rank, seed=seed)
            made[name][rows] = directions @ normal(rank, WIDTH, seed=seed + 40) / 4
            made[f"{name}b"][rows] = directions @ normal(rank, seed=seed + 50) / 4
    return program(lambda m, x: attend(m, x, **options), X, **made)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"right": 0}, {"softcap": 2.0}], ids=str)
def test_dimensions_that_nothing_depends_on_go_for_nothing(options: dict[str, Any]) -> None:
    before = low_rank(8, **options)
    after = narrowed(before, 8, 8)
    assert widths(after) == (8, 8)
    for base in (1, 3, 6):
        x = inputs(before, base)
        truth = run_float64(before, x)[0]
        assert (after.run(x)[0] - truth).abs().max() < 1e-2 * (truth - x[0]).abs().max()


def test_the_last_dimensions_cost_less_than_the_first_or_any_of_the_old_basis() -> None:
    before = traced()
    truth = before.run([X])[0].detach()

    def error(after: Program, keep: Tensor) -> float:
        for item in find(after).dims:
            put_masks(after, item.family, keep)
        fold(after)
        return float((after.run([X])[0].detach() - truth).square().mean())

    last, first = torch.arange(SIZE) < 8, torch.arange(SIZE) >= 8
    assert 2 * error(turned(before)[0], last) < min(
        error(before.copy(), last), error(before.copy(), first), error(turned(before)[0], first)
    )


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stay", "left"), [((8, 16), (8, 16)), ((16, 8), (16, 8)), ((3, 9), (8, 16)), ((0, 0), (8, 8))]
)
def test_dimensions_stay_in_multiples_of_8(stay: tuple[int, int], left: tuple[int, int]) -> None:
    assert widths(narrowed(traced(), *stay)) == left


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_cut_is_as_good_as_masked(groups: int) -> None:
    masked, dims, _ = turned(traced(groups))
    for item in dims:
        put_masks(masked, item.family, torch.arange(SIZE) < 8)
    masked.clean()
    after = narrowed(traced(groups), 8, 8)
    assert widths(after) == (8, 8)
    for base in (1, 3, 6):
        assert_equal(masked, after, inputs(masked, base))


def test_the_scale_stays_that_of_the_whole_heads() -> None:
    (node,) = narrowed(traced(), 8, 16).calls(attention)
    assert arguments(node)["scale"] == SIZE**-0.5
    (node,) = narrowed(traced(scale=0.3), 8, 16).calls(attention)
    assert arguments(node)["scale"] == 0.3
    (node,) = narrowed(traced(), 16, 8).calls(attention)
    assert arguments(node)["scale"] is None


def test_nothing_is_cut_that_something_reads() -> None:
    after = traced()
    assert cut_unread(after) == {}


def test_before_and_after(golden: Callable[[str], None]) -> None:
    before = traced()
    after = narrowed(before, 8, 8)
    golden(before_after(before, after, PassResult()))
