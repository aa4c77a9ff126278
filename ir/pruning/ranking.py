"""Ranking the units of each family, by the methods of `MaskWeights`, and how many of each family go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..graph import Program, arguments
from ..rewrite import Track
from .channels import Channels
from .costs import unit_macs
from .masks import value
from .sensitivity import Loss, Reach, gradients, reach
from .surgeon import Reading, eliminate, reading
from .units import ROUND, Family
from .weights import gram

DAMP = 0.01
_SWAPS = 100  # exchanges after which rearranging stops
_ROUNDS = 96  # in which neurons are eliminated
_RANKED = 64  # batches whose products units are eliminated by: that takes fewer tokens than fitting those that stay


@dataclass(frozen=True)
class Ranking:
    """The order in which the units of a family go, [U]; the loss when the first of them are gone, [U + 1].

    `joint`: how the loss of a unit depends on which others go, [U, U]; None: it does not.
    """

    order: Tensor
    loss: Tensor
    joint: Tensor | None = None


def by_worth(worth: Tensor, joint: Tensor | None = None) -> Ranking:
    """Units whose losses add up."""
    order = torch.argsort(worth, stable=True)
    loss = torch.cat([worth.new_zeros(1), worth[order].cumsum(0)])
    return Ranking(order, loss, joint)


def rank(
    program: Program,
    families: Sequence[Family],
    method: str,
    batches: Sequence[Sequence[Tensor]],
    loss: Loss | None,
    track: Track,
    seed: int,
    reaches: Mapping[fx.Node, Reach] | None = None,
    worths: Mapping[int, Tensor] | None = None,
) -> list[Ranking]:
    """A ranking of each family by a method of `MaskWeights`; `reaches` of the readers, if known yet.

    `worths`: of the units of a family that no layer reads, by the place of the family: what the outputs lose.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [by_worth(torch.rand(len(family.channels), generator=generator)) for family in families]
    if method == "magnitude":
        return [by_worth(_summed(program, family, None)) for family in families]
    if method in ("fisher", "movement"):
        return _by_gradient(program, families, method, batches, loss, track)
    if method == "wanda":
        powers = {node: total.diagonal() for node, total in grams(program, families, batches, track, None).items()}
        return [by_worth(_summed(program, family, powers)) for family in families]
    if reaches is None:
        reaches = reader_reaches(program, families, batches, loss, track)
    some, reached = spread(batches, reaches)
    totals = grams(program, families, some, track, reached)
    found = []
    for place, family in enumerate(track(list(families), "ranking units")):
        read = bool(family.columns)
        found.append(_eliminated(program, family, totals, reaches) if read else by_worth((worths or {})[place]))
    return found


def spread(
    batches: Sequence[Sequence[Tensor]], reaches: Mapping[fx.Node, Reach]
) -> tuple[Sequence[Sequence[Tensor]], dict[fx.Node, Reach]]:
    """Some batches, from short texts to long ones if they are sorted, and the reaches on those."""
    some = slice(None, None, -(-len(batches) // _RANKED))
    return batches[some], {node: Reach(item.tokens[some], item.channels) for node, item in reaches.items()}


def reader_reaches(
    program: Program,
    families: Sequence[Family],
    batches: Sequence[Sequence[Tensor]],
    loss: Loss | None,
    track: Track,
) -> dict[fx.Node, Reach]:
    """The reach of the layers that read units; and of those that make queries, which attention reads."""
    judges = [axis.reader for family in families for axis in family.columns or family.rows[:1]]
    return reach(program, judges, batches, loss, track)


def _summed(program: Program, family: Family, powers: Mapping[fx.Node, Tensor] | None) -> Tensor:
    """[U], the squares of the weights that read each unit; times those of what they read, where it is known."""
    total = torch.zeros(len(family.channels))
    for axis in family.columns:
        squares = value(program, axis.weight).float().square().sum(0)
        if powers is not None:
            squares = squares * powers[axis.reader]
        units = family.units(axis)
        total.index_add_(0, units[units >= 0], squares[units >= 0])
    return total


def _eliminated(
    program: Program, family: Family, totals: Mapping[fx.Node, Tensor], reaches: Mapping[fx.Node, Reach]
) -> Ranking:
    readings: list[Reading] = [
        reading(
            value(program, axis.weight),
            totals[axis.reader],
            reaches[axis.reader].channels,
            family.units(axis),
            DAMP,
        )
        for axis in family.columns
    ]
    size = len(family.channels)
    together = max(ROUND, size // _ROUNDS // ROUND * ROUND) if family.kind == "neurons" else 1
    order, loss = eliminate(readings, size, together, family.least)
    return Ranking(order, loss)


def grams(
    program: Program,
    families: Sequence[Family],
    batches: Sequence[Sequence[Tensor]],
    track: Track,
    reaches: Mapping[fx.Node, Reach] | None,
) -> dict[fx.Node, Tensor]:
    """Of what each reader reads, sum of x^T x, [K, K]; each token weighed by its reach, where that is known."""
    wanted = {axis.reader for family in families for axis in family.columns}
    found: dict[fx.Node, Tensor] = {}
    lockstep = Lockstep(program, batches, track, "scoring units")

    def visit(node: fx.Node) -> None:
        if node in wanted:
            rows = lockstep.rows(arguments(node)["input"])
            if reaches is not None:
                weights = reaches[node].tokens
                rows = [batch * weight.sqrt().unsqueeze(1) for batch, weight in zip(rows, weights, strict=True)]
            found[node] = gram(rows)

    lockstep.run(visit)
    return found


def _by_gradient(
    program: Program,
    families: Sequence[Family],
    method: str,
    batches: Sequence[Sequence[Tensor]],
    loss: Loss | None,
    track: Track,
) -> list[Ranking]:
    """Fisher information of the units' masks (Kwon et al., 2022), or what the loss gains without each (movement)."""
    axes = [axis for family in families for axis in family.columns]
    weights = {str(axis.weight.target): value(program, axis.weight) for axis in axes}
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
        return [by_worth(item) for item in moved]
    return [by_worth(item.diagonal().clone(), item) for item in joint]


def counts_by_share(families: Sequence[Family], sparsity: float) -> list[int]:
    """How many units of each family stay when each loses the same share."""
    return [family.rounded(round(len(family.channels) * (1 - sparsity))) for family in families]


def counts_by_loss(
    program: Program, channels: Channels, families: Sequence[Family], rankings: Sequence[Ranking], sparsity: float
) -> list[int]:
    """How many units of each family stay when what loses least for its multiplications goes, up to a share of those.

    Neurons go in groups that keep their number a multiple of 8.
    """
    items: list[tuple[float, int, int, float]] = []
    total = 0.0
    stay = [len(family.channels) for family in families]
    for place, (family, found) in enumerate(zip(families, rankings, strict=True)):
        cost, size, loss = unit_macs(program, channels, family), len(family.channels), found.loss.tolist()
        total += cost * size
        cuts = sorted({family.rounded(count) for count in range(size + 1)}, reverse=True)
        steps = [(loss[size - fewer] - loss[size - more], more - fewer) for more, fewer in pairwise(cuts)]
        worst = -float("inf")
        for lost, count in steps:
            worst = max(worst, lost / (cost * count))  # a later step is never taken before an earlier one
            items.append((worst, place, count, cost * count))
    budget = sparsity * total
    for _, place, count, cost in sorted(items, key=lambda item: item[0]):
        if cost <= budget * 1.0000001:
            stay[place] -= count
            budget -= cost
    return stay


def chosen(ranking: Ranking, stay: int) -> Tensor:
    """Booleans [U], True for the units that stay, rearranged by how they depend on one another.

    Two units that do the same are each worth little beside the other; which of both goes should depend on which else
    goes. Greedily, a unit that stays is exchanged for one that goes as long as the joint loss sinks (Kwon et al.,
    2022).
    """
    size = len(ranking.order)
    keep = torch.ones(size, dtype=torch.bool)
    keep[ranking.order[: size - stay]] = False
    if ranking.joint is None or not 0 < stay < size:
        return keep
    joint = ranking.joint
    for _ in range(min(size, _SWAPS)):
        pull = joint @ (~keep).float()  # of every unit with those that go
        leaving = torch.where(keep, joint.diagonal() + 2 * pull, torch.inf)  # what its going adds to the loss
        coming = torch.where(keep, -torch.inf, 2 * pull - joint.diagonal())  # what its staying takes off
        change = leaving.unsqueeze(0) - coming.unsqueeze(1) - 2 * joint  # [comes, goes]
        best = int(change.argmin())
        if not change.flatten()[best] < -1e-9 * joint.diagonal().sum():
            break
        keep[best // size], keep[best % size] = True, False
    return keep
