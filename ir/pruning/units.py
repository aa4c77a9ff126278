"""Units: what structured pruning removes from a program, heads and neurons, in families of alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph import Program
from ..layers import name_of
from .channels import Axis, Channels, follow
from .cut import cut, fits

ROUND = 8  # neurons and dimensions stay in multiples: every backend's matmul is faster than at odd sizes


@dataclass(frozen=True)
class Family:
    """Units that do the same work side by side: the heads of an attention, or the dimensions of all of them, the
    neurons of a feed-forward block.

    Attributes:
        kind: "heads", "neurons" or "dims".
        name: of the linear layers that read them.
        channels: [U], the channel of each unit.
        columns: what reads them. rows: what makes them. Attention alone reads the dimensions of queries and keys.
        attention: of dimensions, the attention that has them.
    """

    kind: str
    name: str
    channels: Tensor
    columns: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    attention: fx.Node | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that make and read the units."""
        return tuple(dict.fromkeys(name_of(axis.reader) for axis in (*self.rows, *self.columns) if _is_linear(axis)))

    @property
    def least(self) -> int:
        """How many units have to stay."""
        return min(1 if self.kind == "heads" else ROUND, len(self.channels))

    def units(self, axis: Axis) -> Tensor:
        """The unit that each index of an axis belongs to; -1: to none."""
        match = axis.channels.unsqueeze(1) == self.channels
        return torch.where(match.any(1), match.long().argmax(1), -1)

    def rounded(self, count: int) -> int:
        """The nearest number of units that may stay."""
        size = len(self.channels)
        if self.kind != "heads" and size >= ROUND:
            count = round(count / ROUND) * ROUND if count < size else size
        return max(self.least, min(count, size))


def _is_linear(axis: Axis) -> bool:
    return axis.reader.target is torch.ops.aten.linear.default


def name_of_layers(layers: Sequence[fx.Node]) -> str:
    """The names of several layers as one."""
    return " + ".join(map(name_of, layers))


def families(channels: Channels) -> tuple[list[Family], dict[str, str]]:
    """The families of a program, in graph order; and for layers whose inputs cannot be cut, why, by name."""
    heads = {int(item) for found in channels.heads.values() for item in found}
    grouped: dict[tuple[int, ...], list[Axis]] = {}
    refused: dict[str, str] = {}
    for axis in channels.columns:
        present = tuple(item for item in dict.fromkeys(axis.channels.tolist()) if item >= 0)
        fixed = next((channels.fixed[item] for item in present if item in channels.fixed), None)
        if fixed is not None:
            refused[name_of(axis.reader)] = fixed
        for own in (True, False):  # heads, neurons
            free = tuple(sorted(item for item in present if item not in channels.fixed and (item in heads) is own))
            if len(free) > 1:
                grouped.setdefault(free, []).append(axis)
    found = []
    for free, columns in grouped.items():
        kind = "heads" if heads.intersection(free) else "neurons"
        members = torch.tensor(free)
        rows = tuple(axis for axis in channels.rows if bool(torch.isin(axis.channels, members).any()))
        name = name_of_layers([axis.reader for axis in columns])
        found.append(Family(kind, name, members, tuple(columns), rows))
    return found, refused


def cut_unread(program: Program) -> Mapping[str, int]:
    """Cut the units that are only read through weights of zero, by kind: how many."""
    channels = follow(program)
    removed: list[int] = []
    counts: dict[str, int] = {}
    read = [torch.empty(0, dtype=torch.int64)]
    for axis in channels.columns:
        zero = (program.tensor(axis.weight).detach() == 0).movedim(axis.axis, 0).flatten(1).all(1)
        read.append(axis.channels[~zero.cpu()])
    for family in families(channels)[0]:
        unread = ~torch.isin(family.channels, torch.cat(read))
        stay = int((~unread).sum())
        size = len(unread)
        if family.kind == "neurons" and size >= ROUND:
            stay = min(size, -(-stay // ROUND) * ROUND)
        gone = unread.nonzero().flatten()[: size - max(stay, family.least)]
        if len(gone) and fits(program, channels, family.channels[gone].tolist()):
            counts[family.kind] = counts.get(family.kind, 0) + len(gone)
            removed += family.channels[gone].tolist()
    if removed:
        cut(program, channels, removed)
    return counts
