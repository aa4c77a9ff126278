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
        together: units that go before the others are looked at again.
        least: units that stay; they come last in the order, at a loss that says no more than that they are last.
    """
    alive = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    losses = [0.0]
    total = 0.0
    while int(alive.sum()) > least:
        worth = torch.full((count,), torch.inf, dtype=torch.double)
        worth[alive] = 0.0
        for item in readings:
            worth += _worths(item, alive)
        going = torch.argsort(worth, stable=True)[: min(together, int(alive.sum()) - least)]
        for item in readings:
            total += _remove(item, going)
        alive[going] = False
        order += going.tolist()
        start = losses[-1]
        losses += [start + (total - start) * (place + 1) / len(going) for place in range(len(going))]
    rest = alive.nonzero().flatten().tolist()
    order += rest
    losses += [max(total, losses[-1]) * 2 + 1.0] * len(rest)
    return torch.tensor(order), torch.tensor(losses)


def _worths(item: Reading, alive: Tensor) -> Tensor:
    """[U], the loss without each unit alone: tr(W_S (H^-1_SS)^-1 W_S^T) for its columns S."""
    found = torch.zeros(len(alive), dtype=torch.double)
    columns = (item.units >= 0).nonzero().flatten()
    owners = item.units[columns]
    if len(torch.unique(owners)) == len(owners):  # one column each
        found[owners] = item.weight[:, columns].square().sum(0) / item.inverse.diagonal()[columns]
        return found.masked_fill(~alive, 0)
    for unit in alive.nonzero().flatten().tolist():
        mine = (item.units == unit).nonzero().flatten()
        part = item.weight[:, mine]
        found[unit] = (part * torch.linalg.solve(item.inverse[mine][:, mine], part.T).T).sum()
    return found


def _remove(item: Reading, going: Tensor) -> float:
    """Remove units and let the other columns make up for them; the loss."""
    mine = torch.isin(item.units, going).nonzero().flatten()
    part, inner, outer = item.weight[:, mine], item.inverse[mine][:, mine], item.inverse[:, mine]
    solved = torch.linalg.solve(inner, outer.T)  # [S, K]
    loss = float((part * torch.linalg.solve(inner, part.T).T).sum())
    item.weight -= part @ solved
    item.inverse -= outer @ solved
    item.weight[:, mine] = 0
    item.inverse[mine] = 0
    item.inverse[:, mine] = 0
    item.inverse[mine, mine] = 1
    return loss


__all__ = ["Reading", "eliminate", "reading"]
