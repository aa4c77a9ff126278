"""Mixed precision: which sites must be finer than the cheapest way, so that the outputs stay close enough.

The errors that sites add to the outputs hardly influence one another, so they are measured one site at a time and
added up; what the sum misses shows when the whole is measured, and the budget is then made smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep, Visit
from ..errors import RewriteError
from ..graph import Program, arguments, shape
from ..rewrite import Track
from .choice import UNTOUCHED, Choice
from .sites import Site

Outputs = Sequence[Tensor]
Metric = Callable[[Outputs, Outputs], float]
_TOKENS = 512  # of the calibration data, on which single sites are measured
_ROUNDS = 4
_WORST = 5  # how many times as far from 1 as the mean the cosine of one token may be


@dataclass(frozen=True)
class Target:
    """How close the outputs have to be; padding is left out.

    Attributes:
        min_cosine: the mean over tokens of the cosine with the model's own output vectors, and no token further from
            1 than five times as much; of the worst output.
        min_sqnr_db: signal to quantization-noise ratio, of the worst output.
        metric: a score of (outputs, the model's outputs), lists of tensors over the calibration data; at least
            `min_metric`.
    """

    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    metric: Metric | None = None
    min_metric: float = 0.0

    @property
    def budget(self) -> float:
        """The error that is allowed."""
        if self.min_sqnr_db is not None:
            return float(10 ** (-self.min_sqnr_db / 10))
        return 1 - (0.999 if self.min_cosine is None else self.min_cosine)

    def error(self, outputs: Outputs, truth: Outputs) -> float:
        """Of the worst output: energy of the noise over that of the signal, or how far cosines are from 1."""
        if self.min_sqnr_db is not None:
            return max(float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs, truth, strict=True))
        found = [1 - cosines(a, b) for a, b in zip(outputs, truth, strict=True)]
        return max(max(float(item.mean()), float(item.max()) / _WORST) for item in found)

    def reached(self, outputs: Outputs, truth: Outputs) -> bool:
        """Whether outputs are close enough."""
        if self.metric is not None:
            return self.metric(outputs, truth) >= self.min_metric
        return self.error(outputs, truth) <= self.budget

    def __str__(self) -> str:
        if self.metric is not None:
            return f"metric {self.min_metric:g}"
        return f"cosine {self.min_cosine:g}" if self.min_sqnr_db is None else f"SQNR {self.min_sqnr_db:g} dB"


def cosines(outputs: Tensor, truth: Tensor) -> Tensor:
    """Cosine of each output vector with the model's, [tokens]; 1 for two zero vectors."""
    a, b = outputs.double(), truth.double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, (a * b).sum(-1) / lengths.clamp(min=1e-300), (a == b).all(-1).double())


def run(program: Program, batches: Sequence[Sequence[Tensor]], choices: Mapping[Site, Choice]) -> list[Tensor]:
    """Each float output's vectors [tokens, D] over all batches, padding left out, with some sites quantized.

    Where D differs between batches, as of scores by position, zeros fill it up.
    """
    lockstep = Lockstep(program, batches)
    outputs = lockstep.run(applied(program, lockstep, choices.get, choices))
    places = [place for place, value in enumerate(outputs[0]) if _is_vectors(value)]
    if not places:
        raise RewriteError("the program has no output of float vectors, by which its error could be measured")
    found = []
    for place in places:
        vectors = [lockstep.unpadded(batch[place], index).float() for index, batch in enumerate(outputs)]
        widest = max(item.shape[-1] for item in vectors)
        found.append(torch.cat([F.pad(item, (0, widest - item.shape[-1])) for item in vectors]))
    return found


def _is_vectors(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


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
            inputs[site] = [chosen[site].inputs(value) for value in lockstep.values(site.source)]
        given = arguments(node)
        weight = program.tensor(given["weight"])
        bias = None if given["bias"] is None else program.tensor(given["bias"])
        found: list[Any] = [chosen[site].output(value, index, weight, bias) for value in inputs[site]]
        if node is site.linears[-1]:
            del inputs[site]
        return found

    return visit


def cost(site: Site, choice: Choice) -> float:
    """Time of a choice beyond that of integers with a fixed range: in passes over one number of one token.

    Floats also count their bytes in the file, so that among weights alone the small ones are cheap. Measured on Zen 4
    with ONNX Runtime 1.32: a pass over an activation takes 0.2 ns a number, a multiplication and addition of float32
    13 ps longer than one of int8.
    """
    width = shape(site.linears[0].args[1])[1]
    outputs = sum(shape(linear)[-1] for linear in site.linears)
    smoothing = width if choice.smooth is not None else 0
    if choice.activation.level == "float":
        return float(smoothing + (0.065 if choice.weights is not None else 0.075) * width * outputs)
    ranging = {"tensor": width / 2, "token": 2 * (width + outputs)}
    return float(smoothing + ranging.get(choice.activation.level, 0))


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
    target: Target,
    finish: Finish,
    track: Track,
) -> Search:
    """The cheapest options with which the outputs reach the target, each site's from the cheapest on as needed.

    Args:
        options: of each site.
        batches: on which errors are measured; better not those that the options were fitted to.
        finish: what is done with the options chosen before they are used; it may lower their error.
    """
    few = _few(batches)
    truth = run(program, few, {})
    pairs = [(site, choice) for site, found in options.items() for choice in found if choice is not UNTOUCHED]
    errors = {(site, id(UNTOUCHED)): 0.0 for site in options}
    for site, choice in track(pairs, "measuring the sensitivity of layers"):
        errors[site, id(choice)] = target.error(run(program, few, {site: choice}), truth)
    whole = truth if few is batches else run(program, batches, {})
    best: Search | None = None
    budget = target.budget
    known: list[dict[Site, Choice]] = []
    for _ in range(_ROUNDS):
        choices = _cheapest(options, errors, budget)
        if choices in known:
            break
        known.append(choices)
        finished = finish(choices)
        outputs = run(program, batches, finished)
        found = Search(finished, target.error(outputs, whole), target.reached(outputs, whole))
        if best is None or found.reached >= best.reached:
            better = best is None or not best.reached or _total(found.choices) < _total(best.choices)
            best = found if better else best
        if target.metric is not None:
            budget *= 1.5 if found.reached else 0.5
        else:
            budget *= min(3.0, max(0.2, 0.95 * target.budget / found.error)) if found.error else 3.0
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


def _few(batches: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The first batches, as far as single sites are measured on them."""
    tokens, count = 0, 0
    for batch in batches:
        if tokens >= _TOKENS:
            break
        tokens += max(tensor.shape[0] * (tensor.shape[1] if tensor.dim() > 1 else 1) for tensor in batch)
        count += 1
    return batches if count == len(batches) else batches[:count]
