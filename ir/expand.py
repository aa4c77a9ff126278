"""Operators written as those that they are made of: fused linear layers, and any of ours by its reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import RewriteError
from .graph import Program, arguments, shape
from .ops.linear import ATEN_ACTIVATIONS, gated_linear, linear_act, mlp, split_linear
from .ops.table import OPERATORS

aten = torch.ops.aten


def slices(program: Program) -> None:
    """Write the parts of every split as slices.

    before:  %parts = aten.split_with_sizes(%x, [8, 8], -1);  %b = operator.getitem(%parts, 1)
    after:   %b = aten.slice(%x, -1, 8, 16)
    """
    for node in program.calls(aten.split_with_sizes.default):
        given = arguments(node)
        ends = list(accumulate(given["split_sizes"]))
        axis = given["dim"] % len(shape(given["self"]))
        for part in list(node.users):
            place: Any = part.args[1]
            start = ends[place] - given["split_sizes"][place]
            new = program.call(aten.slice.Tensor, given["self"], axis, start, ends[place], before=part)
            program.replace(part, new)
    program.clean()


def expand(program: Program) -> int:
    """Write every fused linear layer as plain ones. How many there were.

    before:  %y = fxpress.mlp(%x, @up, @b, @down, @c, 'gelu')
    after:   %h = aten.gelu(aten.linear(%x, @up, @b));  %y = aten.linear(%h, @down, @c)
    """
    nodes = program.calls(linear_act, gated_linear, mlp, split_linear)
    for node in nodes:
        given = arguments(node)
        if node.target is split_linear:
            whole = _linear(program, node, given["input"], given["weight"], given["bias"])
            new = program.call(aten.split_with_sizes.default, whole, given["sizes"], -1, before=node)
        elif node.target is mlp:
            new = _linear(program, node, _hidden(program, node, given), given["down_weight"], given["down_bias"])
        else:
            new = _hidden(program, node, given)
        program.replace(node, new)
    return len(nodes)


def inline(program: Program, node: fx.Node, function: Callable[..., Any] | None = None) -> list[fx.Node]:
    """Write a call of one of our operators as what its reference calls, one of ATen's as PyTorch does. The new nodes.

    Args:
        function: what is traced, if not the reference: it takes the operator's arguments and computes the same.

    Raises:
        RewriteError: the reference changes a tensor, which a program cannot say.

    before:  %y = fxpress.pool_tokens(%x, %mask)
    after:   the ATen operators that the reference runs, `sum`, `div`, `cat`, ...
    """
    target: Any = node.target
    traced_as = function or (OPERATORS[target].reference if target in OPERATORS else target)
    nodes = list(node.all_input_nodes)

    def run(*values: Any) -> Any:
        known = dict(zip(nodes, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        return traced_as(*args, **kwargs)

    with program.fake_mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(run, pre_dispatch=target in OPERATORS)(*[used.meta["val"] for used in nodes])
    inside: dict[fx.Node, Any] = {}
    given = iter(nodes)
    for old in traced.graph.nodes:
        if old.op == "placeholder":
            inside[old] = next(given)
        elif old.op == "get_attr":
            inside[old] = program.add_weight(node.name, getattr(traced, str(old.target)), trainable=False)
        elif old.op == "call_function":
            if isinstance(old.target, torch._ops.OpOverload) and old.target._schema.is_mutable:
                raise RewriteError(f"the reference of {node.target} changes a tensor in place ({old.target})")
            args, kwargs = fx.node.map_arg((old.args, old.kwargs), inside.__getitem__)
            inside[old] = program.call(old.target, *args, before=node, **kwargs)
        else:
            results = fx.node.map_arg(old.args[0], inside.__getitem__)
    if isinstance(results, fx.Node):
        program.replace(node, results)
    else:
        for part in list(node.users):
            program.replace(part, results[part.args[1]])
    return [new for new in inside.values() if new not in nodes]


def _linear(program: Program, node: fx.Node, x: Any, weight: Any, bias: Any) -> fx.Node:
    return program.call(aten.linear.default, x, weight, bias, before=node)


def _hidden(program: Program, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """What a `linear_act`, a `gated_linear`, or the first half of an `mlp` gives."""
    gated = given.get("gate_weight") is not None
    first = "gate_" if gated else "" if node.target is linear_act else "up_"
    x = given["input"]
    activated = _activation(
        program, node, _linear(program, node, x, given[f"{first}weight"], given[f"{first}bias"]), given["activation"]
    )
    if not gated:
        return activated
    up = _linear(program, node, x, given["up_weight"], given["up_bias"])
    return program.call(aten.mul.Tensor, activated, up, before=node)


def _activation(program: Program, node: fx.Node, x: fx.Node, name: str) -> fx.Node:
    if name == "quick_gelu":
        gate = program.call(aten.sigmoid.default, program.call(aten.mul.Tensor, x, 1.702, before=node), before=node)
        return program.call(aten.mul.Tensor, x, gate, before=node)
    target, options = ATEN_ACTIVATIONS[name]
    return program.call(target, x, before=node, **options)
