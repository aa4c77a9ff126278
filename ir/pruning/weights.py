"""Masks of single weights: the criteria by which their numbers are scored, and the walk that prunes layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep, blaming
from ..equality import sqnr_db
from ..graph import Program, arguments
from ..layers import name_of
from ..pattern import Refusal
from ..rewrite import Sparsity, Track
from .masks import stored, value
from .select import Pattern, lowest, mask, whole
from .sparsegpt import refit, sparsegpt

aten = torch.ops.aten
_ROWS = 1024  # tokens of the calibration data that the error of a layer is measured on


@dataclass(frozen=True)
class Target:
    """A weight that is to be pruned, and the linear layers that read it."""

    weight: fx.Node
    readers: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """Of the first of its layers."""
        return name_of(self.readers[0])


@dataclass(frozen=True)
class Pruned:
    """The numbers of a weight [N, K] and its mask, False at zeros; and what that does to the layer."""

    values: Tensor
    keep: Tensor
    sqnr_db: float | None = None

    def report(self, target: Target) -> Sparsity:
        """For the table."""
        return Sparsity(target.name, self.keep.numel(), int((~self.keep).sum()), self.sqnr_db)


def targets(program: Program, linears: Sequence[fx.Node], explicit: bool) -> tuple[list[Target], list[Refusal]]:
    """The weights of linear layers; what embeddings read too and what makes the outputs only where it is `explicit`."""
    found: dict[fx.Node, list[fx.Node]] = {}
    refusals = []
    for node in linears:
        weight = stored(arguments(node)["weight"])
        reason = None
        if weight is None:
            reason = "its weight is computed"
        elif program.tensor(weight).dim() != 2 or not program.tensor(weight).is_floating_point():
            reason = f"weight {weight.target} is no matrix of floats"
        elif not explicit:
            reason = _spared(node, weight)
        if reason is None and weight is not None:
            found.setdefault(weight, []).append(node)
        else:
            refusals.append(Refusal(str(reason), "mask", node.name))
    return [Target(weight, tuple(readers)) for weight, readers in found.items()], refusals


def _spared(node: fx.Node, weight: fx.Node) -> str | None:
    """Why a layer is not pruned unless it is named: pruning papers leave embeddings and the head alone."""
    readers = {reader for user in weight.users for reader in (user, *user.users)}
    if any(reader.target is aten.embedding.default for reader in readers):
        return f"weight {weight.target} is an embedding too; name it in layers to prune it"
    if any(user.op == "output" for user in node.users):
        return f"{name_of(node)} makes an output of the model; name it in layers to prune it"
    return None


@dataclass(frozen=True)
class Criterion:
    """How numbers are scored and which of them go.

    Attributes:
        method: "random", "magnitude", "wanda", "sparsegpt", or one whose scores are `given`.
        refit: whether the other numbers make up for the zeros, by the calibration data.
        generator: of "random".
        given: scores by weight, of "fisher" and "movement".
    """

    method: str
    sparsity: float
    pattern: Pattern
    refit: bool
    generator: torch.Generator
    given: Mapping[fx.Node, Tensor]

    def scores(self, target: Target, weight: Tensor, power: Tensor | None) -> Tensor:
        """[N, K], the lowest of which go; `power` is the sum of squares of each input, [K].

        What is zero already goes first, whatever the method: it counts, and costs nothing.
        """
        return self._scores(target, weight, power).masked_fill(whole(weight == 0, self.pattern), -torch.inf)

    def _scores(self, target: Target, weight: Tensor, power: Tensor | None) -> Tensor:
        if self.method == "random":
            return torch.rand(weight.shape, generator=self.generator)
        if self.method == "magnitude":
            return weight.abs()
        if self.method == "wanda":
            assert power is not None
            return weight.abs() * power.sqrt()
        return self.given[target.weight]

    def pruned(self, target: Target, weight: Tensor, rows: Sequence[Tensor] | None, keep: Tensor | None) -> Pruned:
        """One weight [N, K] pruned.

        Args:
            rows: what its layers read, [tokens, K] by batch; None: unknown.
            keep: a mask that is decided already.
        """
        weight = weight.float()
        total = None if rows is None else gram(rows if self.method == "wanda" else balanced(rows, weight))
        if self.method == "sparsegpt":
            assert total is not None
            values, keep = sparsegpt(weight, total, self.sparsity, self.pattern)
            values = values if self.refit else weight
        else:
            if keep is None:
                scores = self.scores(target, weight, None if total is None else total.diagonal())
                keep = mask(scores, self.sparsity, self.pattern, by_row=self.method == "wanda")
            values = weight
            if self.refit:
                assert total is not None
                values = refit(weight, total, keep)
        masked = torch.where(keep, values, 0)
        return Pruned(masked, keep, None if rows is None else output_sqnr_db(rows, masked, weight))


def gram(rows: Sequence[Tensor]) -> Tensor:
    """Sum of x^T x over rows [tokens, K] of all batches, [K, K]."""
    width = rows[0].shape[-1]
    total = torch.zeros(width, width)
    for batch in rows:
        total.addmm_(batch.float().T, batch.float())
    return total


def balanced(rows: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Rows [tokens, K] by batch in units of the length of what the layer gives for them.

    Squared errors of outputs then count by token. The few tokens that are a hundred times as long as the others, as
    many Transformers have them behind feed-forward blocks, would else be all that is fitted to.
    """
    lengths = ((batch.float() @ weight.float().T).norm(dim=1, keepdim=True) for batch in rows)
    return [batch.float() / length.clamp(min=1e-12) for batch, length in zip(rows, lengths, strict=True)]


def output_sqnr_db(rows: Sequence[Tensor], new: Tensor, old: Tensor) -> float:
    """SQNR of a linear layer's output with a new weight, by the same inputs, without its bias."""
    every = torch.cat([batch.float() for batch in rows])
    x = every[torch.linspace(0, len(every) - 1, min(_ROWS, len(every))).round().long()]
    return sqnr_db(x @ new.float().T, x @ old.float().T)


def prune(
    program: Program,
    found: Sequence[Target],
    criterion: Criterion,
    batches: Sequence[Sequence[Tensor]],
    track: Track,
    decided: Mapping[fx.Node, Tensor] | None = None,
) -> dict[Target, Pruned]:
    """Prune weights, with calibration data in graph order: each by what it reads behind the pruned ones before it."""
    result: dict[Target, Pruned] = {}
    known = decided or {}
    if not batches:
        for target in track(list(found), "masking weights"):
            weight = value(program, target.weight)
            result[target] = criterion.pruned(target, weight, None, known.get(target.weight))
        return result
    places = {reader: target for target in found for reader in target.readers}
    lockstep = Lockstep(program, batches, track, "masking weights")

    def visit(node: fx.Node) -> list[Tensor] | None:
        target = places.get(node)
        if target is None:
            return None
        given = arguments(node)
        weight = value(program, target.weight)
        if target not in result:
            rows = lockstep.rows(given["input"])
            with blaming(target.name):
                result[target] = criterion.pruned(target, weight, rows, known.get(target.weight))
        new = result[target].values.to(weight.dtype)
        bias = None if given["bias"] is None else lockstep.values(given["bias"])[0]
        return [torch.nn.functional.linear(item, new, bias) for item in lockstep.values(given["input"])]

    lockstep.run(visit)
    return result


def decide(
    program: Program,
    found: Sequence[Target],
    criterion: Criterion,
    batches: Sequence[Sequence[Tensor]],
    track: Track,
) -> dict[fx.Node, Tensor]:
    """One threshold for all weights: their masks, with statistics of the model as it is."""
    power: dict[Target, Tensor] = {}
    if criterion.method == "wanda":
        places = {target.readers[0]: target for target in found}
        lockstep = Lockstep(program, batches, track, "scoring weights")

        def visit(node: fx.Node) -> None:
            if node in places:
                rows = lockstep.rows(arguments(node)["input"])
                power[places[node]] = torch.stack([batch.float().square().sum(0) for batch in rows]).sum(0)

        lockstep.run(visit)
    scores = [criterion.scores(item, value(program, item.weight).float(), power.get(item)) for item in found]
    keeps = lowest(scores, criterion.sparsity)
    return {target.weight: keep for target, keep in zip(found, keeps, strict=True)}
