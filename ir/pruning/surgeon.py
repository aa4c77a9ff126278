"""Optimal brain surgeon for units: one after another goes, and all that stay make up for it each time.

Hassibi and Stork, 1993, for groups of columns and a layer's outputs (Kurtic et al., 2023, "ZipLM"). An output error is
weighed by how far it reaches the outputs of the model: by token and by channel, as if the two were independent (Martens
and Grosse, 2015). So losses of different layers can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reading:
    """A layer that reads units.

    Attributes:
        weight: [N, K], rows in directions whose errors weigh the same.
        inverse: [K, K], of the weighed, damped sum of x^T x.
        units: [K], the unit of each column; -1: none, it stays.
    """

    weight: Tensor
    inverse: Tensor
    units: Tensor


def reading(weight: Tensor, gram: Tensor, channels: Tensor, units: Tensor, damp: float) -> Reading:
    """A layer with weight [N, K].

    Args:
        gram: [K, K], sum of x^T x, each token weighed by its reach.
        channels: [N, N], how errors of two channels of the output count together; up to a factor.
        units: see `Reading`.
        damp: what is added to the diagonal of gram, in units of its mean.
    """
    values, vectors = torch.linalg.eigh(channels.double() / channels.double().trace().clamp(min=1e-30))
    root = vectors * values.clamp(min=0).sqrt()
    damped = gram.double().clone()
    damped.diagonal().add_(damp * damped.diagonal().mean().clamp(min=1e-30))
    return Reading(root.T @ weight.double(), torch.cholesky_inverse(torch.linalg.cholesky(damped)), units)


def eliminate(readings: Sequence[Reading], count: int, together: int, least: int) -> tuple[Tensor, Tensor]:
    """The order in which units go, [U], and the loss when the first of them are gone, [U + 1].

    Args:
        count: of units, U.
        together: units that go before what all others know of them is brought up to date; saves time alone.
        least: units that stay; they come last in the order, at a loss that says no more than that they are last.
    """
    alive = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    losses = [0.0]
    total = 0.0
    while int(alive.sum()) > least:
        wanted = min(together, int(alive.sum()) - least)
        for unit, loss in _next(readings, alive, wanted):
            alive[unit] = False
            total += loss
            order.append(unit)
            losses.append(total)
    rest = alive.nonzero().flatten().tolist()
    order += rest
    losses += [max(total, losses[-1]) * 2 + 1.0] * len(rest)
    return torch.tensor(order), torch.tensor(losses)


def _next(readings: Sequence[Reading], alive: Tensor, wanted: int) -> list[tuple[int, float]]:
    """The units that go next, one after another, and the loss of each; the readings are changed accordingly."""
    places = [_single_columns(item, len(alive)) for item in readings]
    singles = [place for place in places if place is not None]
    if len(singles) == len(readings):
        return _next_columns(readings, singles, alive, wanted)
    found = []
    for _ in range(wanted):
        worth = sum((_worths(item, alive) for item in readings), torch.zeros(len(alive), dtype=torch.double))
        unit = int(worth.masked_fill(~alive, torch.inf).argmin())
        found.append((unit, sum(_remove(item, unit) for item in readings)))
        alive = alive.clone()
        alive[unit] = False
    return found


def _single_columns(item: Reading, count: int) -> Tensor | None:
    """[U], the column of each unit; None where units have several, or none."""
    columns = (item.units >= 0).nonzero().flatten()
    if len(columns) != count or len(torch.unique(item.units[columns])) != count:
        return None
    return columns[torch.argsort(item.units[columns])]


def _next_columns(
    readings: Sequence[Reading], places: Sequence[Tensor], alive: Tensor, wanted: int
) -> list[tuple[int, float]]:
    """`_next` for units of one column: the inverse is brought up to date once for all that go.

    With H^-1 - sum u u^T the inverse without the columns that went, removing column j adds u = h / sqrt(h_j), h being
    the j-th column of that.
    """
    updates: list[list[Tensor]] = [[] for _ in readings]
    diagonals = [item.inverse.diagonal().clone() for item in readings]
    found: list[tuple[int, float]] = []
    alive = alive.clone()
    for _ in range(wanted):
        worth = torch.zeros(len(alive), dtype=torch.double)
        for item, place, diagonal in zip(readings, places, diagonals, strict=True):
            worth += item.weight.square().sum(0)[place] / diagonal[place]
        unit = int(worth.masked_fill(~alive, torch.inf).argmin())
        found.append((unit, float(worth[unit])))
        alive[unit] = False
        for item, place, diagonal, done in zip(readings, places, diagonals, updates, strict=True):
            column = place[unit]
            across = item.inverse[:, column] - sum((u * u[column] for u in done), torch.zeros_like(diagonal))
            item.weight -= torch.outer(item.weight[:, column], across / across[column])
            done.append(across / across[column].sqrt())
            diagonal -= done[-1].square()
    for item, place, done in zip(readings, places, updates, strict=True):
        changes = torch.stack(done)
        item.inverse -= changes.T @ changes
        _isolate(item, place[torch.tensor([unit for unit, _ in found])])
    return found


def _worths(item: Reading, alive: Tensor) -> Tensor:
    """[U], the loss without each unit alone: tr(W_S (H^-1_SS)^-1 W_S^T) for its columns S."""
    found = torch.zeros(len(alive), dtype=torch.double)
    for unit in alive.nonzero().flatten().tolist():
        mine = (item.units == unit).nonzero().flatten()
        part = item.weight[:, mine]
        found[unit] = (part * torch.linalg.solve(item.inverse[mine][:, mine], part.T).T).sum()
    return found


def _remove(item: Reading, unit: int) -> float:
    """Remove a unit and let the other columns make up for it; the loss."""
    mine = (item.units == unit).nonzero().flatten()
    part, inner, outer = item.weight[:, mine], item.inverse[mine][:, mine], item.inverse[:, mine]
    solved = torch.linalg.solve(inner, outer.T)  # [S, K]
    loss = float((part * torch.linalg.solve(inner, part.T).T).sum())
    item.weight -= part @ solved
    item.inverse -= outer @ solved
    _isolate(item, mine)
    return loss


def _isolate(item: Reading, columns: Tensor) -> None:
    """Columns that went have no part in anything any more."""
    item.weight[:, columns] = 0
    item.inverse[columns] = 0
    item.inverse[:, columns] = 0
    item.inverse[columns, columns] = 1
