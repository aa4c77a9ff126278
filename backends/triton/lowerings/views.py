"""Operators that only move elements: where each index of the result lies in the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ....ir.graph import arguments
from ..emitter import CannotFuse, Emitter, Index, Value
from ..sizes import remainder, reshaped
from .table import Where, value, view

aten = torch.ops.aten


def _moved(*targets: Any) -> Callable[[Where], Where]:
    """Declare operators that move elements as no view of memory can."""

    def register(where: Where) -> Where:
        def lower(emitter: Emitter, node: fx.Node, index: Index) -> Value:
            return emitter.value(source_of_view(node), where(emitter, node, index))

        value(*targets)(lower)
        return where

    return register


@view(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
def _reshape(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    return reshaped(index, emitter.sizes.shape(node), emitter.sizes.shape(source_of_view(node)))


@view(
    aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default,
    aten.lift_fresh_copy.default, aten.dropout.default,
)  # fmt: skip
def _same(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    if node.target is aten.dropout.default and arguments(node)["train"]:
        raise CannotFuse("dropout in training is random")
    return index


@view(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    return emitter.broadcast(source_of_view(node), index)


@view(aten.permute.default)
def _permute(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    dims = [axis % len(index) for axis in arguments(node)["dims"]]
    return tuple(index[dims.index(axis)] for axis in range(len(index)))


@view(aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default)
def _transpose(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    given, found = arguments(node), list(index)
    if node.target is aten.numpy_T.default:
        return tuple(reversed(index))
    if len(index) > 1:
        first, second = given.get("dim0", -2) % len(index), given.get("dim1", -1) % len(index)
        found[first], found[second] = found[second], found[first]
    return tuple(found)


@view(aten.select.int)
def _select(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    given = arguments(node)
    shape = emitter.sizes.shape(given["self"])
    axis = given["dim"] % len(shape)
    return (*index[:axis], _from_start(emitter, given["index"], shape[axis]), *index[axis:])


@view(aten.slice.Tensor)
def _slice(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    given = arguments(node)
    axis = given["dim"] % len(index)
    start = _from_start(emitter, given["start"] or 0, emitter.sizes.shape(given["self"])[axis])
    return (*index[:axis], start + index[axis] * emitter.sizes.of(given["step"]), *index[axis + 1 :])


@view(aten.narrow.default)
def _narrow(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    given = arguments(node)
    axis = given["dim"] % len(index)
    start = _from_start(emitter, given["start"], emitter.sizes.shape(given["self"])[axis])
    return (*index[:axis], start + index[axis], *index[axis + 1 :])


@_moved(aten.flip.default)
def _flip(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    shape, dims = emitter.sizes.shape(node), {axis % len(index) for axis in arguments(node)["dims"]}
    pairs = enumerate(zip(shape, index, strict=True))
    return tuple(size - 1 - place if axis in dims else place for axis, (size, place) in pairs)


@_moved(aten.repeat.default)
def _repeat(emitter: Emitter, node: fx.Node, index: Index) -> Index:
    shape = emitter.sizes.shape(arguments(node)["self"])
    last = index[len(index) - len(shape) :]
    return tuple(remainder(place, size) for place, size in zip(last, shape, strict=True))


def source_of_view(node: fx.Node) -> fx.Node:
    """The tensor that a view is of."""
    given = arguments(node)
    found: fx.Node = given["self"] if "self" in given else given["input"] if "input" in given else given["a"]
    return found


def _from_start(emitter: Emitter, place: Any, size: Any) -> sympy.Expr:
    """A position counted from the start; one that counts from the end is negative."""
    found = emitter.sizes.of(place)
    if found.is_Integer:
        return size + found if found < 0 else found
    if not found.is_nonnegative:
        raise CannotFuse(f"it is not known whether {emitter.text(found)} counts from the end")
    return found
