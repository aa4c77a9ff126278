"""From expressions back to graph nodes, for what a kernel takes as a tensor or a number."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, dtype, same_sizes, shape
from . import expression as e
from .expression import Element, Expression, Index, Sum

aten = torch.ops.aten


class Emitter:
    """Computes conditions over two of the axes as a boolean matrix.

    Args:
        axes: the axes of rows and columns.
        sizes: how many rows and columns, as numbers or nodes that give a size.
        before: the node before which calls are inserted.
    """

    def __init__(self, program: Program, axes: tuple[int, int], sizes: tuple[Any, Any], before: fx.Node) -> None:
        self.program, self.axes, self.sizes, self.before = program, axes, sizes, before
        self.device = before.meta["val"].device

    def matrix(self, condition: Expression) -> fx.Node:
        """The condition as a boolean tensor [rows, columns]."""
        made = self._emit(condition)
        sizes = [size.meta["val"] if isinstance(size, fx.Node) else size for size in self.sizes]
        return made if same_sizes(shape(made), sizes) else self._call(aten.expand.default, made, list(self.sizes))

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.call(target, *args, before=self.before, **kwargs)

    def _emit(self, value: Any) -> Any:
        """A node that broadcasts to the matrix, a node that is a size, or a number."""
        match value:
            case Index():
                place = self.axes.index(value.axis)
                steps = self._call(aten.arange.default, self.sizes[place], device=self.device)
                return self._call(aten.unsqueeze.default, steps, 1 - place)
            case e.Size():
                return size_node(self.program, value.symbol, self.before)
            case Element():
                return self._element(value)
            case Sum():
                return self._sum(value)
            case e.Constant():
                return self._call(aten.full.default, [], value.value, device=self.device)
            case e.Absolute():
                return self._call(aten.abs.default, self._emit(value.of))
            case e.Quotient():
                return self._call(aten.floor_divide.default, self._emit(value.dividend), value.divisor)
            case e.Remainder():
                return self._call(aten.remainder.Scalar, self._emit(value.dividend), value.divisor)
            case e.Not(of=e.Zero() as compared):
                return self._compared(aten.ne.Scalar, compared.of)
            case e.Not():
                return self._call(aten.bitwise_not.default, self._emit(value.of))
            case e.Zero():
                return self._compared(aten.eq.Scalar, value.of)
            case e.NotPositive():
                return self._compared(aten.le.Scalar, value.of)
            case e.And() | e.Or():
                return self._joined(value)
            case e.Choice():
                parts = [self._emit(part) for part in (value.condition, value.yes, value.no)]
                return self._call(aten.where.self, *map(self._as_tensor, parts))
            case e.Apply():
                return self._applied(value)
        return value

    def _as_tensor(self, value: Any) -> fx.Node:
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor):
            return value
        kind = torch.get_default_dtype() if isinstance(value, float) else torch.int64
        return self._call(aten.full.default, [], value, device=self.device, dtype=kind)

    def _compared(self, target: Any, value: Sum) -> fx.Node:
        """A sum compared with 0: its constant stands on the other side."""
        left = self._as_tensor(self._sum(Sum(value.terms, 0)))
        return self._call(target, left, -value.constant)

    def _sum(self, value: Sum) -> Any:
        result: Any = None
        for part, factor in sorted(value.terms, key=lambda term: e.spell(term[0])):
            made = self._emit(part)
            if isinstance(made.meta["val"], Tensor) and dtype(made) is not torch.int64:
                made = self._call(aten._to_copy.default, made, dtype=torch.int64)  # narrower ones overflow
            if factor != 1:
                made = self._combined(made, factor, aten.mul.Tensor, operator.mul)
            result = made if result is None else self._combined(result, made, aten.add.Tensor, operator.add)
        if result is None:
            return value.constant
        return self._combined(result, value.constant, aten.add.Tensor, operator.add) if value.constant else result

    def _combined(self, first: Any, second: Any, of_tensors: Any, of_sizes: Any) -> fx.Node:
        tensors = [isinstance(item, fx.Node) and isinstance(item.meta["val"], Tensor) for item in (first, second)]
        if tensors == [False, True]:
            first, second = second, first
        return self._call(of_tensors if any(tensors) else of_sizes, first, second)

    def _joined(self, value: e.And | e.Or) -> fx.Node:
        target = aten.bitwise_and.Tensor if isinstance(value, e.And) else aten.bitwise_or.Tensor
        result, *others = (self._emit(item) for item in sorted(value.conditions, key=e.spell))
        for other in others:
            result = self._call(target, result, other)
        return result  # type: ignore[no-any-return]

    def _applied(self, value: e.Apply) -> fx.Node:
        options = {name: self._emit(item) for name, item in value.options if name != "result"}
        wanted = [str(argument.type) == "Tensor" for argument in value.target._schema.arguments]
        operands = [
            self._as_tensor(made) if tensor else made
            for tensor, made in zip(wanted, map(self._emit, value.operands), strict=False)
        ]
        return self._call(value.target, *operands, **options)

    def _element(self, value: Element) -> fx.Node:
        source, indices = value.node, list(value.indices)
        for axis in reversed(range(len(indices))):
            if not indices[axis].terms:
                source = self._call(aten.select.int, source, axis, indices.pop(axis).constant)
        wanted = [e.index(axis) for axis in self.axes]
        extents = [size.meta["val"] if isinstance(size, fx.Node) else size for size in self.sizes]
        if indices == wanted and same_sizes(shape(source), extents):
            return source
        for place, axis in enumerate(self.axes):  # a vector along one of the axes
            if indices == [e.index(axis)] and same_sizes(shape(source), extents[place : place + 1]):
                return self._call(aten.unsqueeze.default, source, 1 - place)
        return (
            self._call(aten.index.Tensor, source, [self._as_tensor(self._emit(item)) for item in indices])
            if indices
            else source
        )


def size_node(program: Program, size: Any, before: fx.Node) -> Any:
    """A size (a number, torch.SymInt, its sympy expression) as a number or a node; None: it is no size of an input."""
    if isinstance(size, int):
        return size
    place = input_of_size(program, size.node.expr if isinstance(size, torch.SymInt) else size)
    return None if place is None else program.call(aten.sym_size.int, *place, before=before)


def input_of_size(program: Program, symbol: Any) -> tuple[fx.Node, int] | None:
    """An input and its axis whose size is a sympy expression."""
    for node in program.graph.find_nodes(op="placeholder"):
        for axis, extent in enumerate(shape(node)):
            if isinstance(extent, torch.SymInt) and extent.node.expr == symbol:
                return node, axis
    return None
