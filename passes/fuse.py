"""Fuse: several operators become one that backends have faster kernels for. Exact."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir import pattern as p
from ..ir.graph import Program, dtype, same_sizes, shape
from ..ir.ops.attention import attention
from ..ir.ops.linear import linear_act, split_linear
from ..ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from ..ir.pattern import Match, Refusal, Rule
from ..ir.rewrite import Context, Pass, PassResult, apply_rules

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse the linears that feed an attention, residual additions with norms, linears with activations.

    before:  %add = aten.add.Tensor(%x, %residual);  %y = aten.layer_norm(%add, [64], @weight, @bias, 1e-12)
    after:   %y, %add = fxpress.add_layer_norm(%x, %residual, @weight, @bias, 1e-12)

    before:  %y = aten.gelu(aten.linear(%x, @weight, @bias))
    after:   %y = fxpress.linear_act(%x, @weight, @bias, 'gelu')

    before:  %q = aten.linear(%x, @q);  %k = aten.linear(%x, @k);  %v = aten.linear(%x, @v)
    after:   %q, %k, %v = fxpress.split_linear(%x, @qkv, None, [n, n, n])
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        _pack_projections(program, context, result)
        rest = apply_rules(program, (ADD_LAYER_NORM, ADD_RMS_NORM, *LINEAR_ACT), context)
        result.rewrites += rest.rewrites
        result.refusals += rest.refusals
        program.clean()
        return result


# --- linears that read the same input for one attention --------------------------------------------------------

_PER_ELEMENT = {
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.expand.default,
    aten.mul.Tensor, aten.add.Tensor, aten.neg.default, aten.cat.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip


def _pack_projections(program: Program, context: Context, result: PassResult) -> None:
    """Replace the query, key and value linears that read one input by one matmul, cut in parts."""
    for node in program.calls(attention):
        found = list(dict.fromkeys(linear for item in node.args[:3] for linear in _linears_behind(item)))
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for linear in found:
            by_input.setdefault(linear.args[0], []).append(linear)  # type: ignore[arg-type]
        for source, linears in by_input.items():
            if len(linears) < 2:
                continue
            reason = _cannot_pack(linears)
            if reason:
                result.refusals.append(Refusal(reason, "pack_projections", linears[0].name))
            elif context.take():
                _pack(program, source, linears)
                result.rewrites["pack_projections"] += 1


def _linears_behind(value: Any) -> Iterator[fx.Node]:
    """The linears that a value is made of by reshaping, rotating and the like."""
    seen, waiting = set(), [value]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            yield node
        elif node.target in _PER_ELEMENT:
            waiting += reversed(node.all_input_nodes)


def _cannot_pack(linears: list[fx.Node]) -> str | None:
    for linear in linears:
        for place, weight in enumerate(linear.args[1:]):
            if not isinstance(weight, fx.Node) or weight.op != "get_attr":
                return f"an operand of {linear.name} is no weight"
            if place == 1 and not same_sizes(shape(weight), shape(linear)[-1:]):
                return f"bias {weight.target} of shape {list(shape(weight))} broadcasts"
            if len(weight.users) > 1:
                return f"weight {weight.target} is tied: {len(weight.users)} nodes read it"
    if len({len(linear.args) for linear in linears}) > 1:
        return "some of the linears have a bias, some have none"
    if len({dtype(linear.args[1]) for linear in linears}) > 1:
        return "the weights differ in dtype"
    return None


def _pack(program: Program, source: fx.Node, linears: list[fx.Node]) -> None:
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    first = min(linears, key=order.__getitem__)
    packed: list[Any] = []
    for place in range(1, len(first.args)):
        nodes: list[Any] = [linear.args[place] for linear in linears]
        tensors = [program.tensor(node) for node in nodes]
        packed.append(
            program.add_weight(
                f"{nodes[0].target}_packed",
                torch.cat([tensor.detach() for tensor in tensors]),
                trainable=any(tensor.requires_grad for tensor in tensors),
            )
        )
    weight, bias = packed if len(packed) == 2 else (packed[0], None)
    sizes = [shape(linear)[-1] for linear in linears]
    split = program.call(split_linear, source, weight, bias, sizes, before=first)
    parts = [
        program.call(operator.getitem, split, index, before=first, like=linear) for index, linear in enumerate(linears)
    ]
    for linear, part in zip(linears, parts, strict=True):
        program.replace(linear, part)


# --- residual addition and norm --------------------------------------------------------------------------------


def _add() -> p.Call:
    return p.Call(aten.add.Tensor, name="sum", shared=True, self=p.Any("x"), other=p.Any("residual"))


def _add_condition(found: Match) -> Any:
    x, residual, total = found["x"], found["residual"], found["sum"]
    if not (isinstance(x, fx.Node) and isinstance(residual, fx.Node)):
        return Refusal("a number is added, no residual")
    if not (same_sizes(shape(x), shape(total)) and same_sizes(shape(residual), shape(total))):
        return Refusal(f"the operands of {total.name} broadcast")
    if not dtype(x) == dtype(residual) == dtype(total) == dtype(found["weight"]):
        return Refusal(f"the operands of {total.name} differ in dtype")
    return True


def _add_layer_norm_condition(found: Match) -> Any:
    if len(found["axes"]) != 1:
        return Refusal(f"the norm is over {len(found['axes'])} axes")
    return _add_condition(found)


def _replace_both(program: Program, found: Match, fused_op: Any, *options: Any) -> None:
    total = found["sum"]
    fused = program.call(fused_op, found["x"], found["residual"], *options, before=total, like=found.root)
    norm = program.call(operator.getitem, fused, 0, before=total, like=found.root)
    program.replace(found.root, norm)
    if total.users:
        program.replace(total, program.call(operator.getitem, fused, 1, before=total))
    else:
        program.graph.erase_node(total)


ADD_LAYER_NORM = Rule(
    "add_layer_norm",
    p.Call(
        aten.layer_norm.default,
        input=_add(),
        normalized_shape=p.Literal("axes"),
        weight=p.Weight("weight"),
        bias=p.Weight("bias"),
        eps=p.Literal("eps"),
        cudnn_enable=p.Literal("cudnn"),
    ),
    _add_layer_norm_condition,
    lambda program, found, _: _replace_both(
        program, found, add_layer_norm, found["weight"], found["bias"], found["eps"]
    ),
)
ADD_RMS_NORM = Rule(
    "add_rms_norm",
    p.Call(rms_norm, input=_add(), weight=p.Weight("weight"), eps=p.Literal("eps")),
    _add_condition,
    lambda program, found, _: _replace_both(program, found, add_rms_norm, found["weight"], found["eps"]),
)


# --- linear and activation -------------------------------------------------------------------------------------


def _linear_act_rule(name: str, target: Any, **options: Any) -> Rule:
    linear = p.Call(aten.linear.default, input=p.Any("x"), weight=p.Weight("weight"), bias=p.Any("bias"))

    def replace(program: Program, found: Match, _: Any) -> None:
        new = program.call(linear_act, found["x"], found["weight"], found["bias"], name, before=found.root)
        program.replace(found.root, new)

    return Rule(f"linear_{name}", p.Call(target, self=linear, **options), lambda _: True, replace)


LINEAR_ACT = (
    _linear_act_rule("gelu", aten.gelu.default),
    _linear_act_rule("gelu_tanh", aten.gelu.default, approximate="tanh"),
    _linear_act_rule("relu", aten.relu.default),
    _linear_act_rule("silu", aten.silu.default),
    _linear_act_rule("tanh", aten.tanh.default),
)
