"""Which columns of which tensor a value is: what slice, chunk, split and narrow along the last axis have in common."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import arguments, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """The columns start, start + step, ... below stop of `source`'s last axis; `nodes` are the calls that cut it."""

    source: fx.Node
    start: int
    stop: int
    step: int = 1
    nodes: frozenset[fx.Node] = frozenset()


def piece(node: Any) -> Piece | None:
    """The piece that a node is, cut by one call; the whole of itself if by none. None: its width is not known."""
    width = shape(node)[-1] if isinstance(node, fx.Node) and shape(node) else None
    if not isinstance(width, int):
        return None
    return _sliced(node) or _part(node) or Piece(node, 0, width)


def _is_last(axis: int, source: Any) -> bool:
    return axis % len(shape(source)) == len(shape(source)) - 1 and isinstance(shape(source)[-1], int)


def _sliced(node: fx.Node) -> Piece | None:
    if node.target not in (aten.slice.Tensor, aten.narrow.default):
        return None
    given = arguments(node)
    source = given["self"]
    if not _is_last(given["dim"], source):
        return None
    width = shape(source)[-1]
    if node.target is aten.narrow.default:
        start, stop, step = given["start"], given["start"] + given["length"], 1
    else:
        start, stop, step = given["start"] or 0, given["end"], given["step"]
    if not all(isinstance(bound, int) for bound in (start, step)) or not isinstance(stop, int | None):
        return None
    start, stop, step = slice(start, stop, step).indices(width)
    return Piece(source, start, stop, step, frozenset((node,)))


def _part(node: fx.Node) -> Piece | None:
    if node.target is not operator.getitem:
        return None
    cut: Any = node.args[0]
    index: Any = node.args[1]
    if cut.target not in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes):
        return None
    given = arguments(cut)
    if not _is_last(given["dim"], given["self"]):
        return None
    sizes = [value.shape[-1] for value in cut.meta["val"]]
    start = sum(sizes[:index])
    return Piece(given["self"], start, start + sizes[index], 1, frozenset((node, cut)))
