"""Changes in place made functional while a graph is copied, views of the changed memory included."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import TraceError
from ..ir.graph import arguments, source_of


def functional(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, Any]) -> fx.Node:
    """The functional spelling of a change in place; later readers of the changed memory read the new value.

    before:  y = slice(x, 1, 0, 2);  y.copy_(z);  ... x ...
    after:   y = copy(slice(x, 1, 0, 2), z);  x1 = slice_scatter(x, y, 1, 0, 2);  ... x1 ...
    """
    changed = node.args[0]
    target: Any = node.target
    if not isinstance(changed, fx.Node) or not isinstance(copies[changed], fx.Node):
        raise TraceError(f"cannot make {target} functional{source_of(node)}")
    if target is torch.ops.aten.detach_.default:
        kept: fx.Node = copies[changed]
        return kept
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None) or getattr(packet, "default", None)  # floor_divide has one
    views = list(_views(changed))  # of the memory that changes, the changed one first, its owner last
    owned = views[-1].op == "call_function" or views[-1].meta.get("may_change")  # an input that is written back
    if not owned or overload is None or overload._schema.is_mutable:
        raise TraceError(_in_place("an input or a buffer", node))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: copies[used])
    result = graph.call_function(overload, args, kwargs)
    result.meta = dict(node.meta)
    before = changed.meta["val"].dtype
    if torch.result_type(before_value := changed.meta["val"], before_value) != before or _promotes(node, before):
        result.meta.pop("val", None)
        meta, result = result.meta, graph.call_function(torch.ops.aten.to.dtype, (result, before))
        result.meta = dict(meta)
    copies[changed] = result
    if not any(_is_read_later(whole, views, node, copies) for whole in views[1:]):
        views = views[:1]
    for view, whole in itertools.pairwise(views):
        copies[whole] = _write_back(view, whole, node, graph, copies)
    _look_again(views[-1], views, node, graph, copies)
    return result


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """A node and the tensors that it is a view of, one of the next, to the one that owns the memory."""
    viewed: fx.Node | None = node
    while viewed is not None:
        yield viewed
        viewed = alias_of(viewed)


def _in_place(what: str, node: fx.Node) -> str:
    return f"the model changes {what} in place{source_of(node)}; write it without {node.target}"


def _is_read_later(whole: fx.Node, views: Sequence[fx.Node], change: fx.Node, copies: dict[fx.Node, Any]) -> bool:
    """Whether what comes after a change reads the whole, or views of it other than `views`."""
    return any(
        user not in copies
        or (user not in views and alias_of(user) is whole and _is_read_later(user, views, change, copies))
        for user in whole.users
        if user is not change
    )


def _write_back(view: fx.Node, whole: fx.Node, change: fx.Node, graph: fx.Graph, copies: dict[fx.Node, Any]) -> fx.Node:
    """The whole with one view of it replaced by the view's new value."""
    aten, target, new = torch.ops.aten, view.target, copies[view]
    options = fx.node.map_arg((view.args[1:], view.kwargs), lambda used: copies[used])
    if is_change(view) or target in (aten.alias.default, aten.detach.default) or _stays(view):
        kept: fx.Node = new
        return kept
    if target in (aten.slice.Tensor, aten.select.int):
        scatter = aten.slice_scatter.default if target is aten.slice.Tensor else aten.select_scatter.default
        return graph.call_function(scatter, (copies[whole], new, *options[0]), options[1])
    if target is aten.diagonal.default:
        return graph.call_function(aten.diagonal_scatter.default, (copies[whole], new, *options[0]), options[1])
    if target is aten.transpose.int:
        return graph.call_function(aten.transpose.int, (new, *options[0]), options[1])
    if target is aten.permute.default:
        order: Any = options[0][0]
        axes = [axis % len(order) for axis in order]
        back = [axes.index(axis) for axis in range(len(axes))]
        return graph.call_function(aten.permute.default, (new, back), options[1])
    if target in (aten.t.default, aten.numpy_T.default):
        return graph.call_function(target, (new,))
    if target is aten.unsqueeze.default:
        return graph.call_function(aten.squeeze.dim, (new, *options[0]))
    if target in (aten.view.default, aten.squeeze.dim):
        return graph.call_function(aten.view_as.default, (new, copies[whole]))
    raise TraceError(_in_place(f"a view of a tensor ({getattr(target, '__name__', target)})", change))


def _look_again(
    whole: fx.Node, views: Sequence[fx.Node], change: fx.Node, graph: fx.Graph, copies: dict[fx.Node, Any]
) -> None:
    """Let the other views of changed memory, made before the change, see it."""
    for view in whole.users:
        if view not in copies or alias_of(view) is not whole or view is change:
            continue
        if view not in views and is_change(view):
            copies[view] = copies[whole]
        elif view not in views:
            if view.target in _PERHAPS_VIEWS and any(user not in copies for user in view.users if user is not change):
                raise TraceError(_in_place(f"a tensor of which {view.target} may be a view", change))
            copies[view] = graph.node_copy(view, lambda used: copies[used])
        _look_again(view, views, change, graph, copies)


# Copies where they must: whether they share memory depends on strides.
_PERHAPS_VIEWS = (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default, torch.ops.aten.flatten.using_ints)


def is_change(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _promotes(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether an argument of a change in place is of a wider kind than the tensor it changes."""
    for value in [*node.args[1:], *node.kwargs.values()]:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
            if value.meta["val"].dtype != dtype:
                return True
        elif isinstance(value, float) and not dtype.is_floating_point:
            return True
    return False


def alias_of(node: fx.Node) -> fx.Node | None:
    """The tensor that a node's value may share memory with, by its schema; a change in place gives what it changed."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0] if alias_of(node.args[0]) is not None else None  # a part of a split
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if is_change(node):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if _is_cast(node) and not _stays(node):
        return None
    schema = node.target._schema
    aliased = {name for item in schema.returns if item.alias_info for name in item.alias_info.before_set}
    for argument, value in zip(schema.arguments, node.args, strict=False):
        shared = argument.alias_info  # "*" after: a list of views, as split gives
        if shared and isinstance(value, fx.Node) and (aliased & shared.before_set or "*" in shared.after_set):
            return value if _same_dtype(value, node) else None  # a cast to another dtype is a copy
    return None


def _is_cast(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is torch.ops.aten.to


def _stays(node: fx.Node) -> bool:
    """Whether a cast gives the very tensor that it takes: nothing about it is another."""
    if not _is_cast(node) or not isinstance(node.args[0], fx.Node):
        return False
    given, made = arguments(node), node.meta["val"]
    taken = node.args[0].meta["val"]
    formats = (None, torch.preserve_format)
    same = taken.dtype == made.dtype and taken.device == made.device and given.get("memory_format") in formats
    return same and not given.get("copy", False)


def _same_dtype(first: fx.Node, second: fx.Node) -> bool:
    values = [node.meta.get("val") for node in (first, second)]
    return len({value.dtype for value in values if isinstance(value, Tensor)}) < 2
