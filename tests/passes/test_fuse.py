"""Fuse: every rule with its golden graph, every refusal with its reason, and what must survive a rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, check, normal, program, reasons, rewritten
from torch import Tensor, nn

from fxpress.ir.graph import Program
from fxpress.ir.ops.linear import gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fuse, ReplaceAttention

sdpa = F.scaled_dot_product_attention
X = (2, 5, 8)


def rms_normed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return rms_norm(x + y, m.w, 1e-6)


def normed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(x + y, (8,), m.w, m.b, 1e-12)


def split_heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)


def projected(m: Any, x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, getattr(m, n), getattr(m, n + "b", None)) for n in "qkv")
    return sdpa(split_heads(q), split_heads(k), split_heads(v))


def cross(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return sdpa(*(split_heads(F.linear(t, w)) for t, w in ((x, m.q), (y, m.k), (y, m.v))))


def rotated(m: Any, x: Tensor) -> Tensor:
    q, k = (split_heads(F.linear(x, w)) for w in (m.q, m.k))
    q, k = (t * 0.5 + torch.cat([-t[..., 2:], t[..., :2]], -1) * 0.3 for t in (q, k))
    return sdpa(q, k, split_heads(F.linear(x, m.v)))


def canonical(model: Any, *examples: Tensor, **given: Tensor) -> Program:
    """A traced program with attention as one operator, as Fuse finds it in the pipeline."""
    return rewritten(program(model, *examples, **given), Canonicalize())[0]


def weights(names: str, *shape: int) -> dict[str, Tensor]:
    return {name: normal(*shape, seed=index) for index, name in enumerate(names)}


def gated(function: Callable[..., Any]) -> Program:
    """A program of x [.., 8], gate and up weights g and u [6, 8], and packed ones p and r [12, 8]."""
    given = {"g": normal(6, 8), "u": normal(6, 8, seed=1), "p": normal(12, 8, seed=2), "r": normal(12, 8, seed=3)}
    return canonical(function, normal(*X), **given, c=normal(6, seed=4), d=normal(12, seed=5))


def gate_of(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.p, m.d)


def packed_gate(m: Any, x: Tensor) -> Tensor:
    gate, up = gate_of(m, x).chunk(2, dim=-1)
    return up * F.silu(gate)


def quick_gelu(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.g, m.c)
    return y * torch.sigmoid(1.702 * y)


GATED: dict[str, Callable[..., Tensor]] = {
    "silu": lambda m, x: F.silu(F.linear(x, m.g)) * F.linear(x, m.u),
    "gelu_swapped": lambda m, x: F.linear(x, m.u, m.c) * F.gelu(F.linear(x, m.g)),
    "gelu_tanh": lambda m, x: F.gelu(F.linear(x, m.g, m.c), approximate="tanh") * F.linear(x, m.u, m.c),
    "relu_tied": lambda m, x: F.relu(F.linear(x, m.g)) * F.linear(x, m.g, m.c),
    "packed_chunk": packed_gate,
    "packed_split": lambda m, x: (lambda up, gate: F.gelu(gate) * up)(*F.linear(x, m.p).split(6, -1)),
    "packed_unbind": lambda m, x: (lambda gate, up: F.relu(gate) * up)(*gate_of(m, x).unflatten(-1, (2, 6)).unbind(-2)),
    "packed_slices": lambda m, x: (lambda y: F.relu(y[..., 6:]) * y[..., :6])(gate_of(m, x)),
}


def activated(name: str) -> Program:
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    return program(lambda m, x: acts[name](F.linear(x, m.w, m.b)), normal(*X), w=normal(6, 8), b=normal(6))


def block(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, m.w, m.b)), m.d, m.c)


def gated_block(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, m.g)) * F.linear(x, m.w, m.b), m.d)


BLOCK = {
    "w": normal(6, 8),
    "b": normal(6),
    "d": normal(8, 6, seed=1),
    "c": normal(8, seed=2),
    "g": normal(6, 8, seed=3),
}
NORM = {"w": normal(8), "b": normal(8, seed=4)}
PROJECTIONS = weights("qkv", 8, 8)
CASES: dict[str, tuple[Callable[[], Program], Any]] = {
    "pack_projections": (lambda: canonical(projected, normal(*X), **PROJECTIONS), split_linear),
    "pack_projections_bias": (
        lambda: canonical(
            projected, normal(*X), **PROJECTIONS, **{n + "b": normal(8, seed=i) for i, n in enumerate("qkv")}
        ),
        split_linear,
    ),
    "pack_projections_rotary": (lambda: canonical(rotated, normal(*X), **PROJECTIONS), split_linear),
    "pack_projections_cross": (
        lambda: canonical(cross, normal(*X), normal(2, 7, 8), **PROJECTIONS),
        split_linear,
    ),
    "add_layer_norm": (lambda: program(normed, normal(*X), normal(*X, seed=1), **NORM), add_layer_norm),
    **{f"gated_{name}": (lambda function=function: gated(function), gated_linear) for name, function in GATED.items()},
    "linear_quick_gelu": (lambda: gated(quick_gelu), linear_act),
    "mlp": (lambda: program(block, normal(*X), **BLOCK), mlp),
    "mlp_gated": (lambda: program(gated_block, normal(*X), **BLOCK), mlp),
    "mlp_tied": (
        lambda: program(lambda m, x: F.linear(F.relu(F.linear(x, m.w)), m.w), normal(2, 5, 8), w=normal(8, 8)),
        mlp,
    ),
    "add_rms_norm_gemma": (
        lambda: program(
            lambda m, x, y: rms_norm((y + x).relu() + x, 1.0 + m.w, 1e-6), normal(*X), normal(*X, seed=1), w=normal(8)
        ),
        add_rms_norm,
    ),
    "add_rms_norm_no_weight": (
        lambda: program(lambda m, x, y: rms_norm(x + y, None, 1e-6), normal(*X), normal(*X, seed=1)),
        add_rms_norm,
    ),
    "add_layer_norm_no_bias": (
        lambda: program(lambda m, x, y: F.layer_norm(x + y, (8,), m.w), normal(*X), normal(*X, seed=1), w=normal(8)),
        add_layer_norm,
    ),
    "add_layer_norm_no_weight": (
        lambda: program(lambda m, x, y: F.layer_norm(x + y, (8,)), normal(2, 5, 8), normal(2, 5, 8, seed=1)),
        add_layer_norm,
    ),
    "add_rms_norm": (lambda: program(rms_normed, normal(*X), normal(*X, seed=1), w=normal(8)), add_rms_norm),
    **{
        f"linear_{name}": (lambda name=name: activated(name), linear_act)
        for name in ("gelu", "gelu_tanh", "relu", "silu", "tanh")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str, golden: Callable[[str], None]) -> None:
    build, target = CASES[case]
    before = build()
    after, result = check(before, Fuse())
    assert after.calls(target)
    golden(before_after(before, after, result))


# --- refusals --------------------------------------------------------------------------------------------------


def bad_norm(function: Callable[..., Tensor], *examples: Tensor, **given: Tensor) -> Program:
    return program(function, *examples, **(given or NORM))


def read_twice(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, m.w)
    return F.relu(y), y.exp()


def returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, m.w)
    return F.relu(y), y


def packed(function: Callable[..., Tensor], **given: Tensor) -> Program:
    return canonical(function, normal(*X), **(given or PROJECTIONS))


def tied_weight(m: Any, x: Tensor) -> Tensor:
    q, k = F.linear(x, m.q), F.linear(x, m.k)
    return sdpa(split_heads(q), split_heads(k), split_heads(x)) + F.linear(x.exp(), m.q).sum()


def computed_weight(m: Any, x: Tensor) -> Tensor:
    q, k = F.linear(x, m.q * 2), F.linear(x, m.k)
    return sdpa(split_heads(q), split_heads(k), split_heads(x))


REFUSALS: dict[str, tuple[Callable[[], Program], str, str]] = {
    "packed_tied": (lambda: packed(tied_weight), "pack_projections", "weight q is tied: 2 nodes read it"),
    "packed_mixed_bias": (
        lambda: packed(projected, **PROJECTIONS, qb=normal(8)),
        "pack_projections",
        "some of the linears have a bias, some have none",
    ),
    "packed_no_weight": (lambda: packed(computed_weight), "pack_projections", "an operand of linear is no weight"),
    "residual_broadcasts": (
        lambda: bad_norm(normed, normal(*X), normal(8)),
        "add_layer_norm",
        "the operands of add broadcast",
    ),
    "rms_residual_broadcasts": (
        lambda: bad_norm(rms_normed, normal(*X), normal(8), w=normal(8)),
        "add_rms_norm",
        "the operands of add broadcast",
    ),
    "number_added": (
        lambda: bad_norm(lambda m, x: F.layer_norm(x + 1.5, (8,), m.w, m.b), normal(*X)),
        "add_layer_norm",
        "a number is added, no residual",
    ),
    "dtypes_differ": (
        lambda: bad_norm(normed, normal(*X), normal(*X).half()),
        "add_layer_norm",
        "the operands of add differ in dtype",
    ),
    "two_axes": (
        lambda: program(
            lambda m, x, y: F.layer_norm(x + y, (5, 8), m.w, m.b),
            normal(*X),
            normal(*X),
            w=normal(5, 8),
            b=normal(5, 8),
        ),
        "add_layer_norm",
        "the norm is over 2 axes",
    ),
    "alpha": (
        lambda: bad_norm(
            lambda m, x, y: F.layer_norm(torch.add(x, y, alpha=2), (8,), m.w, m.b), normal(*X), normal(*X)
        ),
        "add_layer_norm",
        "add has alpha=2, expected 1",
    ),
    "no_linear": (
        lambda: program(lambda m, x: F.relu(x.exp()), normal(*X)),
        "linear_relu",
        "expected aten.linear.default, found exp (aten.exp.default)",
    ),
    "read_twice": (
        lambda: program(read_twice, normal(*X), w=normal(8, 8)),
        "linear_relu",
        "linear is also read by exp",
    ),
    "returned": (
        lambda: program(returned, normal(*X), w=normal(8, 8)),
        "linear_relu",
        "linear is returned by the model",
    ),
    "packed_gate_in_thirds": (
        lambda: gated(lambda m, x: (lambda y: y[..., :4].relu() * y[..., 8:])(gate_of(m, x))),
        "gated_linear",
        "gate and up projection are not the halves of linear",
    ),
    "packed_gate_overlaps": (
        lambda: gated(lambda m, x: (lambda y: y[..., :6].relu() * y[..., 3:9])(gate_of(m, x))),
        "gated_linear",
        "gate and up projection are not the halves of linear",
    ),
    "packed_gate_tied": (
        lambda: gated(lambda m, x: packed_gate(m, x) + m.p.sum()),
        "gated_linear",
        "weight p is tied: 2 nodes read it",
    ),
    "packed_gate_of_two": (
        lambda: gated(lambda m, x: gate_of(m, x)[..., :6].relu() * F.linear(x, m.r)[..., 6:]),
        "gated_linear",
        "gate and up projection are parts of different linears",
    ),
    "packed_gate_of_pairs": (
        lambda: gated(
            lambda m, x: (lambda gate, up: F.relu(gate) * up)(*gate_of(m, x).unflatten(-1, (6, 2)).unbind(-1))
        ),
        "gated_linear",
        "gate and up projection are not the halves of linear",
    ),
    "gate_of_itself": (
        lambda: gated(lambda m, x: (lambda y: F.relu(y) * y)(F.linear(x, m.g))),
        "linear_relu",
        "linear is also read by mul",
    ),
    "gate_reads_another": (
        lambda: gated(lambda m, x: F.silu(F.linear(x, m.g)) * F.linear(x.exp(), m.u)),
        "gated_linear",
        "linear and linear_1 read different inputs",
    ),
    "gate_broadcasts": (
        lambda: gated(lambda m, x: F.silu(F.linear(x, m.g)) * F.linear(x, m.u[:1])),
        "gated_linear",
        "gate and up projection differ in size",
    ),
    "gate_no_weight": (
        lambda: gated(lambda m, x: F.silu(F.linear(x, m.g.exp())) * F.linear(x, m.u)),
        "gated_linear",
        "exp is no weight",
    ),
    "gate_read_twice": (
        lambda: gated(lambda m, x: (lambda gate: F.silu(gate) * F.linear(x, m.u) + gate)(F.linear(x, m.g))),
        "gated_linear",
        "linear is also read by add",
    ),
    "hidden_read_twice": (
        lambda: program(
            lambda m, x: (lambda h: F.linear(h, m.d) + h.sum())(F.gelu(F.linear(x, m.w))), normal(*X), **BLOCK
        ),
        "mlp",
        "linear_act is also read by sum_1",
    ),
    "hidden_of_a_gate_returned": (
        lambda: program(
            lambda m, x: (lambda h: (F.linear(h, m.d), h))(F.silu(F.linear(x, m.g)) * F.linear(x, m.w)),
            normal(*X),
            **BLOCK,
        ),
        "gated_mlp",
        "gated_linear is returned by the model",
    ),
    "quick_gelu_of_no_linear": (
        lambda: gated(lambda m, x: (lambda y: y * torch.sigmoid(1.702 * y))(x.exp())),
        "linear_quick_gelu",
        "expected aten.linear.default, found exp",
    ),
    "quick_gelu_read_twice": (
        lambda: gated(lambda m, x: (lambda y: y * torch.sigmoid(1.702 * y) + y)(F.linear(x, m.g))),
        "linear_quick_gelu",
        "linear is also read by add",
    ),
    "norm_weight_of_the_input": (
        lambda: program(lambda m, x, y, w: rms_norm(x + y, w, 1e-6), normal(*X), normal(*X), normal(8), dynamic=None),
        "add_rms_norm",
        "the weight is computed from the inputs",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    build, rule, reason = REFUSALS[case]
    _, result = rewritten(build(), Fuse())
    assert result.rewrites[rule] == 0
    assert any(reason in found for found in reasons(result, rule)), result.refusals


# --- what must survive -----------------------------------------------------------------------------------------


def test_sum_read_twice_is_kept_and_fused() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return F.layer_norm(total, (8,), m.w, m.b), total

    after, _ = check(program(forward, normal(*X), normal(*X), **NORM), Fuse())
    assert len(after.calls(add_layer_norm)) == 1
    assert not after.calls(torch.ops.aten.add.Tensor)


def test_a_sum_of_two_norms_is_fused_once() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return F.layer_norm(total, (8,), m.w, m.b) + F.layer_norm(total, (8,), m.b, m.w)

    after, _ = check(program(forward, normal(*X), normal(*X), **NORM), Fuse())
    assert len(after.calls(add_layer_norm)) == 1


def test_a_sum_read_before_its_norm_is_kept() -> None:
    """The norm's weight is computed after the sum is first read: it moves in front of the fused operator."""

    def forward(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        early = total.exp()
        return rms_norm(total, 1.0 + m.w.float(), 1e-6), early

    after, _ = check(program(forward, normal(*X), normal(*X), w=normal(8)), Fuse())
    assert len(after.calls(add_rms_norm)) == 1


def test_a_rule_that_did_not_fit_is_not_reported_where_another_did() -> None:
    _, result = check(activated("gelu_tanh"), Fuse())
    assert dict(result.rewrites) == {"linear_gelu_tanh": 1} and result.refusals == []


def test_packed_gates_are_cut_into_trainable_weights() -> None:
    after, _ = rewritten(gated(packed_gate), Fuse())
    assert {name: tuple(weight.shape) for name, weight in after.module.named_parameters()} == {
        "p_0": (6, 8),
        "p_6": (6, 8),
        "d_0": (6,),
        "d_6": (6,),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GATED)
def test_gated_half_precision_is_equal(name: str, dtype: torch.dtype) -> None:
    given = {"g": (6, 8), "u": (6, 8), "p": (12, 8), "c": (6,), "d": (12,)}
    weights = {key: normal(*size, dtype=dtype, seed=index) for index, (key, size) in enumerate(given.items())}
    after, _ = check(canonical(GATED[name], normal(*X, dtype=dtype), **weights), Fuse())
    assert len(after.calls(gated_linear)) == 1


def test_returned_linear_stays() -> None:
    after, _ = check(program(returned, normal(*X), w=normal(8, 8)), Fuse())
    assert len(after.calls(torch.ops.aten.linear.default)) == 1


def test_tied_weights_stay_one_node() -> None:
    tied = normal(8, 8)
    before = program(lambda m, x: F.relu(F.linear(F.relu(F.linear(x, m.a)), m.b)), normal(*X), a=tied, b=tied)
    after, result = check(before, Fuse())
    assert result.rewrites["linear_relu"] == 2
    assert len([node for node in after.graph.nodes if node.op == "get_attr"]) == 1


@pytest.mark.parametrize("function, target", [(normed, add_layer_norm), (rms_normed, add_rms_norm)])
def test_eps_survives(function: Callable[..., Tensor], target: Any) -> None:
    after, _ = rewritten(program(function, normal(*X), normal(*X), **NORM), Fuse())
    assert after.calls(target)[0].args[-1] == (1e-12 if function is normed else 1e-6)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(8, 8) for _ in range(6))
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        mixed = sdpa(*(split_heads(project(x)) for project in (self.q, self.k, self.v)))
        x = self.first(x + self.o(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


def test_all_of_12_layers_are_rewritten() -> None:
    torch.manual_seed(0)
    _, result = check(canonical(nn.Sequential(*(Layer() for _ in range(12))), normal(*X)), Fuse())
    expected = {"pack_projections": 12, "add_layer_norm": 24, "linear_gelu": 12, "mlp": 12}
    assert dict(result.rewrites) == expected


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4])
def test_budget_stops(budget: int) -> None:
    torch.manual_seed(0)
    _, result = rewritten(canonical(Layer(), normal(*X)), Fuse(), Context(max_rewrites=budget))
    assert result.changes == budget


@pytest.mark.parametrize("kind", ["nystrom", "performer", "lsh"])
def test_projections_of_any_attention_are_packed(kind: str) -> None:
    replaced, _ = rewritten(CASES["pack_projections"][0](), ReplaceAttention(kind))
    _, result = check(replaced, Fuse())
    assert dict(result.rewrites) == {"pack_projections": 1}


def test_trainable_weights_stay_trainable_when_packed() -> None:
    after, _ = rewritten(CASES["pack_projections"][0](), Fuse())
    assert [name for name, _ in after.module.named_parameters()] == ["q_packed"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_equal(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = canonical(Layer().to(dtype), normal(*X, dtype=dtype))
    _, result = check(before, Fuse())
    assert result.changes == 5


def test_pass_is_printed_by_its_name() -> None:
    assert [str(Fuse()), str(Canonicalize())] == ["fuse", "canonicalize"]
