"""Multiplications that units cost, at the sizes that a program was traced with."""

from __future__ import annotations

from typing import Any

import torch

from ..graph import Program, arguments
from .channels import Channels
from .units import Family


def unit_macs(program: Program, channels: Channels, family: Family) -> float:
    """Multiplications of one unit: in the layers that make and read it, and in attention."""
    total = 0.0
    for axis in (*family.rows, *family.columns):
        sizes = program.tensor(axis.weight).shape
        if len(sizes) == 2:  # biases and scales cost next to nothing
            each = _tokens(axis.reader) * sizes[1 - axis.axis]
            mine = int((family.units(axis) >= 0).sum())
            total += each * mine / len(family.channels)
    if family.attention is not None:
        batch, heads, length, _ = (_hint(size) for size in family.attention.meta["val"].shape)
        return total + batch * heads * length * _hint(arguments(family.attention)["key"].meta["val"].shape[2])
    for node, found in channels.heads.items():
        if bool(torch.isin(found, family.channels).any()):
            given = arguments(node)
            batch, heads, length, width = (_hint(size) for size in given["query"].meta["val"].shape)
            keys, depth = (_hint(size) for size in given["value"].meta["val"].shape[-2:])
            total += batch * heads * length * keys * (width + depth) / len(family.channels)
    return total


def _tokens(node: Any) -> int:
    """Rows that a linear layer is applied to."""
    count = 1
    for size in node.meta["val"].shape[:-1]:
        count *= _hint(size)
    return count


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
