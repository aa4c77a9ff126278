"""Canonicalize: every simplification and rule with its golden graph, and every refusal with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import assert_equal, before_after, check, inputs, normal, program, reasons, rewritten
from torch import Tensor

from fxpress.backends.onnx.export import OPSET, exportable
from fxpress.ir.graph import Program
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize

aten = torch.ops.aten
X = (2, 5, 8)


def reshapes(m: Any, x: Tensor) -> Tensor:
    batch, length = x.shape[:2]
    return x.view(batch, length, 2, 4).reshape(batch, length, 8).view(-1, 4)


def masks(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b = x > 0, y > 0
    return a.__and__(b), a.__or__(b), torch.max(x, y), torch.min(x, y)


def conv1d(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x.view(-1, x.size(-1)), m.w).view(*x.shape[:-1], m.w.shape[1])


def rms(m: Any, x: Tensor) -> Tensor:
    return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


SIMPLE: dict[str, Callable[..., Any]] = {
    "dropout": lambda m, x: F.dropout(x, 0.1, False).exp(),
    "dropout_p_0": lambda m, x: F.dropout(x, 0.0, True).exp(),
    "casts": lambda m, x: x.to(torch.float32).type_as(x).contiguous().clone().exp(),
    "cast_that_stays": lambda m, x: x.to(torch.float64).exp(),
    "expand": lambda m, x: x.expand(-1, -1, 8).exp(),
    "full_slice": lambda m, x: x[:, :].exp(),
    "cut_slice": lambda m, x: x[:, 1:].exp(),
    "reshape_chain": reshapes,
    "double_transpose": lambda m, x: x.transpose(1, 2).transpose(-1, -2).exp(),
    "two_different_transposes": lambda m, x: x.transpose(1, 2).transpose(0, 1),
    "permute": lambda m, x: x.permute(0, 2, 1).exp(),
    "permute_to_nothing": lambda m, x: x.permute(0, 1, 2).exp(),
    "permute_of_transpose": lambda m, x: x.transpose(1, 2).permute(1, 0, 2).exp(),
    "transpose_under_other_names": lambda m, x: (x.mT, x[0].t()),
    "flatten": lambda m, x: x.flatten(0, 1).exp(),
    "unflatten": lambda m, x: x.unflatten(-1, (2, 4)).exp(),
    "chunk": lambda m, x: x.chunk(2, -1)[1].exp(),
    "split": lambda m, x: x.split([3, 5], -1)[1] + x.split(5, -1)[0],
    "unbind": lambda m, x: x.unbind(-1)[3].exp(),
    "narrow": lambda m, x: x.narrow(-1, 2, 3).exp(),
    "repeat_of_one": lambda m, x: x[:, None].repeat(1, 3, 1, 1).exp(),
    "repeat_of_several": lambda m, x: x.repeat(1, 1, 2).exp(),
    "softmax_of_the_same_dtype": lambda m, x: x.softmax(-1, dtype=torch.float32),
    "softmax_of_another_dtype": lambda m, x: x.softmax(-1, dtype=torch.float64),
    "softmax_below_aten": lambda m, x: aten._softmax(x, -1, False),
    "bmm": lambda m, x: torch.bmm(x, x.mT),
    "baddbmm": lambda m, x: torch.baddbmm(x[:, :1, :1], x, x.mT, beta=0.5, alpha=2.0),
    "baddbmm_without_beta": lambda m, x: torch.baddbmm(x[:, :1, :1] * math.nan, x, x.mT, beta=0),
    "einsum_of_heads": lambda m, x: torch.einsum("bnd,bmd->bnm", x, x),
    "einsum_of_transposed_result": lambda m, x: torch.einsum("bnd,bmd->mbn", x, x),
    "einsum_of_groups": lambda m, x: torch.einsum("bgnd,bmd->bgnm", x[:, None].repeat(1, 2, 1, 1), x),
    "einsum_of_one": lambda m, x: torch.einsum("bnd->dbn", x),
    "einsum_that_sums_two_axes": lambda m, x: torch.einsum("bnd,bnd->b", x, x),
    "permute_of_three": lambda m, x: x.permute(2, 0, 1),
    "number_less_a_tensor": lambda m, x: 1.0 - x.exp(),
    "number_less_a_multiple": lambda m, x: torch.rsub(x, 3, alpha=2),
    "squares": lambda m, x: (x.pow(2), x.exp().square(), F.relu(x) * F.relu(x), x.pow(3), x.long().pow(2)),
    "reshape_as": lambda m, x: x.exp().reshape_as(x.mT) + x.mT.exp().reshape(-1).view_as(x.mT),
    "equal_calls": lambda m, x: x.exp() * x.exp() + x.relu(),
}
W, B = normal(8, 6), normal(6, seed=1)
CASES: dict[str, Callable[[], Program]] = {
    **{name: (lambda function=function: program(function, normal(*X))) for name, function in SIMPLE.items()},
    "masks_and_extremes": lambda: program(masks, normal(*X), normal(*X, seed=1)),
    "conv1d": lambda: program(conv1d, normal(*X), w=W, b=B),
    "rms_norm": lambda: program(rms, normal(*X), w=normal(8)),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str, golden: Callable[[str], None]) -> None:
    before = CASES[case]()
    after, result = check(before, Canonicalize())
    golden(before_after(before, after, result))


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_introduced_is_translated_by_torch(case: str) -> None:
    """Else the exporter would decompose the whole program once more, which takes half of its time."""
    known = exportable(OPSET)
    before = CASES[case]()
    after, _ = rewritten(before, Canonicalize())
    calls = [{node.target for node in found.graph.nodes if node.op == "call_function"} for found in (before, after)]
    introduced = {target for target in calls[1] - calls[0] if getattr(target, "namespace", "") == "aten"}
    assert [str(target) for target in introduced if not known(target)] == []


# --- refusals --------------------------------------------------------------------------------------------------


def conv1d_tied(m: Any, x: Tensor) -> Tensor:
    return conv1d(m, x) + m.w.sum()


def conv1d_other_shape(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x.view(-1, 8), m.w).view(x.shape[0], x.shape[1], 2, 3)


REFUSALS: dict[str, tuple[Callable[[], Program], str, str]] = {
    "conv1d_tied": (
        lambda: program(conv1d_tied, normal(*X), w=W, b=B),
        "conv1d",
        "weight w is read by 2 nodes; a transposed copy would untie it",
    ),
    "conv1d_shape": (
        lambda: program(conv1d_other_shape, normal(*X), w=W, b=B),
        "conv1d",
        "the result's last axis is not that of the weight",
    ),
    "conv1d_bias": (
        lambda: program(
            lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w).view(2, 3, 6),
            normal(2, 3, 4),
            dynamic=None,
            w=normal(4, 6),
            b=normal(6, 6),
        ),
        "conv1d",
        "a bias of shape [6, 6] is none of a linear layer",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    build, rule, reason = REFUSALS[case]
    _, result = rewritten(build(), Canonicalize())
    assert result.rewrites[rule] == 0
    assert any(reason in found for found in reasons(result, rule)), result.refusals


# --- what must survive -----------------------------------------------------------------------------------------


def test_training_dropout_stays() -> None:
    after, _ = rewritten(program(lambda m, x: F.dropout(x, 0.1, True), normal(*X)), Canonicalize())
    assert len(after.calls(aten.dropout.default)) == 1


@pytest.mark.parametrize("of_input", [True, False], ids=["input", "weight"])
def test_gradients_end_at_a_detach(of_input: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x * m.w
        return y * (2 * y).detach()

    before = program(forward, normal(*X), w=torch.nn.Parameter(normal(8)))
    after, _ = check(before, Canonicalize())
    x = normal(*X).requires_grad_(of_input)
    found = []
    for each in (before, after):
        (weight,) = each.module.parameters()
        found.append(torch.autograd.grad(each.run([x])[0].sum(), x if of_input else weight)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "detached",
    [
        lambda m, x: (m.table[:5, None] * 2).detach() + x,
        lambda m, x: (x.long().float() * 2).detach() + x,
        lambda m, x: torch.arange(x.shape[1]).float().detach()[:, None] + x,
        lambda m, x: (x > 0).float().detach() + x,
    ],
    ids=["fixed_table", "integers", "places", "condition"],
)
def test_a_detach_goes_where_no_gradient_arrives(detached: Any) -> None:
    fixed = torch.nn.Parameter(normal(9), requires_grad=False)
    after, _ = check(program(detached, normal(*X), table=fixed), Canonicalize())
    assert not after.calls(aten.detach.default)


def test_one_detach_of_two_is_enough() -> None:
    after, _ = check(program(lambda m, x: x.exp().detach().sin().detach() + x, normal(*X)), Canonicalize())
    assert len(after.calls(aten.detach.default)) == 1


def test_random_calls_are_not_shared() -> None:
    before = program(lambda m, x: torch.rand_like(x) - torch.rand_like(x), normal(*X))
    after, _ = rewritten(before, Canonicalize())
    assert len(after.calls(aten.rand_like.default)) == 2


def test_calls_with_other_options_are_not_shared() -> None:
    before = program(lambda m, x: x.softmax(1) + x.softmax(2) + x.mul(1) + x.mul(1.0), normal(*X))
    _after, result = check(before, Canonicalize())
    assert result.changes == 0


def test_returned_input_stays_a_program() -> None:
    after, _ = check(program(lambda m, x: x.expand(-1, -1, 8), normal(*X)), Canonicalize())
    assert not [node for node in after.graph.nodes if node.op == "call_function"]


def test_a_reshape_that_is_read_twice_stays_for_the_other_reader() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.view(-1, 8)
        return flat.exp(), flat.view(-1, 4)

    after, _ = check(program(forward, normal(*X)), Canonicalize())
    assert [node.args[0].op for node in after.calls(aten.reshape.default)] == ["placeholder"] * 2


def test_tied_weights_stay_one_node() -> None:
    tied = normal(8, 8)
    before = program(lambda m, x: F.linear(F.linear(x, m.a).exp(), m.b), normal(*X), a=tied, b=tied)
    after, _ = check(before, Canonicalize())
    assert len([node for node in after.graph.nodes if node.op == "get_attr"]) == 1


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
def test_budget_stops(budget: int) -> None:
    before = program(lambda m, x: rms(m, F.dropout(x, 0.1, False)) + x[:].float(), normal(*X), w=normal(8))
    after, result = rewritten(before, Canonicalize(), Context(max_rewrites=budget))
    assert result.changes == budget
    assert_equal(before, after, inputs(before))


def test_budget_stops_before_equal_calls() -> None:
    before = program(SIMPLE["equal_calls"], normal(*X))
    _, result = rewritten(before, Canonicalize(), Context(max_rewrites=0))
    assert result.changes == 0


def test_parts_of_a_weight_that_is_read_in_parts_alone_are_weights() -> None:
    before = program(lambda m, x: (F.linear(x, m.w[:8]), F.linear(x, m.w[8:])), normal(2, 4), w=normal(12, 4))
    after, _ = check(before, Canonicalize())
    assert not after.calls(aten.slice.Tensor)
    assert {tuple(weight.shape) for weight in after.module.parameters()} == {(8, 4), (4, 4)}


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: (F.linear(x, m.w[:8]), F.linear(x, m.w)),
        lambda m, x: (F.linear(x, m.w[:8]), F.linear(x, m.w[4:])),
        lambda m, x: (F.linear(x, m.w[:4]), F.linear(x, m.w[8:])),
        lambda m, x: (F.linear(x, m.w[:8]), F.linear(x, m.w[8::2])),
    ],
    ids=["whole", "overlapping", "with_a_gap", "every_second"],
)
def test_parts_of_a_weight_that_something_else_needs_stay_slices(read: Any) -> None:
    after, _ = check(program(read, normal(2, 4), w=normal(12, 4)), Canonicalize())
    assert [tuple(weight.shape) for weight in after.module.parameters()] == [(12, 4)]


def test_a_part_whose_size_depends_on_data_is_joined() -> None:
    before = program(lambda m, x: torch.cat([(x > 0).nonzero().flatten(), (x > 1).nonzero().flatten()]), normal(2, 4))
    after, _ = check(before, Canonicalize())
    assert len(after.calls(aten.cat.default)) == 1
