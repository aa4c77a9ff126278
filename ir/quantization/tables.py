"""Tables that embeddings look up in: their integers, which may be those of a linear layer that has the same weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, arguments, dtype
from ..layers import is_named
from ..ops.float8 import FLOAT8
from .choice import Activation, Choice
from .grid import Grid, Quantized, nearest
from .sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Table:
    """A weight of floats [rows, K] with the embeddings that look up in it.

    Attributes:
        readers: what reads it as something else than a table, as tied linear layers do.
    """

    stored: fx.Node
    lookups: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]


def tables(program: Program, skip: Sequence[str]) -> list[Table]:
    """The tables of floats, in graph order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for lookup in program.calls(aten.embedding.default):
        stored: Any = lookup.args[0]
        is_table = isinstance(stored, fx.Node) and stored.op == "get_attr" and dtype(stored).is_floating_point
        if is_table and not is_named(lookup, skip):
            found.setdefault(stored, []).append(lookup)
    return [
        Table(
            stored,
            tuple(lookups),
            tuple(user for user in stored.users if user.target is not aten.embedding.default),
        )
        for stored, lookups in found.items()
    ]


def rounded(program: Program, table: Table, grid: Grid) -> Choice:
    """A table with integers of its own; those of 4 bits have the scales that fit them best."""
    weight = program.tensor(table.stored).detach().float()
    found = nearest(weight, grid, clip="minmax" if grid.bits == 8 else "mse")
    return Choice(Activation("float"), weights=(found,), bits=grid.bits)


def refuses(table: Table, choice: Choice) -> str | None:
    """Why a table stays in floats, once linear layers are quantized; None: it does not."""
    others = [user for user in table.stored.users if user.target is not aten.embedding.default]
    if others:
        return f"its weight is read by {others[0].name}, which stays in floats"
    return "too sensitive: it stays in floats" if choice.weights is None else None


def looked_up(choices: Mapping[Site | Table, Choice]) -> dict[fx.Node, Quantized]:
    """What each embedding looks up in, where its table becomes integers.

    A table stays as it is where something reads its floats; where linear layers make integers of it, those are looked
    up, the finest if there are several. But float8 is not: no backend does that.
    """
    linears = {
        linear: (choice, index)
        for site, choice in choices.items()
        if isinstance(site, Site)
        for index, linear in enumerate(site.linears)
    }
    found: dict[fx.Node, Quantized] = {}
    for table, own in choices.items():
        if not isinstance(table, Table) or own.weights is None or not all(node in linears for node in table.readers):
            continue
        tied = [linears[node] for node in table.readers]
        if any(choice.weights is None for choice, _ in tied):
            continue
        shared = [(choice.bits, choice.weights[index]) for choice, index in tied if choice.weights is not None]
        shared = [(bits, weight) for bits, weight in shared if weight.integers.dtype is not FLOAT8]
        weight = max(shared, key=lambda item: item[0])[1] if shared else own.weights[0]
        found.update(dict.fromkeys(table.lookups, weight))
    return found


def rows(lookup: fx.Node, table: Quantized, indices: Tensor) -> Tensor:
    """What an embedding gives from quantized rows, [..., K]."""
    flat = indices.reshape(-1)
    zero_point = None if table.zero_point is None else table.zero_point[flat]
    values = Quantized(table.integers[flat], table.scale[flat], zero_point, table.group).dequantize()
    return values.reshape(*indices.shape, values.shape[-1]).to(dtype(lookup))


def indices_of(lookup: fx.Node) -> fx.Node:
    """What an embedding looks up."""
    found: fx.Node = arguments(lookup)["indices"]
    return found
