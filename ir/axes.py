"""Axes: along which axes a call computes each index by itself, and where they are in its operands.

`carried` says of a call and each of its operands which axis of the operand is which of the result, such that the
result at an index there depends on the operand at that index alone. Axes that a call mixes, or makes, have none; nor
has an operand that it broadcasts along them. Operators that are not known here carry nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .graph import arguments, same_sizes, shape
from .ops import float8, linear, norm, quantize, rotary

aten = torch.ops.aten
Carried = list[int | None]  # for each axis of an operand, the axis of the result; None: mixed, cut or broadcast


def carried(node: fx.Node) -> dict[fx.Node, Carried]:
    """The operands of a call that carry axes to its result, or to each of its results."""
    if node.op != "call_function":
        return {}
    target: Any = node.target
    if target in _RULES:
        return _RULES[target](node)
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    drawn = torch.Tag.nondeterministic_seeded in tags
    return _by_element(node) if torch.Tag.pointwise in tags and not drawn else {}


def rank(node: fx.Node) -> int:
    """How many axes a call's result has, or each of its results."""
    value = node.meta["val"]
    return (value if isinstance(value, Tensor) else value[0]).dim()


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple((value if isinstance(value, Tensor) else value[0]).shape)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _by_element(node: fx.Node) -> dict[fx.Node, Carried]:
    """Elementwise, with broadcasting."""
    sizes = _sizes(node)
    found = {}
    for used in node.all_input_nodes:
        if _is_tensor(used):
            ahead = len(sizes) - len(shape(used))
            found[used] = [
                ahead + axis if same_sizes([size], [sizes[ahead + axis]]) else None
                for axis, size in enumerate(shape(used))
            ]
    return found


def _rows(*names: str) -> Callable[[fx.Node], dict[fx.Node, Carried]]:
    """Each row of the last axis by itself: of the operands of these names."""

    def rule(node: fx.Node) -> dict[fx.Node, Carried]:
        given = arguments(node)
        found: dict[fx.Node, Carried] = {}
        for name in names:
            if _is_tensor(given[name]) and len(shape(given[name])) == rank(node):
                sizes, result = shape(given[name])[:-1], _sizes(node)
                found[given[name]] = [
                    axis if same_sizes([size], [result[axis]]) else None for axis, size in enumerate(sizes)
                ] + [None]
        return found

    return rule


def _rotary(node: fx.Node) -> dict[fx.Node, Carried]:
    """Elementwise, but that columns turn in pairs."""
    return {used: [*axes[:-1], None] for used, axes in _by_element(node).items()}


def _layer_norm(node: fx.Node) -> dict[fx.Node, Carried]:
    given = arguments(node)
    normed = len(given["normalized_shape"])
    return {given["input"]: [*range(rank(node) - normed), *[None] * normed]}


def _dynamic_quantize(node: fx.Node) -> dict[fx.Node, Carried]:
    return _rows("input")(node) if arguments(node)["per"] == "token" else {}


def _lookup(node: fx.Node) -> dict[fx.Node, Carried]:
    indices = arguments(node)["indices"]
    return {indices: list(range(rank(node) - 1))}


def _along(node: fx.Node) -> dict[fx.Node, Carried]:
    """Every axis stays where it is; the one that the call works along is mixed or cut."""
    given = arguments(node)
    source = next(iter(given.values()))
    gone = given["dim"] % rank(node)
    kept: Carried = [None if axis == gone else axis for axis in range(rank(node))]
    return {item: kept for item in (source if isinstance(source, list | tuple) else [source]) if _is_tensor(item)}


def _reduced(node: fx.Node) -> dict[fx.Node, Carried]:
    """Sums and the like over some axes."""
    given = arguments(node)
    source, dims = given["self"], given["dim"]
    axes = len(shape(source))
    if not isinstance(dims, int) and not dims:
        return {}
    gone = {dim % axes for dim in ([dims] if isinstance(dims, int) else dims)}
    if given.get("keepdim"):
        return {source: [None if axis in gone else axis for axis in range(axes)]}
    left = iter(range(axes))
    return {source: [None if axis in gone else next(left) for axis in range(axes)]}


def _permuted(order: Sequence[int]) -> Carried:
    return [list(order).index(axis) for axis in range(len(order))]


def _transpose(node: fx.Node) -> dict[fx.Node, Carried]:
    given = arguments(node)
    order = list(range(rank(node)))
    first, second = given["dim0"] % len(order), given["dim1"] % len(order)
    order[first], order[second] = order[second], order[first]
    return {given["self"]: _permuted(order)}


def _permute(node: fx.Node) -> dict[fx.Node, Carried]:
    given = arguments(node)
    return {given["self"]: _permuted([axis % rank(node) for axis in given["dims"]])}


def _unsqueeze(node: fx.Node) -> dict[fx.Node, Carried]:
    given = arguments(node)
    place = given["dim"] % rank(node)
    return {given["self"]: [axis + (axis >= place) for axis in range(rank(node) - 1)]}


def _select(node: fx.Node) -> dict[fx.Node, Carried]:
    given = arguments(node)
    place = given["dim"] % (rank(node) + 1)
    return {given["self"]: [None if axis == place else axis - (axis > place) for axis in range(rank(node) + 1)]}


def _reshape(node: fx.Node) -> dict[fx.Node, Carried]:
    """The first axes, as far as they keep their sizes."""
    source = arguments(node)["self"]
    found: Carried = [None] * len(shape(source))
    for axis, (before, after) in enumerate(zip(shape(source), _sizes(node), strict=False)):
        if not same_sizes([before], [after]):
            break
        found[axis] = axis
    return {source: found}


def _item(node: fx.Node) -> dict[fx.Node, Carried]:
    source: Any = node.args[0]
    several = isinstance(source.meta.get("val"), tuple | list) and _is_tensor(node)
    return {source: list(range(rank(node)))} if several and rank(source) == rank(node) else {}


_RULES: dict[Any, Callable[[fx.Node], dict[fx.Node, Carried]]] = {
    **dict.fromkeys((quantize.quantize, quantize.dequantize, float8.float8_quantize), _by_element),
    **dict.fromkeys(
        (aten._to_copy.default, aten.to.dtype, aten.masked_fill.Tensor, aten.contiguous.default), _by_element
    ),
    **dict.fromkeys((aten.dropout.default, aten.alias.default, aten.detach.default, aten.expand.default), _by_element),
    **dict.fromkeys((aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _by_element),
    **dict.fromkeys((aten.linear.default, linear.linear_act, linear.gated_linear, linear.mlp), _rows("input")),
    **dict.fromkeys((linear.split_linear, quantize.int4_linear, quantize.int8_weight_linear), _rows("input")),
    quantize.int8_linear: _rows("input", "scale"),
    **dict.fromkeys((float8.float8_linear, float8.float8_scale), _rows("input")),
    quantize.dynamic_quantize: _dynamic_quantize,
    rotary.rotary: _rotary,
    norm.rms_norm: _rows("input"),
    norm.add_rms_norm: _rows("input", "residual"),
    norm.add_layer_norm: _rows("input", "residual"),
    aten.layer_norm.default: _layer_norm,
    aten.embedding.default: _lookup,
    quantize.int4_embedding: _lookup,
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.slice.Tensor, aten.cat.default), _along),
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default), _along),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default), _reduced),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    **dict.fromkeys((aten.reshape.default, aten.view.default), _reshape),
    operator.getitem: _item,
}
