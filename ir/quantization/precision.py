"""Mixed precision: which sites must be finer than the cheapest way, so that the outputs stay close enough.

The errors that sites add to the outputs hardly influence one another, so they are measured one site at a time and
added up; what the sum misses shows when the whole is measured, and the budget is then made smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from ..calibration import target
from ..calibration.lockstep import Lockstep, Visit
from ..calibration.target import Target
from ..graph import Program, arguments, shape
from ..rewrite import Track
from .choice import UNTOUCHED, Choice
from .sites import Site
from .tables import Table, indices_of, looked_up, rows

Place = Site | Table  # what there is to choose for
_ROUNDS = 4


def run(program: Program, batches: Sequence[Sequence[Tensor]], choices: Mapping[Place, Choice]) -> list[Tensor]:
    """Each float output's vectors [tokens, D] over all batches, padding left out, with some places quantized."""
    return target.run(program, batches, lambda lockstep: applied(program, lockstep, choices.get, choices))


def applied(
    program: Program, lockstep: Lockstep, choose: Callable[[Site], Choice | None], choices: Mapping[Place, Choice]
) -> Visit:
    """A visit that lets linears and embeddings give what the choices make of them.

    Args:
        choose: asked once a site, when its input is there, for the last word on its choice.
        choices: of every site and table, as far as they are made beforehand.
    """
    places = {
        linear: (site, index) for site in choices if isinstance(site, Site) for index, linear in enumerate(site.linears)
    }
    tables = looked_up(choices)
    chosen: dict[Site, Choice] = {}
    inputs: dict[Site, list[Tensor]] = {}

    def visit(node: fx.Node) -> list[Any] | None:
        if node in tables:
            return [lockstep.hold(rows(node, tables[node], item)) for item in lockstep.values(indices_of(node))]
        if node not in places:
            return None
        site, index = places[node]
        if site not in chosen:
            chosen[site] = choose(site) or UNTOUCHED
            inputs[site] = [lockstep.hold(chosen[site].inputs(value)) for value in lockstep.values(site.source)]
        given = arguments(node)
        weight = program.tensor(given["weight"])
        bias = None if given["bias"] is None else program.tensor(given["bias"])
        found: list[Any] = [lockstep.hold(chosen[site].output(value, index, weight, bias)) for value in inputs[site]]
        if node is site.linears[-1]:
            del inputs[site]
        return found

    return visit


def split(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to fit to, and every fourth to judge by; all for both where there are fewer than four."""
    if len(batches) < 4:
        return batches, batches
    return [batch for place, batch in enumerate(batches) if place % 4 != 3], batches[3::4]


def cost(place: Place, choice: Choice) -> float:
    """Time of a choice beyond that of integers of 8 bits with a fixed range: in passes over one number of one token.

    Bytes in the file count a little, so that among what takes the same time the small ones are cheap. Measured on Zen 4
    with ONNX Runtime 1.32: a pass over an activation takes 0.2 ns a number, a multiplication and addition of float32
    13 ps longer than one of int8.
    """
    stored = 0.00025 * ((32 if choice.weights is None else choice.bits) - 8)  # of a number
    if isinstance(place, Table):
        return float(stored * math.prod(shape(place.stored)))
    width = shape(place.linears[0].args[1])[1]
    outputs = sum(shape(linear)[-1] for linear in place.linears)
    smoothing = width if choice.smooth is not None else 0
    stored *= width * outputs
    if choice.activation.level == "float":
        return float(smoothing + stored + 0.065 * width * outputs)
    ranging = {"tensor": width / 2, "token": 2 * (width + outputs), "float8": 2 * (width + outputs)}
    return float(smoothing + stored + ranging.get(choice.activation.level, 0))


def closest(site: Site, choices: Iterable[Choice], most: float = 1.0) -> Choice:
    """The cheapest choice with no more than `most` times the smallest noise; of equal cost the one with the least."""
    choices = list(choices)
    least = min(choice.noise for choice in choices)
    near = [choice for choice in choices if choice.noise <= most * least]
    return min(near, key=lambda choice: (cost(site, choice), choice.noise))


Remember = Callable[[Choice, Callable[[], float]], float]
Finish = Callable[[Mapping[Place, Choice]], Mapping[Place, Choice]]


@dataclass(frozen=True)
class Search:
    """What a search found: a finished choice for each place, its error, and whether that reaches the target."""

    choices: Mapping[Place, Choice]
    error: float
    reached: bool


def search(
    program: Program,
    options: Mapping[Place, Sequence[Choice]],
    batches: Sequence[Sequence[Tensor]],
    wanted: Target,
    finish: Finish,
    track: Track,
    remember: Remember = lambda choice, measure: measure(),
    original: Program | None = None,
) -> Search:
    """The cheapest options with which the outputs reach the target, each site's from the cheapest on as needed.

    Args:
        options: of each site and table.
        batches: on which errors are measured; better not those that the options were fitted to.
        finish: what is done with the options chosen before they are used; it may lower their error.
        original: the program whose outputs are the truth; None: `program`.
        remember: gives an option's error, which is measured only if it is not known already.
    """
    few = target.few(batches)
    true = program if original is None else original
    truth = run(true, few, {})

    # What a layer does to a table that has its weight is counted as the layer's.
    tied: dict[Place, Choice] = {
        place: found[0] for place, found in options.items() if isinstance(place, Table) and place.readers
    }

    def error(alone: Mapping[Place, Choice]) -> float:
        return wanted.error(run(program, few, {**tied, **alone}), truth)

    pairs = [(site, choice) for site, found in options.items() for choice in found if choice is not UNTOUCHED]
    errors = {(site, id(UNTOUCHED)): 0.0 for site in options}
    for site, choice in track(pairs, "measuring the sensitivity of layers"):
        errors[site, id(choice)] = remember(choice, partial(error, {site: choice}))
    whole = truth if few is batches else run(true, batches, {})
    best: Search | None = None
    budget = wanted.budget
    known: list[dict[Place, Choice]] = []
    for _ in range(_ROUNDS):
        choices = _cheapest(options, errors, budget)
        if choices in known:
            break
        known.append(choices)
        finished = finish(choices)
        outputs = run(program, batches, finished)
        found = Search(finished, wanted.error(outputs, whole), wanted.reached(outputs, whole))
        if best is None or found.reached >= best.reached:
            better = best is None or not best.reached or _total(found.choices) < _total(best.choices)
            best = found if better else best
        if wanted.metric is not None:
            budget *= 1.5 if found.reached else 0.5
        else:
            budget *= min(3.0, max(0.2, 0.95 * wanted.budget / found.error)) if found.error else 3.0
    assert best is not None
    return best


def _total(choices: Mapping[Place, Choice]) -> float:
    return sum(cost(site, choice) for site, choice in choices.items())


def _cheapest(
    options: Mapping[Place, Sequence[Choice]], errors: Mapping[tuple[Place, int], float], budget: float
) -> dict[Place, Choice]:
    """From the cheapest option of every place, make finer what takes most error off for its time, to the budget."""
    current = {site: min(found, key=lambda choice: cost(site, choice)) for site, found in options.items()}
    while sum(errors[site, id(choice)] for site, choice in current.items()) > budget:
        best: tuple[float, Place, Choice] | None = None
        for site, found in options.items():
            now, price = errors[site, id(current[site])], cost(site, current[site])
            for choice in found:
                gain, extra = now - errors[site, id(choice)], cost(site, choice) - price
                if gain > 0 and extra >= 0:
                    rate = gain / extra if extra else math.inf
                    if best is None or rate > best[0]:
                        best = (rate, site, choice)
        if best is None:
            break
        _, site, choice = best
        current[site] = choice
    return current
