"""Pruning heads and neurons: how units are scored, how many of each family go, and how the rest makes up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..calibration.sweep import checked_gram, inverse_factor
from ..graph import Program, arguments
from ..rewrite import Track
from .channels import Channels
from .costs import unit_macs
from .masks import put, stored
from .sensitivity import Loss, gradients
from .units import Family
from .weights import gram, output_sqnr_db

_DAMP = 0.01
_SWAPS = 100


@dataclass(frozen=True)
class Scores:
    """What each unit of a family is worth, [U]; and of "fisher" how it depends on the others, [U, U]."""

    worth: Tensor
    joint: Tensor | None = None


def scores(
    program: Program,
    families: Sequence[Family],
    method: str,
    batches: Sequence[Sequence[Tensor]],
    loss: Loss | None,
    track: Track,
    seed: int,
) -> list[Scores]:
    """The worth of every unit of each family, by a method of `MaskWeights`."""
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [Scores(torch.rand(len(family.channels), generator=generator)) for family in families]
    if method == "magnitude":
        return [Scores(_summed(program, family, None)) for family in families]
    if method in ("fisher", "movement"):
        return _sensitivity(program, families, method, batches, loss, track)
    grams = _grams(program, families, batches, track)
    if method == "wanda":
        return [Scores(_summed(program, family, grams)) for family in families]
    return [Scores(_surgeon(program, family, grams)) for family in families]


def _summed(program: Program, family: Family, grams: Mapping[fx.Node, Tensor] | None) -> Tensor:
    """[U], the squares of the weights that read each unit; times those of what they read, where it is known."""
    total = torch.zeros(len(family.channels))
    for axis in family.columns:
        squares = program.tensor(axis.weight).detach().float().square().sum(0)
        if grams is not None:
            squares = squares * grams[axis.reader].diagonal()
        units = family.units(axis)
        total.index_add_(0, units[units >= 0], squares[units >= 0])
    return total


def _surgeon(program: Program, family: Family, grams: Mapping[fx.Node, Tensor]) -> Tensor:
    """[U], the squared error of the outputs without each unit, once the others have made up for it.

    The loss of the columns S is tr(W_S (H^-1_SS)^-1 W_S^T), of a group of weights as of one (Kurtic et al., 2023).
    """
    total = torch.zeros(len(family.channels))
    for axis in family.columns:
        weight = program.tensor(axis.weight).detach().double()
        factor = inverse_factor(grams[axis.reader], _DAMP)
        inverse = factor.T @ factor
        units = family.units(axis)
        for unit in range(len(family.channels)):
            mine = (units == unit).nonzero().flatten()
            part = weight[:, mine]
            total[unit] += (part @ torch.linalg.solve(inverse[mine][:, mine], part.T)).diagonal().sum().float()
    return total


def _grams(
    program: Program, families: Sequence[Family], batches: Sequence[Sequence[Tensor]], track: Track
) -> dict[fx.Node, Tensor]:
    """Of what each reader reads, sum x^T x, [K, K]."""
    wanted = {axis.reader for family in families for axis in family.columns}
    found: dict[fx.Node, Tensor] = {}
    lockstep = Lockstep(program, batches, track, "scoring units")

    def visit(node: fx.Node) -> None:
        if node in wanted:
            found[node] = gram(lockstep.rows(arguments(node)["input"]))

    lockstep.run(visit)
    return found


def _sensitivity(
    program: Program,
    families: Sequence[Family],
    method: str,
    batches: Sequence[Sequence[Tensor]],
    loss: Loss | None,
    track: Track,
) -> list[Scores]:
    """Fisher information of the units' masks (Kwon et al., 2022), or what the loss gains without each (movement)."""
    axes = [axis for family in families for axis in family.columns]
    weights = {str(axis.weight.target): program.tensor(axis.weight).detach() for axis in axes}
    joint = [torch.zeros(len(family.channels), len(family.channels)) for family in families]
    moved = [torch.zeros(len(family.channels)) for family in families]
    for found in gradients(program, sorted(weights), batches, loss, track):
        for place, family in enumerate(families):
            slope = torch.zeros(len(family.channels))
            for axis in family.columns:
                # y = (x m) W^T: the derivative by the mask m is that by W, times W, summed over a column
                name = str(axis.weight.target)
                each = (weights[name] * found[name]).float().sum(0)
                units = family.units(axis)
                slope.index_add_(0, units[units >= 0], each[units >= 0])
            joint[place].addr_(slope, slope)
            moved[place] -= slope
    if method == "movement":
        return [Scores(item) for item in moved]
    return [Scores(item.diagonal().clone(), item) for item in joint]


def counts_by_share(families: Sequence[Family], sparsity: float) -> list[int]:
    """How many units of each family stay when each loses the same share."""
    return [family.rounded(round(len(family.channels) * (1 - sparsity))) for family in families]


def counts_by_worth(
    program: Program, channels: Channels, families: Sequence[Family], scores: Sequence[Scores], sparsity: float
) -> list[int]:
    """How many units of each family stay when the least worth for their multiplications go, up to a share of those.

    Neurons go in groups that keep their number a multiple of 8.
    """
    items: list[tuple[float, int, int, float]] = []
    total = 0.0
    stay = [len(family.channels) for family in families]
    for place, (family, found) in enumerate(zip(families, scores, strict=True)):
        cost, size = unit_macs(program, channels, family), len(family.channels)
        total += cost * size
        order = torch.sort(found.worth).values.tolist()
        cuts = sorted({family.rounded(count) for count in range(size + 1)}, reverse=True)
        for more, fewer in pairwise(cuts):
            worth = sum(order[size - more : size - fewer])
            items.append((worth / (cost * (more - fewer)), place, more - fewer, cost * (more - fewer)))
    budget = sparsity * total
    for _, place, count, cost in sorted(items):
        if cost <= budget * 1.0000001:
            stay[place] -= count
            budget -= cost
    return stay


def chosen(scores: Scores, stay: int) -> Tensor:
    """Booleans [U], True for the units that stay: those worth most, rearranged by how they depend on one another.

    Two units that do the same are each worth little beside the other; which of both goes should depend on which else
    goes. Greedily, a unit that stays is exchanged for one that goes as long as the joint loss sinks (Kwon et al.,
    2022).
    """
    size = len(scores.worth)
    keep = torch.zeros(size, dtype=torch.bool)
    keep[torch.argsort(scores.worth, descending=True, stable=True)[:stay]] = True
    if scores.joint is None or not 0 < stay < size:
        return keep
    joint = scores.joint
    for _ in range(min(size, _SWAPS)):
        gone = (~keep).float()
        pull = joint @ gone  # of every unit with those that go
        leaving = torch.where(keep, joint.diagonal() + 2 * pull, torch.inf)  # what its going adds to the loss
        coming = torch.where(keep, -torch.inf, 2 * pull - joint.diagonal())  # what its staying takes off
        change = leaving.unsqueeze(0) - coming.unsqueeze(1) - 2 * joint  # [comes, goes]
        best = int(change.argmin())
        if not change.flatten()[best] < -1e-9 * joint.diagonal().sum():
            break
        keep[best // size], keep[best % size] = True, False
    return keep


def refitted(weight: Tensor, gram: Tensor, keep: Tensor, damp: float = _DAMP) -> Tensor:
    """The weight [N, K] with zeros in the columns that go, the others fitted by least squares to the outputs as before.

    Args:
        gram: [K, K], sum x^T x.
        keep: [K].
        damp: what pulls towards the weight as it was, in units of the mean of gram's diagonal.
    """
    total = checked_gram(gram, weight.shape[1]).double()
    wide = weight.double()
    kept = keep.nonzero().flatten()
    pull = damp * total.diagonal().mean().clamp(min=1e-12)
    inner = total[kept][:, kept]
    inner.diagonal().add_(pull)
    outer = wide @ total[:, kept] + pull * wide[:, kept]
    result = torch.zeros_like(wide)
    result[:, kept] = torch.linalg.solve(inner, outer.T).T
    return result.to(weight.dtype)


@dataclass(frozen=True)
class Reader:
    """The weight of a layer that reads units, as it is to be, its columns that stay, [K], and the error it makes."""

    values: Tensor
    keep: Tensor
    sqnr_db: float | None


def readers(
    program: Program,
    families: Sequence[Family],
    keeps: Sequence[Tensor],
    refit: bool,
    batches: Sequence[Sequence[Tensor]],
    track: Track,
) -> dict[fx.Node, Reader]:
    """The layers that read units without those that go, in graph order: each behind the thinned ones before it."""
    wanted: dict[fx.Node, Tensor] = {}
    for family, keep in zip(families, keeps, strict=True):
        for axis in family.columns:
            units = family.units(axis)
            mine = (units < 0) | keep[units.clamp(min=0)]
            wanted[axis.reader] = wanted[axis.reader] & mine if axis.reader in wanted else mine
    found: dict[fx.Node, Reader] = {}

    def thinned(node: fx.Node, rows: Sequence[Tensor] | None) -> Reader:
        weight: Tensor = _weight(program, node).detach()
        keep = wanted[node]
        values = torch.where(keep, weight, 0)
        if rows is None:
            return Reader(values, keep, None)
        if refit:
            values = refitted(weight, gram(rows), keep)
        return Reader(values, keep, output_sqnr_db(rows, values, weight))

    if not batches:
        return {node: thinned(node, None) for node in wanted}
    lockstep = Lockstep(program, batches, track, "thinning layers")

    def visit(node: fx.Node) -> list[Tensor] | None:
        if node not in wanted:
            return None
        given = arguments(node)
        found[node] = thinned(node, lockstep.rows(given["input"]))
        bias = None if given["bias"] is None else lockstep.values(given["bias"])[0]
        return [F.linear(value, found[node].values, bias) for value in lockstep.values(given["input"])]

    lockstep.run(visit)
    return found


def _weight(program: Program, node: fx.Node) -> Tensor:
    weight = stored(arguments(node)["weight"])
    assert weight is not None
    return program.tensor(weight)


def put_masks(program: Program, family: Family, keep: Tensor) -> None:
    """Mask the rows and columns of the units that go, and what else belongs to them."""
    for axis in (*family.columns, *family.rows):
        units = family.units(axis)
        stays = (units < 0) | keep[units.clamp(min=0)]
        sizes = program.tensor(axis.weight).shape
        place = axis.axis % len(sizes)
        put(program, axis.weight, stays.reshape([-1 if index == place else 1 for index in range(len(sizes))]))
