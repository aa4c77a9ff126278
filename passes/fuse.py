"""Fuse: several operators become one that backends have faster kernels for. Exact."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir import pattern as p
from ..ir.graph import Program, arguments, dtype, same_sizes, shape
from ..ir.ops.linear import ATEN_ACTIVATIONS, gated_linear, linear_act, mlp, split_linear
from ..ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from ..ir.ops.rotary import rotary
from ..ir.ops.table import taking
from ..ir.pattern import Match, Refusal, Rule
from ..ir.rewrite import Applied, Context, Pass, PassResult, apply_rules
from ..ir.spellings.activation import QUICK_GELU, find
from ..ir.spellings.pieces import Piece, piece

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse the linears that feed an attention, residual additions with norms, linears with activations.

    before:  %add = aten.add.Tensor(%x, %residual);  %y = aten.layer_norm(%add, [64], @weight, @bias, 1e-12)
    after:   %y, %add = fxpress.add_layer_norm(%x, %residual, @weight, @bias, 1e-12)

    before:  %y = aten.gelu(aten.linear(%x, @weight, @bias))
    after:   %y = fxpress.linear_act(%x, @weight, @bias, 'gelu')

    before:  %y = aten.mul.Tensor(aten.silu(aten.linear(%x, @gate)), aten.linear(%x, @up))
    after:   %y = fxpress.gated_linear(%x, @gate, @up, None, None, 'silu')

    before:  %y = aten.linear(fxpress.linear_act(%x, @up, @up_bias, 'gelu'), @down, @down_bias)
    after:   %y = fxpress.mlp(%x, @up, @up_bias, @down, @down_bias, 'gelu')

    before:  %q = aten.linear(%x, @q);  %k = aten.linear(%x, @k);  %v = aten.linear(%x, @v)
    after:   %q, %k, %v = fxpress.split_linear(%x, @qkv, None, [n, n, n])
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        _pack_projections(program, context, result)
        for rules in ((GATED_LINEAR,), (ADD_LAYER_NORM, ADD_RMS_NORM, *LINEAR_ACT), (MLP, GATED_MLP)):
            rest = apply_rules(program, rules, context)
            result.rewrites += rest.rewrites
            result.matches += rest.matches
            result.refusals += rest.refusals
        program.clean()
        return result


# --- linears that read the same input for one attention --------------------------------------------------------

_PER_ELEMENT = {
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.expand.default,
    aten.mul.Tensor, aten.add.Tensor, aten.neg.default, aten.cat.default, aten.slice.Tensor, aten.select.int,
    rotary, rms_norm,
}  # fmt: skip


def _pack_projections(program: Program, context: Context, result: PassResult) -> None:
    """Replace the query, key and value linears that read one input by one matmul, cut in parts."""
    for node in program.calls(*taking("query", "key", "value")):
        given = arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        found = list(dict.fromkeys(linear for item in operands for linear in _linears_behind(item)))
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
                names = ", ".join(linear.name for linear in linears)
                _pack(program, source, linears)
                result.rewrites["pack_projections"] += 1
                result.matches.append(Applied("pack_projections", linears[0].name, f"{names} read {source.name}"))


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
    if not dtype(x) == dtype(residual) == dtype(total):
        return Refusal(f"the operands of {total.name} differ in dtype")
    for name in ("weight", "bias"):
        if isinstance(found.get(name), fx.Node) and not _is_constant(found[name]):
            return Refusal(f"the {name} is computed from the inputs")
    return True


def _is_constant(node: fx.Node) -> bool:
    """Whether a value depends on weights alone, as Gemma's 1 + weight does."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return all(map(_is_constant, node.all_input_nodes))


def _hoist(node: Any, before: fx.Node) -> None:
    """Move a constant and what it is computed from in front of a node."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        before.prepend(node)
        for used in node.all_input_nodes:
            _hoist(used, node)


def _add_layer_norm_condition(found: Match) -> Any:
    if len(found["axes"]) != 1:
        return Refusal(f"the norm is over {len(found['axes'])} axes")
    return _add_condition(found)


def _replace_both(program: Program, found: Match, fused_op: Any, *options: Any) -> None:
    total = found["sum"]
    for option in options:
        _hoist(option, total)
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
        weight=p.Any("weight"),
        bias=p.Any("bias"),
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
    p.Call(rms_norm, input=_add(), weight=p.Any("weight"), eps=p.Literal("eps")),
    _add_condition,
    lambda program, found, _: _replace_both(program, found, add_rms_norm, found["weight"], found["eps"]),
)


# --- linear and activation -------------------------------------------------------------------------------------


def _linear_act_rule(name: str, pattern: Any) -> Rule:
    def replace(program: Program, found: Match, _: Any) -> None:
        new = program.call(linear_act, found["x"], found["weight"], found["bias"], name, before=found.root)
        program.replace(found.root, new)

    return Rule(f"linear_{name}", pattern, lambda _: True, replace)


def _activated_linear(target: Any, options: dict[str, Any]) -> p.Call:
    linear = p.Call(aten.linear.default, input=p.Any("x"), weight=p.Weight("weight"), bias=p.Any("bias"))
    return p.Call(target, self=linear, **options)


def _quick_gelu_linear(node: fx.Node) -> Match | Refusal | None:
    """x * sigmoid(1.702 x) of a linear layer x, at the sigmoid: torch has no operator for this activation."""
    found = find(QUICK_GELU, node)
    if not isinstance(found, Match):
        return None  # a sigmoid of another kind
    linear: Any = found["x"]
    if linear.target is not aten.linear.default:
        return Refusal(f"expected aten.linear.default, found {linear.name}")
    nodes = found.nodes | {linear}
    leaked = p.leak(nodes, found.root)
    if leaked:
        return Refusal(leaked)
    given = arguments(linear)
    return Match(found.root, {"x": given["input"], "weight": given["weight"], "bias": given["bias"]}, nodes)


LINEAR_ACT = (
    *(_linear_act_rule(name, _activated_linear(*activation)) for name, activation in ATEN_ACTIVATIONS.items()),
    _linear_act_rule("quick_gelu", _quick_gelu_linear),
)


# --- gated linear units ----------------------------------------------------------------------------------------


def _activation_name(node: Any) -> str | None:
    for name, (target, options) in ATEN_ACTIVATIONS.items():
        if isinstance(node, fx.Node) and node.target is target:
            given = {"approximate": "none", **arguments(node), "self": None}
            if given == {"approximate": "none", **options, "self": None}:
                return name
    return None


def _gated(node: fx.Node) -> Match | Refusal | None:
    """activation(gate) * up, where gate and up are two linears or the halves of one."""
    if node.target is not aten.mul.Tensor:
        return None
    first: Any = node.args[0]
    second: Any = node.args[1]
    for activated, value in ((first, second), (second, first)):
        name = _activation_name(activated)
        gate, up = (piece(activated.args[0]), piece(value)) if name else (None, None)
        if gate is None or up is None or {gate.source.target, up.source.target} != {aten.linear.default}:
            continue
        if gate.source is up.source and not (gate.nodes or up.nodes):
            continue  # the activation of a value times that value is no gate
        reason = _not_gated(gate, up)
        nodes = frozenset((node, activated, gate.source, up.source)) | gate.nodes | up.nodes
        reason = reason or p.leak(nodes, node)
        return Refusal(reason) if reason else Match(node, {"gate": gate, "up": up, "activation": name}, nodes)
    return None


def _not_gated(gate: Piece, up: Piece) -> str | None:
    first, second = arguments(gate.source), arguments(up.source)
    if first["input"] is not second["input"]:
        return f"{gate.source.name} and {up.source.name} read different inputs"
    if gate.width != up.width:
        return "gate and up projection differ in size"
    for weight in (first["weight"], second["weight"], first["bias"], second["bias"]):
        if weight is not None and weight.op != "get_attr":
            return f"{weight.name} is no weight"
    if gate.source is not up.source:
        whole = all(item.width == shape(item.source)[-1] for item in (gate, up))
        return None if whole else "gate and up projection are parts of different linears"
    if sorted((gate.start, up.start)) != [0, gate.width] or {gate.step, up.step} != {1}:
        return f"gate and up projection are not the halves of {gate.source.name}"
    tied = [item for item in (first["weight"], first["bias"]) if item is not None and len(item.users) > 1]
    return f"weight {tied[0].target} is tied: {len(tied[0].users)} nodes read it" if tied else None


def _gated_replace(program: Program, found: Match, _: Any) -> None:
    pieces: Any = (found["gate"], found["up"])
    weights = [_rows(program, item, "weight") for item in pieces] + [_rows(program, item, "bias") for item in pieces]
    source = arguments(pieces[0].source)["input"]
    program.replace(found.root, program.call(gated_linear, source, *weights, found["activation"], before=found.root))


def _rows(program: Program, part: Piece, name: str) -> fx.Node | None:
    """The weight or bias of a linear, or the rows of it that give a piece, as a weight of their own."""
    stored: fx.Node | None = arguments(part.source)[name]
    if stored is None or part.source.target is not aten.linear.default or not part.nodes:
        return stored
    tensor = program.tensor(stored)
    label = f"{stored.target}_{part.start}"
    return program.add_weight(label, tensor.detach()[part.start : part.stop], trainable=tensor.requires_grad)


GATED_LINEAR = Rule("gated_linear", _gated, lambda _: True, _gated_replace)


# --- feed-forward blocks ---------------------------------------------------------------------------------------


def _down(hidden: p.Call) -> p.Call:
    """The second linear layer of a block, on the hidden values of the first."""
    return p.Call(aten.linear.default, input=hidden, weight=p.Any("down_weight"), bias=p.Any("down_bias"))


def _mlp_replace(program: Program, found: Match, _: Any) -> None:
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "activation")
    gate = [found[name] for name in ("gate_weight", "gate_bias") if found.get(name) is not None]
    program.replace(found.root, program.call(mlp, *map(found.__getitem__, names), *gate, before=found.root))


MLP = Rule(
    "mlp",
    _down(p.Call(
        linear_act, anchor=True,
        input=p.Any("x"), weight=p.Any("up_weight"), bias=p.Any("up_bias"), activation=p.Literal("activation"),
    )),
    lambda _: True,
    _mlp_replace,
)  # fmt: skip
GATED_MLP = Rule(
    "gated_mlp",
    _down(p.Call(
        gated_linear, anchor=True,
        input=p.Any("x"), gate_weight=p.Any("gate_weight"), up_weight=p.Any("up_weight"),
        gate_bias=p.Any("gate_bias"), up_bias=p.Any("up_bias"), activation=p.Literal("activation"),
    )),
    lambda _: True,
    _mlp_replace,
)  # fmt: skip
