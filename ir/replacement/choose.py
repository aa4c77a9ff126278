"""Which attentions may be replaced, by which kind, so that the outputs stay close enough: measured on data.

One attention is replaced at a time, and the error that this makes at the outputs is measured. The errors hardly
influence one another, so that their sums say in which order to go; whether all together are close enough is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..calibration import target
from ..calibration.lockstep import Lockstep, Visit
from ..calibration.target import Target
from ..graph import Program
from ..ops.attention import attention
from ..rewrite import Track
from .kind import Kind, compute
from .site import Sample, Site


@dataclass(frozen=True, eq=False)
class Candidate:
    """A kind for a site, with its weights. `seconds` it takes, and exact attention; None: not measured."""

    site: Site
    kind: Kind
    weights: Mapping[str, Tensor]
    seconds: float | None = None
    exact_seconds: float | None = None

    @property
    def saved(self) -> float:
        """Seconds that it saves; 0 where that was not measured."""
        return 0.0 if self.seconds is None or self.exact_seconds is None else self.exact_seconds - self.seconds

    def output(self, inputs: Sequence[Any]) -> Tensor:
        """The attention's result for query, key, value and key mask, with the weights in their dtype, as stored."""
        wanted = inputs[0].dtype
        weights = {name: item.to(wanted) if item.is_floating_point() else item for name, item in self.weights.items()}
        found: Tensor = self.kind.attend(compute, self.site, inputs, weights)
        return found


@dataclass(frozen=True)
class Chosen:
    """The candidates that are used, the error of all together, and that of each by itself."""

    used: list[Candidate]
    error: float
    errors: Mapping[Candidate, float]


def samples_of(site: Site, lockstep: Lockstep) -> list[Sample]:
    """What each batch brings to a site whose inputs are computed, in fp32, in which weights are fitted."""
    values = [None if node is None else lockstep.values(node) for node in site.inputs]
    found = []
    for index in range(len(lockstep.batches)):
        inputs: list[Any] = [None if item is None else item[index] for item in values]
        inputs = [item.float() if item is not None and item.is_floating_point() else item for item in inputs]
        args = {name: item for name, item in site.given.items() if not isinstance(item, fx.Node)}
        tensors: dict[str, Any] = dict(zip(("query", "key", "value", "key_mask"), inputs, strict=True))
        found.append(Sample(**tensors, output=attention(**{**args, **tensors})))
    return found


def replacing(lockstep: Lockstep, candidates: Iterable[Candidate]) -> Visit:
    """A visit that computes some attentions in other ways."""
    by_node = {item.site.node: item for item in candidates}

    def visit(node: fx.Node) -> list[Any] | None:
        candidate = by_node.get(node)
        if candidate is None:
            return None
        values = [None if used is None else lockstep.values(used) for used in candidate.site.inputs]
        return [
            candidate.output([None if item is None else item[index] for item in values])
            for index in range(len(lockstep.batches))
        ]

    return visit


def within(
    program: Program,
    candidates: Sequence[Candidate],
    batches: Sequence[Sequence[Tensor]],
    wanted: Target,
    track: Track,
) -> Chosen:
    """As many attentions replaced as the target allows, those that harm least first; of a site's kinds the best."""
    few = target.few(batches)
    errors = _errors(program, candidates, few, wanted, track)
    best: dict[Site, Candidate] = {}
    for candidate in candidates:
        known = best.get(candidate.site)
        if known is None or errors[candidate] < errors[known]:
            best[candidate.site] = candidate
    order = sorted(best.values(), key=errors.__getitem__)
    whole = target.run(program, batches)
    used: list[Candidate] = []
    reached = 0.0
    skipped = 0
    for candidate in track(order, "measuring attentions replaced together"):  # errors do not quite add up
        if skipped > 1:
            break
        outputs = target.run(program, batches, _together([*used, candidate]))
        if wanted.reached(outputs, whole):
            used.append(candidate)
            reached = wanted.error(outputs, whole)
        else:
            skipped += 1
    return Chosen(used, reached, errors)


def faster(
    program: Program,
    candidates: Sequence[Candidate],
    batches: Sequence[Sequence[Tensor]],
    speedup: float,
    wanted: Target,
    track: Track,
) -> Chosen:
    """As few attentions replaced as make all attention together so many times as fast, for the least error.

    Per second that they save, those that harm least are replaced first.
    """
    errors = _errors(program, candidates, target.few(batches), wanted, track)
    exact = {item.site: item.exact_seconds or 0.0 for item in candidates}
    left = sum(exact.values())
    allowed = left / speedup
    best: dict[Site, Candidate] = {}
    for candidate in candidates:
        known = best.get(candidate.site)
        if candidate.saved > 0 and (known is None or _price(candidate, errors) < _price(known, errors)):
            best[candidate.site] = candidate
    used: list[Candidate] = []
    for candidate in sorted(best.values(), key=lambda item: _price(item, errors)):
        if left <= allowed:
            break
        used.append(candidate)
        left -= candidate.saved
    outputs = target.run(program, batches, _together(used))
    return Chosen(used, wanted.error(outputs, target.run(program, batches)), errors)


def _price(candidate: Candidate, errors: Mapping[Candidate, float]) -> float:
    return errors[candidate] / candidate.saved


def _together(candidates: Sequence[Candidate]) -> Any:
    return lambda lockstep: replacing(lockstep, candidates)


def _errors(
    program: Program,
    candidates: Sequence[Candidate],
    batches: Sequence[Sequence[Tensor]],
    wanted: Target,
    track: Track,
) -> dict[Candidate, float]:
    truth = target.run(program, batches)
    return {
        candidate: wanted.error(target.run(program, batches, _together([candidate])), truth)
        for candidate in track(candidates, "measuring each attention replaced alone")
    }
