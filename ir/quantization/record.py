"""What calibration found about each site, put down as soon as it is known and read back after an interruption.

Of an option its range, smoothing and noise are kept; its weights are rounded to nearest again. Of what was fitted the
weights and biases are kept: they are what a Hessian, K times as large as a row of the weight, was collected for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..calibration.statistics import Statistics
from .choice import Activation, Choice
from .grid import Quantized
from .sites import Site
from .tables import Table

FORMAT = 3  # of what is kept; files of another one are refused
_LEVELS = ("float", "float8", "static", "tensor", "token")


class Record:
    """The record of a quantization.

    Args:
        statistics: where it is kept.
        sites: in the order of the graph, by which they are numbered.
        tables: each with its integers, which are not kept.
    """

    def __init__(self, statistics: Statistics, sites: Iterable[Site], tables: Mapping[Table, Choice]) -> None:
        self._statistics = statistics
        self._numbers = {site: number for number, site in enumerate(sites)}
        # Of options, by identity; they live as long as this.
        self._names = {id(choice): f"table {number}" for number, choice in enumerate(tables.values())}
        self._options: list[Sequence[Choice]] = []

    def options(
        self, site: Site, make: Callable[[], Sequence[Choice]], again: Callable[[Choice], Choice]
    ) -> Sequence[Choice]:
        """The options of a site; `again` gives one that was read back its weights."""
        name = f"site {self._numbers[site]}"
        kept = self._statistics.get(name)
        if kept is None:
            found = make()
            tensors = [_stated(choice) for choice in found]
            self._statistics.put(
                name, {f"{n}.{key}": item for n, each in enumerate(tensors) for key, item in each.items()}
            )
        else:
            count = 1 + max(int(key.partition(".")[0]) for key in kept)
            found = [again(_read(_part(kept, number))) for number in range(count)]
        self._options.append(found)
        self._names.update({id(choice): f"{name}, option {number}" for number, choice in enumerate(found)})
        return found

    def has_options(self, sites: Iterable[Site]) -> bool:
        """Whether the options of all sites are known."""
        return all(self._statistics.get(f"site {self._numbers[site]}") is not None for site in sites)

    def error(self, choice: Choice, measure: Callable[[], float]) -> float:
        """What an option alone does to the outputs."""
        name = f"{self._names[id(choice)]}: error"
        kept = self._statistics.get(name)
        if kept is not None:
            return float(kept["error"])
        error = measure()
        self._statistics.put(name, {"error": torch.tensor(error, dtype=torch.float64)})
        return error

    def fitted(self, choice: Choice) -> Choice | None:
        """What an option became by fitting; None: it was not fitted yet."""
        kept = self._statistics.get(f"{self._names[id(choice)]}: fitted")
        return None if kept is None else _read(kept)

    def put_fitted(self, choice: Choice, found: Choice) -> None:
        """Keep what an option became by fitting."""
        self._statistics.put(f"{self._names[id(choice)]}: fitted", {**_stated(found), **_weights(found)})


def _part(kept: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {key.partition(".")[2]: value for key, value in kept.items() if key.startswith(f"{number}.")}


def _stated(choice: Choice) -> dict[str, Tensor]:
    """All of a choice but its weights and corrections."""
    activation = choice.activation
    found = {
        "level": torch.tensor(_LEVELS.index(activation.level)),
        "noise": torch.tensor(choice.noise, dtype=torch.float64),
        "bits": torch.tensor(choice.bits),
    }
    if activation.low is not None:
        found["low"] = torch.tensor(activation.low, dtype=torch.float64)
    for key, value in (
        ("scale", activation.scale), ("zero_point", activation.zero_point), ("smooth", choice.smooth),
    ):  # fmt: skip
        if value is not None:
            found[key] = value
    return found


def _weights(choice: Choice) -> dict[str, Tensor]:
    assert choice.weights is not None
    found = {}
    for number, weight in enumerate(choice.weights):
        found[f"{number}.integers"], found[f"{number}.weight_scale"] = weight.integers, weight.scale
        if weight.zero_point is not None:
            found[f"{number}.weight_zero_point"] = weight.zero_point
        found[f"{number}.group"] = torch.tensor(weight.group or 0)
        if choice.corrections is not None:
            found[f"{number}.correction"] = choice.corrections[number]
    return found


def _read(kept: Mapping[str, Tensor]) -> Choice:
    low = float(kept["low"]) if "low" in kept else None
    activation = Activation(_LEVELS[int(kept["level"])], low, kept.get("scale"), kept.get("zero_point"))
    parts = [_part(kept, number) for number in range(sum(key.endswith(".integers") for key in kept))]
    weights = [
        Quantized(part["integers"], part["weight_scale"], part.get("weight_zero_point"), int(part["group"]) or None)
        for part in parts
    ]
    corrections = [part["correction"] for part in parts if "correction" in part]
    smooth, noise, bits = kept.get("smooth"), float(kept["noise"]), int(kept["bits"])
    return Choice(activation, smooth, tuple(weights) or None, tuple(corrections) or None, noise, bits)
