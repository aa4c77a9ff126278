"""Which columns of which tensor a value is: a slice of the last axis, or a selection from its halves or pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import arguments, same_sizes, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """The columns start, start + step, ... below stop of `source`'s last axis; `nodes` are the calls that cut it."""

    source: fx.Node
    start: int
    stop: int
    step: int = 1
    nodes: frozenset[fx.Node] = frozenset()

    @property
    def width(self) -> int:
        """How many columns these are."""
        return len(range(self.start, self.stop, self.step))


def piece(node: Any) -> Piece | None:
    """The piece that a node is, however it is cut; the whole of itself if it is not. None: its width is not known."""
    width = shape(node)[-1] if isinstance(node, fx.Node) and shape(node) else None
    if not isinstance(width, int):
        return None
    return _sliced(node) or _selected(node) or Piece(node, 0, width)


def _sliced(node: fx.Node) -> Piece | None:
    """x[..., start:stop:step]."""
    if node.target is not aten.slice.Tensor:
        return None
    given = arguments(node)
    source = given["self"]
    width = shape(source)[-1]
    if given["dim"] % len(shape(source)) != len(shape(source)) - 1 or not isinstance(width, int):
        return None
    start, stop, step = given["start"] or 0, given["end"], given["step"]
    if not all(isinstance(bound, int) for bound in (start, step)) or not isinstance(stop, int | None):
        return None
    start, stop, step = slice(start, stop, step).indices(width)
    return Piece(source, start, stop, step, frozenset((node,)))


def _selected(node: fx.Node) -> Piece | None:
    """One of the columns [..., n, k] that x [..., n * k] is folded into, or one of its rows."""
    if node.target is not aten.select.int or arguments(node)["self"].target is not aten.reshape.default:
        return None
    folded, place = arguments(node)["self"], arguments(node)["index"]
    source = folded.args[0]
    before, after = shape(source), shape(folded)
    if len(after) != len(before) + 1 or not same_sizes(after[:-2], before[:-1]):
        return None
    rows, columns = after[-2:]
    axis = arguments(node)["dim"] % len(after) - len(after)
    if axis not in (-1, -2) or not all(isinstance(item, int) for item in (rows, columns, place)):
        return None
    place, nodes = place % after[axis], frozenset((node, folded))
    if axis == -1:
        return Piece(source, place, rows * columns, columns, nodes)
    return Piece(source, place * columns, (place + 1) * columns, 1, nodes)
