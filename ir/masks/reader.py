"""Reading a graph as expressions: what a tensor holds at given indices.

`Reader.read(node, indices)` follows the graph from a node towards its inputs: views change the indices, arange turns
an index into a number, elementwise operators combine what they read. What is not read any further, a user's padding
mask or a learned bias, becomes an `Element` of that node at those indices. So every answer is exact; at worst it says
little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, same_sizes, shape
from . import expression as e
from .elementwise import ELEMENTWISE, apply
from .expression import Element, Expression, Sum
from .values import Indices, is_one, kind, literal
from .views import VIEWS, constant

RULES = {**VIEWS, **ELEMENTWISE}
_LARGEST = 2000  # parts of an expression beyond which a tensor is not read further


class Reader:
    """Reads tensors of a program as functions of (b, h, i, j).

    Args:
        extents: the sizes of the four axes.
    """

    def __init__(self, program: Program, extents: Sequence[int | torch.SymInt]) -> None:
        self.program = program
        self._sizes = extents
        self.extents: Mapping[int, Sum] = {axis: e.size(extent) for axis, extent in enumerate(extents)}
        self.nodes: dict[Expression, fx.Node] = {}  # nodes that broadcast to the four axes, by what they hold
        self._known: dict[tuple[fx.Node, Indices], Expression] = {}

    def mask(self, node: fx.Node) -> Expression:
        """What a tensor that broadcasts to the four axes holds at (b, h, i, j)."""
        return self.read(node, self.aligned(node))

    def aligned(self, node: fx.Node) -> Indices:
        """The indices of a tensor that broadcasts to the four axes."""
        sizes = shape(node)
        return tuple(
            e.whole(0) if is_one(extent) else e.index(4 - len(sizes) + axis) for axis, extent in enumerate(sizes)
        )

    def read(self, node: Any, indices: Indices) -> Expression:
        """What a node, or a literal, holds at some indices."""
        if not isinstance(node, fx.Node):
            return literal(node)
        value = node.meta.get("val")
        if isinstance(value, bool | float):
            return literal(value)
        if isinstance(value, int | torch.SymInt):
            return e.size(value)
        if not isinstance(value, Tensor):
            return Element(node, ())
        key = (node, indices)
        if key not in self._known:
            found = self._read(node, indices)
            if found is None or found.count > _LARGEST:
                found = self.element(node, indices)
            self._known[key] = found
            if self._broadcasts(node) and indices == self.aligned(node):
                self.nodes.setdefault(found, node)
        return self._known[key]

    def _broadcasts(self, node: fx.Node) -> bool:
        """Whether a tensor broadcasts to the four axes; a table whose beginning is read is larger."""
        sizes = shape(node)
        return len(sizes) <= 4 and all(map(_fits, reversed(sizes), reversed(self._sizes)))

    def _read(self, node: fx.Node, indices: Indices) -> Expression | None:
        if node.op == "get_attr":
            return constant(self, node, indices)
        if node.op != "call_function":
            return None
        rule = RULES.get(node.target)
        if rule is not None:
            return rule(self, node, indices)
        tags = getattr(node.target, "tags", ())
        return apply(self, node, indices) if torch.Tag.pointwise in tags else None

    def element(self, node: fx.Node, indices: Indices) -> Expression:
        """An element that is not read further, as a sum where it is a whole number."""
        found = Element(node, indices)
        return found if kind(node) in ("bool", "float") else e.atom(found)

    def operand(self, node: Any, indices: Indices) -> Expression:
        """What an operand that broadcasts against the result's indices holds."""
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            return self.read(node, ())
        sizes = shape(node)
        own = indices[len(indices) - len(sizes) :]
        return self.read(
            node,
            tuple(e.whole(0) if is_one(extent) else found for extent, found in zip(sizes, own, strict=True)),
        )


def _fits(size: int | torch.SymInt, extent: int | torch.SymInt) -> bool:
    """Whether an axis broadcasts to a size.

    Of what is computed from sizes, as the length of a slice is, PyTorch may not know that it equals another one: there
    the example's sizes tell.
    """
    if is_one(size) or same_sizes([size], [extent]):
        return True
    if not isinstance(size, torch.SymInt) or size.node.expr.is_Symbol:
        return False
    return bool(size.node.hint == (extent.node.hint if isinstance(extent, torch.SymInt) else extent))
