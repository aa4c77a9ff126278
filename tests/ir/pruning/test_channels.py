"""Which rows and columns of weights stand and fall together, and what forbids to cut them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, nn

from fxpress.ir.graph import Program
from fxpress.ir.pruning.channels import Channels, follow, small_sizes
from fxpress.ir.pruning.masks import put
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize

aten = torch.ops.aten
HEADS, GROUPS, SIZE = 4, 2, 2
WIDTH = HEADS * SIZE
X = normal(2, 5, WIDTH)

BY_HEAD = [0, 0, 1, 1, 2, 2, 3, 3]  # of each row or column of a projection, the head that it belongs to
BY_GROUP = [0, 0, 0, 0, 1, 1, 1, 1]  # where two heads share their keys and values
GROUP = [0, 0, 1, 1]  # of each row of keys and values


def canonical(function: Callable[..., Any] | nn.Module, *examples: Tensor, **weights: Tensor) -> Program:
    traced = program(function, *examples, **weights)
    Canonicalize().apply(traced, Context())
    return traced


def cuttable(traced: Program) -> dict[str, list[int]]:
    """Of each axis of a weight, `name[axis]`, the channel of each index: counted in graph order; -1: none or fixed.

    Axes without a channel that can be cut are left out.
    """
    channels = follow(traced)
    counted: dict[int, int] = {}
    found = {}
    for axis in [*channels.rows, *channels.columns]:
        free = [item if item >= 0 and item not in channels.fixed else None for item in axis.channels.tolist()]
        if any(item is not None for item in free):
            named = [-1 if item is None else counted.setdefault(item, len(counted)) for item in free]
            found[f"{axis.weight.target}[{axis.axis}]"] = named
    return found


def reasons(channels: Channels) -> set[str]:
    return set(channels.fixed.values())


# --- heads -----------------------------------------------------------------------------------------------------

THREE = {name: normal(WIDTH, WIDTH, seed=seed) for seed, name in enumerate("qkv")}
O = {"o": normal(WIDTH, WIDTH, seed=3)}  # noqa: E741
ATTENTION = {"q[0]": BY_HEAD, "k[0]": BY_HEAD, "v[0]": BY_HEAD, "o[1]": BY_HEAD}


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, N, heads * SIZE] -> [B, heads, N, SIZE]."""
    return x.view(x.shape[0], x.shape[1], heads, SIZE).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def project(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return split(F.linear(x, m.q)), split(F.linear(x, m.k)), split(F.linear(x, m.v))


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return merge(torch.ops.fxpress.attention(q, k, v, **options))


def plain(m: Any, x: Tensor) -> Tensor:
    return F.linear(attend(*project(m, x)), m.o)


def test_rows_of_queries_keys_and_values_and_columns_of_the_output_are_one_channel_a_head() -> None:
    assert cuttable(program(plain, X, **THREE, **O)) == ATTENTION


def test_each_attention_knows_the_channels_of_its_heads() -> None:
    channels = follow(program(plain, X, **THREE, **O))
    ((node, heads),) = channels.heads.items()
    assert node.target is torch.ops.fxpress.attention.default
    assert heads.tolist() == channels.columns[-1].channels[::SIZE].tolist()  # of o, the last linear


PACKED = {"qkv": normal(3 * WIDTH, WIDTH), **O}


def chunked(m: Any, x: Tensor) -> Tensor:
    return F.linear(attend(*map(split, F.linear(x, m.qkv).chunk(3, -1))), m.o)


def sliced(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.qkv)
    parts = y[..., :WIDTH], y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]
    return F.linear(attend(*map(split, parts)), m.o)


def unbound(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.qkv).view(x.shape[0], x.shape[1], 3, HEADS, SIZE)
    return F.linear(attend(*y.permute(2, 0, 3, 1, 4).unbind(0)), m.o)


def packed_by_head(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.qkv).view(x.shape[0], x.shape[1], HEADS, 3 * SIZE).transpose(1, 2)
    return F.linear(attend(*y.chunk(3, -1)), m.o)


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (chunked, BY_HEAD * 3),
        (sliced, BY_HEAD * 3),
        (unbound, BY_HEAD * 3),
        (packed_by_head, [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6),
    ],
)
def test_packed_projections_have_three_parts_of_each_head(function: Callable[..., Tensor], rows: list[int]) -> None:
    assert cuttable(canonical(function, X, **PACKED)) == {"qkv[0]": rows, "o[1]": BY_HEAD}


class Multihead(nn.Module):
    """torch's own, which merges the axes of batch and heads, and states the merged size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return found


def test_heads_merged_with_the_batch_are_found() -> None:
    assert cuttable(canonical(Multihead(), X)) == {
        "inner.in_proj_weight[0]": BY_HEAD * 3,
        "inner.in_proj_bias[0]": BY_HEAD * 3,
        "inner.out_proj.weight[1]": BY_HEAD,
    }


def merged(m: Any, x: Tensor) -> Tensor:
    """The same by hand, and with both axes merged where attention takes them apart again."""
    batch, length = x.shape[:2]
    flat = [part.reshape(batch * HEADS, length, SIZE).relu() for part in project(m, x)]
    y = torch.ops.fxpress.attention(*(part.view(batch, HEADS, length, SIZE) for part in flat))
    y = y.reshape(batch * HEADS, length, SIZE).view(batch, HEADS, length, SIZE)
    return F.linear(merge(y), m.o)


def test_channels_are_found_behind_an_axis_that_merges_batch_and_heads() -> None:
    assert cuttable(program(merged, X, **THREE, **O)) == ATTENTION


GROUPED = {"q": THREE["q"], "k": normal(GROUPS * SIZE, WIDTH, seed=1), "v": normal(GROUPS * SIZE, WIDTH, seed=2), **O}
SHARED = {"q": THREE["q"], "k": normal(SIZE, WIDTH, seed=1), "v": normal(SIZE, WIDTH, seed=2), **O}


def grouped(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(F.linear(x, m.q)), split(F.linear(x, m.k), GROUPS), split(F.linear(x, m.v), GROUPS)
    return F.linear(attend(q, k, v), m.o)


def repeated(m: Any, x: Tensor) -> Tensor:
    def repeat(y: Tensor) -> Tensor:
        wide = y[:, :, None].expand(y.shape[0], GROUPS, HEADS // GROUPS, y.shape[2], SIZE)
        return wide.reshape(y.shape[0], HEADS, y.shape[2], SIZE)

    k, v = (repeat(split(F.linear(x, weight), GROUPS)) for weight in (m.k, m.v))
    return F.linear(attend(split(F.linear(x, m.q)), k, v), m.o)


@pytest.mark.parametrize("function", [grouped, repeated])
def test_heads_that_share_keys_and_values_are_one_channel(function: Callable[..., Tensor]) -> None:
    found = cuttable(program(function, X, **GROUPED))
    assert found == {"q[0]": BY_GROUP, "k[0]": GROUP, "v[0]": GROUP, "o[1]": BY_GROUP}


def one_for_all(m: Any, x: Tensor) -> Tensor:
    return F.linear(attend(split(F.linear(x, m.q)), split(F.linear(x, m.k), 1), split(F.linear(x, m.v), 1)), m.o)


def test_where_all_heads_share_keys_and_values_each_query_head_is_a_channel_and_those_stay() -> None:
    traced = program(one_for_all, X, **SHARED)
    assert cuttable(traced) == {"q[0]": BY_HEAD, "o[1]": BY_HEAD}
    assert any("reads it with every head" in reason for reason in reasons(follow(traced)))


def crossed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.linear(attend(split(F.linear(x, m.q)), split(F.linear(y, m.k)), split(F.linear(y, m.v))), m.o)


def test_heads_of_cross_attention_have_rows_of_both_streams() -> None:
    assert cuttable(program(crossed, X, normal(2, 7, WIDTH), **THREE, **O)) == ATTENTION


def rotated(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = project(m, x)
    q, k = (torch.ops.fxpress.rotary(part, cos, sin) for part in (q, k))
    return F.linear(attend(q, k, v), m.o)


def test_rotary_embeddings_stand_on_the_way_of_queries_and_keys() -> None:
    angles = normal(2, 1, 5, SIZE)
    assert cuttable(program(rotated, X, angles.cos(), angles.sin(), **THREE, **O)) == ATTENTION


def layer_normed(m: Any, x: Tensor) -> Tensor:
    q, k, v = project(m, x)
    return F.linear(attend(F.layer_norm(q, (SIZE,), m.n), k, v), m.o)


def rms_normed(m: Any, x: Tensor) -> Tensor:
    q, k, v = project(m, x)
    return F.linear(attend(torch.ops.fxpress.rms_norm(q, m.n, 1e-6), k, v), m.o)


@pytest.mark.parametrize("function", [layer_normed, rms_normed])
def test_norms_of_each_query_stand_on_the_way_and_lose_nothing(function: Callable[..., Tensor]) -> None:
    assert cuttable(program(function, X, **THREE, **O, n=normal(SIZE))) == ATTENTION


def normed_parts(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.linear(x, m.u).view(x.shape[0], x.shape[1], HEADS, SIZE), (SIZE,)).flatten(2), m.d)


def test_what_a_norm_mixes_is_one_channel() -> None:
    traced = canonical(normed_parts, X, u=normal(WIDTH, WIDTH), d=normal(3, WIDTH))
    assert cuttable(traced) == {"u[0]": BY_HEAD, "d[1]": BY_HEAD}


def gated_heads(m: Any, x: Tensor) -> Tensor:
    y = torch.ops.fxpress.attention(*project(m, x)) * split(F.linear(x, m.g)).sigmoid()
    return F.linear(merge(y), m.o)


def test_gate_of_the_heads_belongs_to_them() -> None:
    assert cuttable(program(gated_heads, X, **THREE, **O, g=normal(WIDTH, WIDTH, seed=4))) == {
        **ATTENTION,
        "g[0]": BY_HEAD,
    }


def scaled_heads(m: Any, x: Tensor) -> Tensor:
    return F.linear(merge(torch.ops.fxpress.attention(*project(m, x)) * m.s), m.o)


def test_scale_of_each_head_belongs_to_it() -> None:
    found = cuttable(program(scaled_heads, X, **THREE, **O, s=normal(HEADS, 1, 1)))
    assert found == {**ATTENTION, "s[0]": [0, 1, 2, 3]}


def cached(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = project(m, x)
    return F.linear(attend(q, k, v), m.o), k, v


def test_keys_and_values_may_be_outputs() -> None:
    assert cuttable(program(cached, X, **THREE, **O)) == ATTENTION


def continued(m: Any, x: Tensor, past: Tensor) -> Tensor:
    q, k, v = project(m, x)
    return F.linear(attend(q, torch.cat([past, k], 2), torch.cat([past, v], 2)), m.o)


def test_keys_and_values_that_go_on_from_given_ones_keep_all_heads() -> None:
    traced = program(continued, X, normal(2, HEADS, 3, SIZE), **THREE, **O)
    assert cuttable(traced) == {}
    assert "it meets what keeps its size" in reasons(follow(traced))


# --- neurons ---------------------------------------------------------------------------------------------------

UP, DOWN = {"u": normal(8, WIDTH)}, {"d": normal(WIDTH, 8)}
EACH = list(range(8))


def test_neurons_are_rows_that_columns_read() -> None:
    traced = program(lambda m, x: F.linear(F.gelu(F.linear(x, m.u)), m.d), X, **UP, **DOWN)
    assert cuttable(traced) == {"u[0]": EACH, "d[1]": EACH}


def test_numbers_of_a_value_are_its_channels() -> None:
    traced = program(lambda m, x: F.linear(F.relu(F.linear(x, m.u))[..., 2:5], m.d), X, **UP, d=normal(WIDTH, 3))
    channels = follow(traced)
    (cut,) = traced.calls(aten.slice.Tensor)
    assert channels.values[cut].shape == (2, 3, 3)  # on small sizes
    assert channels.of(channels.values[cut])[0, 0].tolist() == channels.rows[0].channels[2:5].tolist()


def test_neurons_of_gate_and_up_projection_are_one_at_their_product() -> None:
    traced = program(
        lambda m, x: F.linear(F.silu(F.linear(x, m.g)) * F.linear(x, m.u), m.d), X, **UP, **DOWN, g=normal(8, WIDTH)
    )
    assert cuttable(traced) == {"g[0]": EACH, "u[0]": EACH, "d[1]": EACH}


def packed_gate(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.gu)
    return F.linear(F.silu(y[..., :8]) * y[..., 8:], m.d)


def test_packed_gate_and_up_projection_have_two_rows_a_neuron() -> None:
    assert cuttable(program(packed_gate, X, gu=normal(16, WIDTH), **DOWN)) == {"gu[0]": EACH * 2, "d[1]": EACH}


def test_bias_belongs_to_the_rows() -> None:
    traced = program(lambda m, x: F.linear(F.gelu(F.linear(x, m.u, m.b)), m.d), X, **UP, **DOWN, b=normal(8))
    assert cuttable(traced) == {"u[0]": EACH, "b[0]": EACH, "d[1]": EACH}


@pytest.mark.parametrize("join", [torch.mul, torch.add, torch.maximum])
def test_weight_that_has_a_number_for_each_channel_belongs_to_the_rows(join: Callable[..., Tensor]) -> None:
    traced = program(lambda m, x: F.linear(join(F.linear(x, m.u), m.s), m.d), X, **UP, **DOWN, s=normal(8))
    assert cuttable(traced) == {"u[0]": EACH, "s[0]": EACH, "d[1]": EACH}


def test_operand_that_is_the_same_for_all_channels_is_nothing_to_cut() -> None:
    traced = program(lambda m, x: F.linear(F.linear(x, m.u) * x[..., :1] * m.s, m.d), X, **UP, **DOWN, s=normal(1))
    assert cuttable(traced) == {"u[0]": EACH, "d[1]": EACH}


def test_all_readers_have_columns() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(F.linear(x, m.u))
        return F.linear(h, m.d), F.linear(h, m.e)

    traced = program(forward, X, **UP, **DOWN, e=normal(3, 8))
    assert cuttable(traced) == {"u[0]": EACH, "d[1]": EACH, "e[1]": EACH}


def test_concatenated_neurons_are_read_side_by_side() -> None:
    traced = program(
        lambda m, x: F.linear(torch.cat([F.linear(x, m.u), x, F.linear(x, m.w)], -1), m.d),
        X,
        **UP,
        w=normal(2, WIDTH),
        d=normal(3, 8 + WIDTH + 2),
    )
    assert cuttable(traced) == {"u[0]": EACH, "w[0]": [8, 9], "d[1]": [*EACH, *[-1] * WIDTH, 8, 9]}


def test_masked_weights_and_biases_have_the_same_channels() -> None:
    traced = program(lambda m, x: F.linear(F.gelu(F.linear(x, m.u, m.b)), m.d), X, **UP, **DOWN, b=normal(8))
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        put(traced, node, torch.ones_like(traced.tensor(node)))
    assert cuttable(traced) == {"u[0]": EACH, "b[0]": EACH, "d[1]": EACH}


# --- sizes -----------------------------------------------------------------------------------------------------


def test_symbolic_sizes_are_small_and_no_two_alike() -> None:
    traced = program(lambda m, x, y: F.linear(x, m.u).sum() + y, X, normal(3, 7), **UP)
    assert sorted(small_sizes(traced).values()) == [2, 3, 4, 5]


def test_a_size_is_as_large_as_the_program_needs() -> None:
    traced = program(lambda m, x: F.linear(x[:, 5:], m.u), normal(2, 9, WIDTH), **UP)
    least = traced.signature.ranges["d1"][0]
    batch, length = sorted(small_sizes(traced).values())
    assert batch == 2
    assert length >= least > 5


def test_a_fixed_size_is_none_of_them() -> None:
    traced = program(lambda m, x: F.linear(x, m.u), X, **UP, dynamic=None)
    assert small_sizes(traced) == {}
    assert follow(traced).values[traced.calls(aten.linear.default)[0]].shape == X.shape


def test_sizes_may_be_computed_from_symbolic_ones() -> None:
    """The merged axis has batch * length small tokens, and is cut as any other."""
    traced = program(
        lambda m, x: F.linear(F.linear(x.reshape(-1, WIDTH), m.u).relu().view(x.shape[0], -1, 8), m.d), X, **UP, **DOWN
    )
    channels = follow(traced)
    assert channels.values[traced.calls(aten.relu.default)[0]].shape == (2 * 3, 8)
    assert cuttable(traced) == {"u[0]": EACH, "d[1]": EACH}


# --- what forbids ----------------------------------------------------------------------------------------------

FORBIDDEN: dict[str, tuple[Callable[..., Any], str]] = {
    "residual_add": (
        lambda m, x: F.linear(x + F.linear(x, m.u), m.d),
        "add (aten.add.Tensor) joins it with x, which keeps its size",
    ),
    "layer_norm": (
        lambda m, x: F.linear(F.layer_norm(F.linear(x, m.u), (8,)), m.d),
        "layer_norm (aten.layer_norm.default) needs all of linear",
    ),
    "rms_norm": (
        lambda m, x: F.linear(torch.ops.fxpress.rms_norm(F.linear(x, m.u), None, 1e-6), m.d),
        "rms_norm (fxpress.rms_norm.default) needs all of linear",
    ),
    "softmax": (
        lambda m, x: F.linear(torch.softmax(F.linear(x, m.u), -1), m.d),
        "softmax (aten.softmax.int) needs all of linear",
    ),
    "sum": (
        lambda m, x: F.linear(h := F.linear(x, m.u), m.d) + h.sum(-1, keepdim=True),
        "sum_1 (aten.sum.dim_IntList) needs all of linear",
    ),
    "matmul": (
        lambda m, x: F.linear(F.linear(x, m.u) @ x.transpose(1, 2) @ x, m.d),
        "matmul (aten.matmul.default) needs all of linear",
    ),
    "output": (
        lambda m, x: [h := F.linear(x, m.u), F.linear(h, m.d)],
        "linear (aten.linear.default) is an output of the model",
    ),
    "output_of_a_view": (
        lambda m, x: [(h := F.linear(x, m.u))[0], F.linear(h, m.d)],
        "select (aten.select.int) is an output of the model",
    ),
    "computed_columns": (
        lambda m, x: F.linear(F.linear(x, m.u), m.d * 2),
        "linear_1 (aten.linear.default) has a weight that is computed",
    ),
    "computed_bias": (
        lambda m, x: F.linear(F.linear(x, m.u), m.d, m.s * 2),
        "linear_1 (aten.linear.default) has a weight that is computed",
    ),
    "tied_columns": (
        lambda m, x: F.linear(F.linear(x, m.u), m.d) + F.linear(x, m.d),
        "its weight d is also read by linear_2",
    ),
    "every_second": (
        lambda m, x: F.linear(F.linear(x, m.u)[..., ::2], m.d[:, :4]),
        "slice_1 (aten.slice.Tensor) takes every 2th of it",
    ),
    "linear_of_each_part": (
        lambda m, x: F.linear(F.linear(F.linear(x, m.u).view(x.shape[0], -1, 4, 2), m.w).flatten(2), m.d),
        "linear_1 (aten.linear.default) is applied to each part of view",
    ),
    "scale_read_twice": (
        lambda m, x: F.linear(F.linear(x, m.u) * m.s, m.d) * m.s,
        "mul (aten.mul.Tensor) joins it with s, which keeps its size",
    ),
    "operand_with_a_size_of_its_own": (
        lambda m, x: F.linear(F.linear(x, m.u) * x.exp(), m.d),
        "mul (aten.mul.Tensor) joins it with exp, which keeps its size",
    ),
}


@functools.cache
def forbidden(case: str) -> Channels:
    weights = {"u": normal(8, 8), "d": normal(8, 8, seed=1), "s": normal(8, seed=2), "w": normal(2, 2)}
    return follow(program(FORBIDDEN[case][0], X, **weights))


@pytest.mark.parametrize("case", FORBIDDEN)
def test_reason_names_what_needs_the_channels(case: str) -> None:
    assert any(reason.startswith(FORBIDDEN[case][1]) for reason in reasons(forbidden(case)))


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_is_needed_elsewhere_cannot_be_cut(case: str) -> None:
    """Of the rows of u, the first linear layer, none can."""
    channels = forbidden(case)
    first = next(axis for axis in channels.rows if axis.weight.target == "u")
    assert all(item in channels.fixed for item in first.channels.tolist())
