"""Cutting channels out: a smaller ordinary program that computes the same."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import assert_equal, before_after, inputs, module, normal, program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.compiler.trace import trace
from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.printer import print_program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.cut import cut
from fxpress.ir.pruning.units import cut_unread, families
from fxpress.ir.rewrite import Context, PassResult
from fxpress.ir.verify import verify
from fxpress.passes import Canonicalize

HEADS, SIZE = 4, 2
WIDTH, INNER = HEADS * SIZE, 24
X = normal(2, 5, WIDTH)

Model = Callable[..., Any]


def unread(traced: Program, *gone: Collection[int]) -> Program:
    """A copy whose weights do not read some units of the first, second, ... family: their columns are zero."""
    copy = traced.copy()
    for family, units in zip(families(follow(copy))[0], gone, strict=True):
        for axis in family.columns:
            weight = copy.tensor(axis.weight).detach().clone()
            weight[:, torch.isin(family.units(axis), torch.tensor(sorted(units)))] = 0
            copy.set_weight(axis.weight, weight)
    return copy


def smaller(traced: Program, *gone: Collection[int]) -> Program:
    """A copy without some units of each family, and verified."""
    after = unread(traced, *gone)
    cut_unread(after)
    verify(after)
    return after


def shapes(traced: Program) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in traced.module.named_parameters()}


# --- programs --------------------------------------------------------------------------------------------------


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, N, heads * SIZE] -> [B, heads, N, SIZE]."""
    return x.view(x.shape[0], x.shape[1], heads, SIZE).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def project(m: Any, x: Tensor, heads: int = HEADS, groups: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, with a bias of the queries."""
    groups = groups or heads
    return split(F.linear(x, m.q, m.qb), heads), split(F.linear(x, m.k), groups), split(F.linear(x, m.v), groups)


def attend(m: Any, x: Tensor, heads: int = HEADS, groups: int | None = None, **options: Any) -> Tensor:
    y = torch.ops.fxpress.attention(*project(m, x, heads, groups), **options)
    return F.linear(merge(y), m.o, m.ob)


def attention_weights(heads: int = HEADS, groups: int | None = None) -> dict[str, Tensor]:
    rows, few = heads * SIZE, (groups or heads) * SIZE
    return {
        "q": normal(rows, WIDTH),
        "qb": normal(rows, seed=1),
        "k": normal(few, WIDTH, seed=2),
        "v": normal(few, WIDTH, seed=3),
        "o": normal(WIDTH, rows, seed=4),
        "ob": normal(WIDTH, seed=5),
    }


def packed(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.qkv)
    parts = y[..., :WIDTH], y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]
    return F.linear(merge(torch.ops.fxpress.attention(*map(split, parts))), m.o)


def unpacked(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.qkv).view(x.shape[0], x.shape[1], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
    return F.linear(merge(torch.ops.fxpress.attention(y[0], y[1], y[2])), m.o)


def repeated(m: Any, x: Tensor) -> Tensor:
    def repeat(y: Tensor) -> Tensor:
        wide = y[:, :, None].expand(y.shape[0], 2, 2, y.shape[2], SIZE)
        return wide.reshape(y.shape[0], HEADS, y.shape[2], SIZE)

    q, k, v = project(m, x, HEADS, 2)
    return F.linear(merge(torch.ops.fxpress.attention(q, repeat(k), repeat(v))), m.o)


def merged(m: Any, x: Tensor) -> Tensor:
    """Batch and heads as one axis, whose size is computed."""
    batch, length = x.shape[:2]
    parts = [part.reshape(batch * HEADS, length, SIZE).relu() for part in project(m, x)]
    y = torch.ops.fxpress.attention(*(part.view(batch, HEADS, length, SIZE) for part in parts))
    return F.linear(merge(y), m.o)


def rotated(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = project(m, x)
    q, k = (torch.ops.fxpress.rotary(F.layer_norm(part, (SIZE,)), cos, sin) for part in (q, k))
    return F.linear(merge(torch.ops.fxpress.attention(q, k, v)), m.o)


def sloped(m: Any, x: Tensor) -> Tensor:
    return attend(m, x, bias=m.slope * torch.arange(x.shape[1]))


def mlp(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, m.u, m.b)), m.d, m.c)


def gated(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.gu)
    return F.linear(F.silu(y[..., :INNER]) * y[..., INNER:] * m.s, m.d)


def chained(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(F.relu(F.linear(x, m.u)), m.w)), m.d)


def layer(m: Any, x: Tensor) -> Tensor:
    x = x + attend(m, F.layer_norm(x, (WIDTH,)))
    return x + mlp(m, F.layer_norm(x, (WIDTH,)))


@dataclass(frozen=True)
class Case:
    function: Model
    weights: dict[str, Tensor]
    gone: Sequence[Collection[int]]  # of each family
    examples: tuple[Tensor, ...] = (X,)


ATTENTION = attention_weights()
PACKED = {"qkv": normal(3 * WIDTH, WIDTH), "o": ATTENTION["o"]}
MLP = {"u": normal(INNER, WIDTH), "b": normal(INNER), "d": normal(WIDTH, INNER), "c": normal(WIDTH, seed=6)}
ANGLES = normal(2, 1, 5, SIZE)
ODD, TEN = range(1, HEADS, 2), (0, 2, 3, 5, 8, 11, 13, 17, 18, 23)
CASES: dict[str, Case] = {
    "attention": Case(attend, ATTENTION, [{1, 3}]),
    "packed": Case(packed, PACKED, [{0, 2}]),
    "unpacked": Case(unpacked, PACKED, [{3}]),
    "grouped": Case(lambda m, x: attend(m, x, HEADS, 2), attention_weights(groups=2), [{0}]),
    "one_for_all": Case(lambda m, x: attend(m, x, HEADS, 1), attention_weights(groups=1), [{0, 1}]),
    "repeated": Case(repeated, attention_weights(groups=2), [{1}]),
    "merged": Case(merged, ATTENTION, [{2}]),
    "rotated": Case(rotated, ATTENTION, [{0, 3}], (X, ANGLES.cos(), ANGLES.sin())),
    "bias": Case(
        lambda m, x: attend(m, x, bias=m.table), {**ATTENTION, "table": normal(HEADS, 1, 1)}, [{0, 2}]
    ),
    "computed_bias": Case(sloped, {**ATTENTION, "slope": normal(1, HEADS, 1, 1)}, [{1}]),
    "sinks": Case(lambda m, x: attend(m, x, sinks=m.sinks), {**ATTENTION, "sinks": normal(HEADS)}, [{0, 1, 2}]),
    "mlp": Case(mlp, MLP, [range(8)]),
    "gated": Case(gated, {"gu": normal(2 * INNER, WIDTH), "s": normal(INNER), "d": MLP["d"]}, [TEN]),
    "chained": Case(
        chained, {"u": MLP["u"], "w": normal(16, INNER), "d": normal(WIDTH, 16)}, [TEN, range(3, 14)]
    ),
    "layer": Case(layer, {**ATTENTION, **MLP}, [{2}, TEN]),
}  # fmt: skip


@functools.cache
def traced(case: str) -> Program:
    """Not to be changed."""
    return program(CASES[case].function, *CASES[case].examples, **CASES[case].weights)


# --- golden graphs, and the same by hand -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["repeated", "packed", "mlp"])
def test_sizes_that_views_state_are_made_to_fit(case: str, golden: Callable[[str], None]) -> None:
    before = unread(traced(case), *CASES[case].gone)
    after = before.copy()
    golden(before_after(before, after, PassResult(Counter(cut_unread(after)))))


def rows_of(*heads: int) -> list[int]:
    return [head * SIZE + row for head in heads for row in range(SIZE)]


def test_attention_is_what_one_with_fewer_heads_is() -> None:
    after, kept = smaller(traced("attention"), {1, 3}), rows_of(0, 2)
    given = {**{name: ATTENTION[name][kept] for name in ("q", "qb", "k", "v")}, "o": ATTENTION["o"][:, kept]}
    by_hand = program(lambda m, x: attend(m, x, 2), X, **given, ob=ATTENTION["ob"])
    assert print_program(after) == print_program(by_hand)
    for base in (3, 6):
        assert torch.equal(after.run(inputs(after, base))[0], by_hand.run(inputs(after, base))[0])


def test_feed_forward_block_is_what_one_with_fewer_neurons_is() -> None:
    after = smaller(traced("mlp"), range(8))
    by_hand = program(mlp, X, u=MLP["u"][8:], b=MLP["b"][8:], d=MLP["d"][:, 8:], c=MLP["c"])
    assert print_program(after) == print_program(by_hand)
    for base in (3, 6):
        assert torch.equal(after.run(inputs(after, base))[0], by_hand.run(inputs(after, base))[0])


# --- equality --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_program_without_what_nothing_reads_is_equal(case: str) -> None:
    before = unread(traced(case), *CASES[case].gone)
    after = smaller(traced(case), *CASES[case].gone)
    assert sum(weight.numel() for weight in after.module.parameters()) < sum(
        weight.numel() for weight in before.module.parameters()
    )
    for base in (3, 6):
        assert_equal(before, after, inputs(before, base))


@pytest.mark.parametrize("case", CASES)
def test_a_second_run_changes_nothing(case: str) -> None:
    after = smaller(traced(case), *CASES[case].gone)
    text = print_program(after)
    assert cut_unread(after) == {}
    assert print_program(after) == text


@pytest.mark.parametrize("case", CASES)
def test_where_everything_is_read_nothing_is_cut(case: str) -> None:
    after = traced(case).copy()
    assert cut_unread(after) == {}
    assert print_program(after) == print_program(traced(case))


class Multihead(nn.Module):
    """torch's own: packed projections, batch and heads as one axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return found


@pytest.mark.slow
def test_heads_of_torchs_multi_head_attention() -> None:
    whole = program(Multihead(), X)
    Canonicalize().apply(whole, Context())
    before, after = unread(whole, {0, 3}), smaller(whole, {0, 3})
    assert shapes(after)["inner.in_proj_weight"] == [3 * 2 * SIZE, WIDTH]
    for base in (3, 6):
        assert_equal(before, after, inputs(before, base))


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, int, set[int], set[int]]:
    """Heads, groups of them and neurons of a layer; and those that are not read."""
    groups = draw(st.integers(1, 3))
    heads, inner = groups * draw(st.integers(1, 3)), draw(st.integers(3, 40))
    units = heads if groups == 1 else groups
    return (
        heads,
        groups,
        inner,
        draw(st.sets(st.integers(0, units - 1))) if units > 1 else set(),
        draw(st.sets(st.integers(0, inner - 1))),
    )


@pytest.mark.slow
@given(layers())
@settings(max_examples=8)
def test_a_random_layer_is_equal(drawn: tuple[int, int, int, set[int], set[int]]) -> None:
    heads, groups, inner, gone_heads, gone_neurons = drawn

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + attend(m, x, heads, groups)
        return x + mlp(m, x)

    up = {"u": normal(inner, WIDTH), "b": normal(inner), "d": normal(WIDTH, inner), "c": MLP["c"]}
    whole = program(forward, X, **attention_weights(heads, groups), **up)
    gone = [gone_heads, gone_neurons] if heads > 1 else [gone_neurons]
    before, after = unread(whole, *gone), smaller(whole, *gone)
    stays = inner - len(gone_neurons)
    assert len(after.module.u) == min(inner, max(8, -(-stays // 8) * 8))
    for base in (3, 6):
        assert_equal(before, after, inputs(before, base))


# --- weights ---------------------------------------------------------------------------------------------------


def test_weights_keep_their_names_and_biases_follow_the_rows() -> None:
    before, after = shapes(traced("layer")), shapes(smaller(traced("layer"), {2}, TEN))
    assert set(after) == set(before)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert changed == {
        "q": ([8, 8], [6, 8]),
        "qb": ([8], [6]),
        "k": ([8, 8], [6, 8]),
        "v": ([8, 8], [6, 8]),
        "o": ([8, 8], [8, 6]),
        "u": ([24, 8], [16, 8]),
        "b": ([24], [16]),
        "d": ([8, 24], [8, 16]),
    }


def test_rows_and_columns_that_stay_are_as_they_were() -> None:
    after, kept = smaller(traced("attention"), {1, 3}), rows_of(0, 2)
    assert torch.equal(after.module.q, ATTENTION["q"][kept])
    assert torch.equal(after.module.qb, ATTENTION["qb"][kept])
    assert torch.equal(after.module.o, ATTENTION["o"][:, kept])
    assert torch.equal(after.module.ob, ATTENTION["ob"])


def test_a_weight_between_two_families_loses_rows_and_columns() -> None:
    after = smaller(traced("chained"), range(16), range(8))
    assert torch.equal(after.module.w, CASES["chained"].weights["w"][8:, 16:])


def test_parameters_stay_parameters() -> None:
    after = smaller(traced("mlp"), range(8))
    assert {name for name, weight in after.module.named_parameters() if weight.requires_grad} == {"u", "b", "d", "c"}
    after.run(inputs(after))[0].sum().backward()
    assert after.module.d.grad.shape == (WIDTH, INNER - 8)


def test_a_copy_made_before_keeps_its_weights() -> None:
    whole = unread(traced("mlp"), range(8))
    copy = whole.copy()
    expected = copy.run(inputs(copy))[0]
    cut_unread(whole)
    assert len(whole.module.u) == INNER - 8
    assert len(copy.module.u) == INNER
    assert torch.equal(copy.run(inputs(copy))[0], expected)


def test_the_model_is_not_touched() -> None:
    given = {**MLP, "d": torch.cat([torch.zeros(WIDTH, 8), MLP["d"][:, 8:]], 1)}
    model = module(mlp, **given)
    after = trace(model, ((X,), {}))
    assert cut_unread(after) == {"neurons": 8}
    assert {name: torch.equal(weight, given[name]) for name, weight in model.named_parameters()} == dict.fromkeys(
        given, True
    )


@pytest.mark.parametrize(("case", "name", "kept"), [("bias", "table", [1, 3]), ("sinks", "sinks", [3])])
def test_bias_and_sinks_are_read_for_the_heads_that_stay(case: str, name: str, kept: list[int]) -> None:
    """By a selection, as they may be computed: what they are computed from stays whole."""
    after = smaller(traced(case), *CASES[case].gone)
    (selected,) = after.calls(torch.ops.aten.index_select.default)
    assert selected.args[0].target == name  # type: ignore[union-attr]
    assert after.tensor(selected.args[2]).tolist() == kept  # type: ignore[arg-type]


def test_bias_that_is_the_same_for_all_heads_is_read_as_it_is() -> None:
    whole = program(lambda m, x: attend(m, x, bias=m.table), X, **ATTENTION, table=normal(1, 1, 1))
    assert not smaller(whole, {0}).calls(torch.ops.aten.index_select.default)


def test_keys_that_are_outputs_have_the_heads_that_stay() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = project(m, x)
        return F.linear(merge(torch.ops.fxpress.attention(q, k, v)), m.o), k

    whole = program(forward, X, **ATTENTION)
    after = smaller(whole, {0, 2})
    given = inputs(whole)
    assert torch.equal(after.run(given)[1], whole.run(given)[1][:, [1, 3]])


# --- channels that are given -----------------------------------------------------------------------------------


def in_rows(m: Any, x: Tensor) -> Tensor:
    """Neurons in four rows of eight, of which the third row is read."""
    return F.linear(F.linear(x, m.u).view(x.shape[0], x.shape[1], 4, 8)[:, :, 2], m.d)


def in_rows_all(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.u).view(x.shape[0], x.shape[1], 4, 8).relu().view(x.shape[0], x.shape[1], 32), m.d)


def test_a_selection_reads_the_same_place_as_before() -> None:
    """The first two rows go, and half of the others."""
    whole = program(in_rows, X, u=normal(32, WIDTH), d=normal(3, 8) * (torch.arange(8) > 3))
    after = whole.copy()
    channels = follow(after)
    place = torch.arange(32)
    cut(after, channels, channels.rows[0].channels[(place < 16) | (place % 8 < 4)].tolist())
    verify(after)
    assert after.calls(torch.ops.aten.select.int)[0].args[2] == 0
    assert_equal(whole, after, inputs(whole))


def test_a_selection_of_what_is_to_be_cut_is_refused() -> None:
    whole = program(in_rows, X, u=normal(32, WIDTH), d=normal(3, 8))
    channels = follow(whole)
    with pytest.raises(RewriteError, match=r"select \(aten.select.int\) takes what is to be cut"):
        cut(whole, channels, channels.rows[0].channels[16:24].tolist())


def test_whole_rows_of_a_view_can_be_cut() -> None:
    before = program(in_rows_all, X, u=normal(32, WIDTH), d=normal(3, 32) * (torch.arange(32) // 8 != 1))
    after = before.copy()
    channels = follow(after)
    cut(after, channels, channels.rows[0].channels[8:16].tolist())
    verify(after)
    assert "f32[d0, d1, 3, 8]" in print_program(after)
    assert_equal(before, after, inputs(before))


def test_what_leaves_no_rectangle_is_refused_and_nothing_is_changed() -> None:
    whole = program(in_rows_all, X, u=normal(32, WIDTH), d=normal(3, 32))
    channels, text = follow(whole), print_program(whole)
    with pytest.raises(RewriteError, match=r"view \(aten.view.default\) lays out what is to be cut in no rectangle"):
        cut(whole, channels, channels.rows[0].channels[:3].tolist())
    assert print_program(whole) == text
    assert shapes(whole) == {"u": [32, WIDTH], "d": [3, 32]}
    verify(whole)
