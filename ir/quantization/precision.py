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

_ROUNDS = 4


def run(program: Program, batches: Sequence[Sequence[Tensor]], choices: Mapping[Site, Choice]) -> list[Tensor]:
    """Each float output's vectors [tokens, D] over all batches, padding left out, with some sites quantized."""
    return target.run(program, batches, lambda lockstep: applied(program, lockstep, choices.get, choices))


def applied(
    program: Program, lockstep: Lockstep, choose: Callable[[Site], Choice | None], sites: Iterable[Site]
) -> Visit:
    """A visit that lets the linears of sites give what the choice made of each gives; `choose` is asked once a site."""
    places = {linear: (site, index) for site in sites for index, linear in enumerate(site.linears)}
    chosen: dict[Site, Choice] = {}
    inputs: dict[Site, list[Tensor]] = {}

    def visit(node: fx.Node) -> list[Any] | None:
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


def cost(site: Site, choice: Choice) -> float:
    """Time of a choice beyond that of integers of 8 bits with a fixed range: in passes over one number of one token.

    Bytes in the file count a little, so that among what takes the same time the small ones are cheap. Measured on Zen 4
    with ONNX Runtime 1.32: a pass over an activation takes 0.2 ns a number, a multiplication and addition of float32
    13 ps longer than one of int8.
    """
    width = shape(site.linears[0].args[1])[1]
    outputs = sum(shape(linear)[-1] for linear in site.linears)
    smoothing = width if choice.smooth is not None else 0
    stored = 0.00025 * ((32 if choice.weights is None else choice.bits) - 8) * width * outputs
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
Finish = Callable[[Mapping[Site, Choice]], Mapping[Site, Choice]]


@dataclass(frozen=True)
class Search:
    """What a search found: a finished choice for each site, its error, and whether that reaches the target."""

    choices: Mapping[Site, Choice]
    error: float
    reached: bool


def search(
    program: Program,
    options: Mapping[Site, Sequence[Choice]],
    batches: Sequence[Sequence[Tensor]],
    wanted: Target,
    finish: Finish,
    track: Track,
    remember: Remember = lambda choice, measure: measure(),
    original: Program | None = None,
) -> Search:
    """The cheapest options with which the outputs reach the target, each site's from the cheapest on as needed.

    Args:
        options: of each site.
        batches: on which errors are measured; better not those that the options were fitted to.
        finish: what is done with the options chosen before they are used; it may lower their error.
        original: the program whose outputs are the truth; None: `program`.
        remember: gives an option's error, which is measured only if it is not known already.
    """
    few = target.few(batches)
    true = program if original is None else original
    truth = run(true, few, {})

    def error(alone: Mapping[Site, Choice]) -> float:
        return wanted.error(run(program, few, alone), truth)

    pairs = [(site, choice) for site, found in options.items() for choice in found if choice is not UNTOUCHED]
    errors = {(site, id(UNTOUCHED)): 0.0 for site in options}
    for site, choice in track(pairs, "measuring the sensitivity of layers"):
        errors[site, id(choice)] = remember(choice, partial(error, {site: choice}))
    whole = truth if few is batches else run(true, batches, {})
    best: Search | None = None
    budget = wanted.budget
    known: list[dict[Site, Choice]] = []
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


def _total(choices: Mapping[Site, Choice]) -> float:
    return sum(cost(site, choice) for site, choice in choices.items())


def _cheapest(
    options: Mapping[Site, Sequence[Choice]], errors: Mapping[tuple[Site, int], float], budget: float
) -> dict[Site, Choice]:
    """From the cheapest option of every site, make finer what takes most error off for its time, to the budget."""
    current = {site: min(found, key=lambda choice: cost(site, choice)) for site, found in options.items()}
    total = sum(errors[site, id(choice)] for site, choice in current.items())
    while total > budget:
        best: tuple[float, Site, Choice] | None = None
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
        total += errors[site, id(choice)] - errors[site, id(current[site])]
        current[site] = choice
    return current
