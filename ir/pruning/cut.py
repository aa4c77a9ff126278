"""Cutting channels out of a program: smaller weights, and the sizes that views state made to fit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import RewriteError
from ..graph import Program, arguments, source_of
from ..pattern import spell
from .channels import Axis, Channels

aten = torch.ops.aten
_SIZED = {
    aten.reshape.default: "shape",
    aten.view.default: "size",
    aten.expand.default: "size",
}  # the argument of views that states sizes


def cut(program: Program, channels: Channels, removed: Collection[int]) -> None:
    """Remove channels from every weight and value that has them.

    What is computed from the other channels is the same as before if the weight columns that read the removed ones are
    zero. Weights keep their names; they are new tensors.

    Args:
        channels: of this program, as it is.
        removed: none of them `fixed`.

    Raises:
        RewriteError: a view lays the channels out in a way that leaves no rectangle; nothing was changed then.
    """
    cutting = _Cutting(program, channels, torch.tensor(sorted(removed), dtype=torch.int64))
    edits = [(node, cutting.arguments(node)) for node in channels.values if cutting.touches(node)]
    heads = [(node, cutting.heads(node)) for node in channels.heads if cutting.loses(node)]
    changed: list[fx.Node] = []
    for weight, tensor in cutting.weights().items():
        program.set_weight(weight, tensor)
        changed.append(weight)
    for node, new in edits:
        for place, value in new.items():
            node.update_arg(place, value)
        changed.append(node)
    for node, kept in heads:
        _select_heads(program, node, kept)
    program.refresh(changed)
    program.module.recompile()


def fits(program: Program, channels: Channels, removed: Collection[int]) -> bool:
    """Whether `cut` can remove channels: no view lays them out in a way that leaves no rectangle."""
    cutting = _Cutting(program, channels, torch.tensor(sorted(removed), dtype=torch.int64))
    try:
        for node in channels.values:
            if cutting.touches(node):
                cutting.arguments(node)
    except RewriteError:
        return False
    return True


class _Cutting:
    def __init__(self, program: Program, channels: Channels, removed: Tensor) -> None:
        self.program, self.channels, self.removed = program, channels, removed

    def kept(self, numbers: Tensor) -> Tensor:
        return ~torch.isin(self.channels.of(numbers), self.removed)

    def loses(self, node: fx.Node) -> bool:
        return not bool(self.kept(self.channels.values[node]).all())

    def touches(self, node: fx.Node) -> bool:
        """Whether a call or what it reads loses something: a slice behind what is cut moves."""
        return any(self.loses(item) for item in (node, *node.all_input_nodes) if item in self.channels.values)

    def weights(self) -> dict[fx.Node, Tensor]:
        """The smaller tensors of the weights that lose something."""
        axes: list[Axis] = [*self.channels.rows, *self.channels.columns]
        found: dict[fx.Node, Tensor] = {}
        for item in axes:
            kept = self.kept(item.channels)
            if not bool(kept.all()):
                tensor = found.get(item.weight, self.program.tensor(item.weight).detach())
                found[item.weight] = tensor.index_select(item.axis, kept.nonzero().flatten().to(tensor.device))
        return found

    def arguments(self, node: fx.Node) -> dict[int, Any]:
        """The arguments of a call that state sizes or places, by position, as they are to be."""
        axes = self._axes(node)
        if node.target in _SIZED:
            sizes: Any = arguments(node)[_SIZED[node.target]]
            return {1: [self._size(stated, kept) for stated, kept in zip(sizes, axes, strict=True)]}
        if node.target not in (aten.slice.Tensor, aten.select.int):
            return {}
        given = arguments(node)
        before = self._axes(given["self"])[given["dim"]]
        if node.target is aten.select.int:
            index = given["index"] % len(before)
            if not before[index]:
                raise RewriteError(f"{spell(node)} takes what is to be cut{source_of(node)}")
            return {2: int(before[:index].sum())}
        if bool(before.all()):
            return {}
        start, end = _bounds(given["start"], given["end"], len(before))
        return {2: int(before[:start].sum()), 3: int(before[:end].sum())}

    def heads(self, node: fx.Node) -> Tensor:
        """The heads of an attention that stay, [H]."""
        return self._axes(node)[1]

    def _size(self, stated: Any, kept: Tensor) -> Any:
        """A size, or -1 for one that is computed."""
        if bool(kept.all()):
            return stated
        return int(kept.sum()) if isinstance(stated, int) and stated != -1 else -1

    def _axes(self, node: fx.Node) -> list[Tensor]:
        """Which indices of each axis stay."""
        numbers = self.channels.values[node]
        kept = self.kept(numbers)
        axes = [kept.movedim(axis, 0).reshape(kept.shape[axis], -1).any(1) for axis in range(kept.dim())]
        whole = torch.ones((), dtype=torch.bool)
        for axis, part in enumerate(axes):
            whole = whole & part.reshape([-1 if index == axis else 1 for index in range(kept.dim())])
        if not torch.equal(whole.expand_as(kept), kept):
            raise RewriteError(f"{spell(node)} lays out what is to be cut in no rectangle{source_of(node)}")
        return axes


def _bounds(start: Any, end: Any, size: int) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, last


def _select_heads(program: Program, node: fx.Node, kept: Tensor) -> None:
    """Let an attention read of its bias and sinks those of the heads that stay."""
    given = arguments(node)
    for name, axis in (("bias", -3), ("sinks", -1)):
        value = given[name]
        sizes = () if value is None else tuple(value.meta["val"].shape)
        if len(sizes) >= -axis and sizes[axis] != 1:
            places = program.add_weight(f"{node.name}_heads", kept.nonzero().flatten(), trainable=False)
            own = program.call(aten.index_select.default, value, len(sizes) + axis, places, before=node)
            node.args = tuple(own if item is value else item for item in node.args)
            node.kwargs = {key: own if item is value else item for key, item in node.kwargs.items()}
