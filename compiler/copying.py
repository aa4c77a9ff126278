"""From torch.export's graph to one of a Program: weights once, changes in place as new values, contexts inlined."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.errors import TraceError
from ..ir.graph import attribute, identifier, source_of
from .inplace import functional, is_change


def copy_weights(source: fx.GraphModule, module: torch.nn.Module, graph: fx.Graph, copies: dict[fx.Node, Any]) -> None:
    """Copy weights under safe names, once each: tied weights (the same object) become one node."""
    known: dict[int, fx.Node] = {}
    taken: set[str] = set()
    for node in source.graph.nodes:
        if node.op != "get_attr":
            continue
        weight = attribute(source, str(node.target))
        if id(weight) not in known:
            name = identifier(str(node.target))
            while name in taken:
                name += "_"
            taken.add(name)
            _store(module, name, weight)
            known[id(weight)] = graph.get_attr(name)
            known[id(weight)].meta = dict(node.meta)
        copies[node] = known[id(weight)]


def _store(module: torch.nn.Module, path: str, weight: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
    if isinstance(weight, torch.nn.Parameter):
        module.register_parameter(leaf, torch.nn.Parameter(weight.detach().clone(), weight.requires_grad))
    elif isinstance(weight, Tensor):
        module.register_buffer(leaf, weight.detach().clone())
    else:
        setattr(module, leaf, weight)  # a branch of a control-flow operator


_DROPPED = ("_assert_", "_assert", "sym_constrain_range", "_guards_fn")


def copy_calls(source: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, Any]) -> None:
    """Copy everything but weights: checks are dropped, changes in place become new values, contexts are inlined."""
    for node in source.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(tuple(node.args[0]), lambda used: copies[used]))
        elif not _is_dropped(node):
            copies[node] = _copied(node, source, graph, copies)


def _is_dropped(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    return node.op == "get_attr" or (not node.users and any(part in name for part in _DROPPED))


def _copied(node: fx.Node, owner: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, Any]) -> Any:
    """A call of an owner's graph, in the new graph; a number where it is a size that torch fixed later in its trace."""
    value: Any = node.meta.get("val")
    given: Any = node.args
    if node.op == "call_function" and isinstance(value, int | torch.SymInt) and str(value).isdigit():
        return int(value)
    inlined = _without_effect(node, owner)
    if inlined is not None:
        return _inline(*inlined, graph, copies)
    if node.target is operator.getitem and isinstance(copies[given[0]], tuple | list):
        return copies[given[0]][given[1]]  # of an inlined body's outputs
    if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
        raise TraceError(
            f"torch.vmap, which flex_attention uses too, leaves calls that cannot be replayed{source_of(node)}; "
            "write it by broadcasting, attention by scaled_dot_product_attention with a mask"
        )
    if is_change(node):
        return functional(node, graph, copies)
    found = graph.node_copy(node, lambda used: copies[used])
    if node.op == "placeholder":
        found.args = ()  # no defaults: a Program is called with every input
    return found


def _without_effect(node: fx.Node, owner: fx.GraphModule) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """The body and the arguments of a context that changes no value: grad modes; autocast off, or of other devices."""
    given: Any = node.args
    name = node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
    if "set_grad_enabled" in name:
        return attribute(owner, given[1].target), given[2:]
    if "wrap_with_autocast" not in name:
        return None
    device, _, enabled, _, body, *operands = given
    body = attribute(owner, body.target)
    values = pytree.tree_leaves([inner.meta.get("val") for inner in body.graph.nodes])
    if enabled and any(isinstance(value, Tensor) and value.device.type == device for value in values):
        return None
    return body, operands


def _inline(body: fx.GraphModule, args: Sequence[Any], graph: fx.Graph, copies: dict[fx.Node, Any]) -> Any:
    """Copy a submodule's graph in place of its call; gives its output values."""
    placeholders = body.graph.find_nodes(op="placeholder")
    for placeholder, value in zip(placeholders, args, strict=True):
        copies[placeholder] = fx.node.map_arg(value, lambda used: copies[used])
    for node in body.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda used: copies[used])
        if node.op != "placeholder" and not _is_dropped(node):
            copies[node] = _copied(node, body, graph, copies)
    raise TraceError("a nested graph has no output")
