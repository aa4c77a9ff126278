"""Reductions over the columns of a kernel, and what is made of them: softmax, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ....ir.graph import arguments
from ....ir.ops.norm import rms_norm
from ..emitter import CannotFuse, Emitter, Index, Value, computed
from .elements import result_dtype
from .table import Lower, value

aten = torch.ops.aten
# Those whose axes make up the columns of a kernel: the names of the argument and of its axes.
REDUCED: dict[Any, Callable[[dict[str, Any], int], list[int]]] = {}


def _reduction(*targets: Any) -> Callable[[Lower], Lower]:
    """Declare reductions whose axes are named `dim`, one or several, none meaning all."""

    def register(lower: Lower) -> Lower:
        for target in targets:
            REDUCED[target] = lambda given, rank: axes_of(given.get("dim"), rank)
        return value(*targets)(lower)

    return register


def _over_last(*targets: Any) -> Callable[[Lower], Lower]:
    """Declare operators over the last axis, or as many last ones as `normalized_shape` has."""

    def register(lower: Lower) -> Lower:
        for target in targets:
            REDUCED[target] = lambda given, rank: list(range(rank - len(given.get("normalized_shape") or [0]), rank))
        return value(*targets)(lower)

    return register


def axes_of(dim: Any, rank: int) -> list[int]:
    """The axes that a reduction names, sorted."""
    if dim is None or dim == []:
        return list(range(rank))
    return sorted({axis % rank for axis in (dim if isinstance(dim, list | tuple) else [dim])}) if rank else []


def reduced_axes(node: fx.Node) -> tuple[fx.Node, list[int]]:
    """The tensor that a reduction reads, and the axes that it runs over."""
    given = arguments(node)
    source: fx.Node = given["self"] if "self" in given else given["input"]
    return source, REDUCED[node.target](given, len(source.meta["val"].shape))


def _inner(emitter: Emitter, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """The tensor that a reduction reads, and its index in the frame's columns for an index of the result."""
    source, axes = reduced_axes(node)
    rank = len(source.meta["val"].shape)
    if len(index) != rank:
        kept = iter(index)
        index = tuple(0 if axis in axes else next(kept) for axis in range(rank))
    return source, emitter.over_columns(source, index, axes)


def _count(emitter: Emitter, source: fx.Node, axes: Sequence[int]) -> str:
    shape = emitter.sizes.shape(source)
    found: Any = 1
    for axis in axes:
        found = found * shape[axis]
    return emitter.text(found)


@_reduction(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    source, axes = reduced_axes(node)
    _, inner = _inner(emitter, node, index)
    dtype = computed(result_dtype(node))
    total = emitter.reduce("sum", lambda: emitter.cast(emitter.value(source, inner), dtype))
    if node.target in (aten.sum.default, aten.sum.dim_IntList):
        return total
    return emitter.let("mean", f"{total} / {_count(emitter, source, axes)}", dtype, total)


@_reduction(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def _extreme(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    source, inner = _inner(emitter, node, index)
    kind = "max" if "max" in str(node.target) else "min"
    return _with_nan(emitter, kind, lambda: emitter.value(source, inner))


def _with_nan(emitter: Emitter, kind: str, read: Callable[[], Value]) -> Value:
    """The largest or smallest of a row; NaN where one is."""

    def missing() -> Value:
        x = read()
        return emitter.let("missing", f"({x} != {x}).to(tl.int32)", torch.int32, x)

    def wide() -> Value:
        x = read()
        return emitter.cast(x, torch.int32) if x.dtype is torch.bool else x

    found = emitter.reduce(kind, wide)
    if not found.dtype.is_floating_point:
        return found
    count = emitter.reduce("sum", missing)
    return emitter.let(kind, f'tl.where({count} > 0, float("nan"), {found})', found.dtype, found, count)


@_reduction(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
def _any(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    source, inner = _inner(emitter, node, index)

    def read() -> Value:
        x = emitter.cast(emitter.value(source, inner), torch.bool)
        return emitter.let("true", f"{x}.to(tl.int32)", torch.int32, x)

    kind = "max" if "any" in str(node.target) else "min"
    found = emitter.reduce(kind, read)
    return emitter.let("any", f"{found} > 0", torch.bool, found)


@_reduction(aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
def _var(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    source, axes = reduced_axes(node)
    _, inner = _inner(emitter, node, index)
    if "correction" in given:
        correction = 1 if given["correction"] is None else given["correction"]
    else:
        correction = int(given["unbiased"])
    count = _count(emitter, source, axes)
    mean, square = _moments(emitter, lambda: emitter.value(source, inner), count)
    less = emitter.text(emitter.sizes.of(correction))
    found = emitter.let("var", f"{square} / ({count} - {less})", mean.dtype, square)
    return emitter.let("std", f"tl.sqrt({found})", found.dtype, found) if "std" in str(node.target) else found


def _moments(emitter: Emitter, read: Callable[[], Value], count: str) -> tuple[Value, Value]:
    """The mean of a row, and the sum of the squared distances from it; the mean in two steps, for rows far from 0."""
    total = emitter.reduce("sum", read)
    first = emitter.let("mean", f"{total} / {count}", total.dtype, total)

    def distance() -> Value:
        x = read()
        return emitter.let("distance", f"{x} - {first}", x.dtype, x, first)

    rest = emitter.reduce("sum", distance)
    mean = emitter.let("mean", f"{first} + {rest} / {count}", total.dtype, first, rest)

    def squared() -> Value:
        x = read()
        return emitter.let("square", f"({x} - {mean}) * ({x} - {mean})", x.dtype, x)

    return mean, emitter.reduce("sum", squared)


@_reduction(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def _softmax(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    source, inner = _inner(emitter, node, index)
    dtype = computed(result_dtype(node))

    def read() -> Value:
        return emitter.cast(emitter.value(source, inner), dtype)

    top = emitter.reduce("max", read)

    def weight(x: Value) -> Value:
        return emitter.let("weight", f"tl.exp({x} - {top})", dtype, x, top)

    total = emitter.reduce("sum", lambda: weight(read()))
    x = emitter.cast(emitter.value(source, index), dtype)
    if "log" in str(node.target):
        return emitter.let("log_softmax", f"{x} - {top} - tl.log({total})", dtype, x, top, total)
    each = weight(x)
    return emitter.let("softmax", f"{each} / {total}", dtype, each, total)


@_reduction(aten.logsumexp.default)
def _logsumexp(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    source, inner = _inner(emitter, node, index)
    dtype = computed(result_dtype(node))

    def read() -> Value:
        return emitter.cast(emitter.value(source, inner), dtype)

    top = emitter.reduce("max", read)
    finite = emitter.let("top", f'tl.where(tl.abs({top}) == float("inf"), 0.0, {top})', dtype, top)

    def weight() -> Value:
        x = read()
        return emitter.let("weight", f"tl.exp({x} - {finite})", dtype, x)

    total = emitter.reduce("sum", weight)
    return emitter.let("logsumexp", f"tl.log({total}) + {finite}", dtype, total, finite)


@_reduction(aten.cumsum.default)
def _cumsum(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    source, inner = _inner(emitter, node, index)
    if tuple(inner) != tuple(index) or emitter.frame.looped:
        raise CannotFuse(f"{node.name} runs along a row that is not whole in one tile")
    x = emitter.cast(emitter.value(source, inner), computed(result_dtype(node)))
    whole = f"tl.where(inside, {x}, {emitter.number(0, x.dtype)})"
    return emitter.let("cumsum", f"tl.cumsum({whole}, axis=1)", x.dtype, moving=True)


@_over_last(aten.layer_norm.default)
def _layer_norm(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    source, inner = _inner(emitter, node, index)
    _, axes = reduced_axes(node)
    count = _count(emitter, source, axes)
    mean, square = _moments(emitter, lambda: emitter.value(source, inner), count)
    code = f"1.0 / tl.sqrt({square} / {count} + {given['eps']!r})"
    scale = emitter.let("scale", code, mean.dtype, square)
    x = emitter.value(source, index)
    found = emitter.let("norm", f"({x} - {mean}) * {scale}", x.dtype, x, mean, scale)
    if given["weight"] is not None:
        weight = emitter.operand(given["weight"], index, x.dtype)
        found = emitter.let("norm", f"{found} * {weight}", x.dtype, found, weight)
    if given["bias"] is not None:
        bias = emitter.operand(given["bias"], index, x.dtype)
        found = emitter.let("norm", f"{found} + {bias}", x.dtype, found, bias)
    return found


@_over_last(rms_norm, aten.rms_norm.default)
def _rms_norm(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    source, inner = _inner(emitter, node, index)
    _, axes = reduced_axes(node)
    eps = torch.finfo(result_dtype(source)).eps if given["eps"] is None else given["eps"]

    def squared() -> Value:
        x = emitter.value(source, inner)
        return emitter.let("square", f"{x} * {x}", x.dtype, x)

    total = emitter.reduce("sum", squared)
    code = f"1.0 / tl.sqrt({total} / {_count(emitter, source, axes)} + {eps!r})"
    scale = emitter.let("scale", code, total.dtype, total)
    x = emitter.value(source, index)
    found = emitter.let("norm", f"{x} * {scale}", x.dtype, x, scale)
    weight = given["weight"]
    if weight is None:
        return found
    if node.target is rms_norm and result_dtype(weight) == result_dtype(source):
        found = emitter.rounded(found, result_dtype(source))  # Llama scales the rounded number
    by = emitter.operand(weight, index, x.dtype)
    return emitter.let("norm", f"{found} * {by}", x.dtype, found, by)
