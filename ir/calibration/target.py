"""How close a rewritten program's outputs have to be to the model's on calibration data, and how close they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import InputError, RewriteError, one_line
from ..graph import Program
from ..signature import describe
from .lockstep import Lockstep, Visit

Outputs = Sequence[Tensor]
Metric = Callable[[Outputs, Outputs], float]
_TOKENS = 512  # of the calibration data, on which single changes are measured
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
            return max(_noise(a, b) for a, b in zip(outputs, truth, strict=True))
        found = [1 - cosines(a, b) for a, b in zip(outputs, truth, strict=True)]
        return max(max(float(item.mean()), float(item.max()) / _WORST) for item in found)

    def reached(self, outputs: Outputs, truth: Outputs) -> bool:
        """Whether outputs are close enough."""
        if self.metric is not None:
            return self._score(self.metric, outputs, truth) >= self.min_metric
        return self.error(outputs, truth) <= self.budget

    @staticmethod
    def _score(metric: Metric, outputs: Outputs, truth: Outputs) -> float:
        try:
            found = metric(outputs, truth)
        except Exception as error:  # it is the user's function
            raise InputError(f"metric fails: {type(error).__name__}: {one_line(error)}; mend that function") from error
        try:
            return float(found)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"metric must give a number, found {describe(found)}; mend that function") from error

    def __str__(self) -> str:
        if self.metric is not None:
            return f"metric {self.min_metric:g}"
        return f"cosine {self.min_cosine:g}" if self.min_sqnr_db is None else f"SQNR {self.min_sqnr_db:g} dB"


def _noise(outputs: Tensor, truth: Tensor) -> float:
    """Energy of the error over that of the signal; of no signal any error is infinitely much, and none is 0."""
    noise, signal = (float(item.double().square().sum()) for item in (outputs - truth, truth))
    return noise / signal if signal else math.inf if noise else 0.0


def cosines(outputs: Tensor, truth: Tensor) -> Tensor:
    """Cosine of each output vector with the model's, [tokens]; 1 for two zero vectors."""
    a, b = outputs.double(), truth.double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, (a * b).sum(-1) / lengths.clamp(min=1e-300), (a == b).all(-1).double())


def run(
    program: Program, batches: Sequence[Sequence[Tensor]], visit: Callable[[Lockstep], Visit] | None = None
) -> list[Tensor]:
    """Each float output's vectors [tokens, D] over all batches, padding left out.

    Where D differs between batches, as of scores by position, zeros fill it up.

    Args:
        visit: gives what stands for the values of nodes, see `Lockstep.run`; None: nothing does.
    """
    lockstep = Lockstep(program, batches)
    outputs = lockstep.run(_untouched if visit is None else visit(lockstep))
    nodes: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
    places = [place for place, value in enumerate(outputs[0]) if _is_vectors(value)]
    if not places:
        raise RewriteError("the program has no output of float vectors, by which its error could be measured")
    found = []
    for place in places:
        vectors = [lockstep.unpadded(nodes[place], batch[place], index).float() for index, batch in enumerate(outputs)]
        if not any(map(len, vectors)):
            raise InputError(
                "all tokens of the calibration data that outputs are judged by are padding; give others, or another "
                "order: of four or more batches every fourth judges"
            )
        widest = max(item.shape[-1] for item in vectors)
        found.append(torch.cat([F.pad(item, (0, widest - item.shape[-1])) for item in vectors]))
    return found


def _untouched(node: fx.Node) -> None:
    return None


def _is_vectors(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def few(batches: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The first batches, as far as single changes are measured on them."""
    tokens, count = 0, 0
    for batch in batches:
        if tokens >= _TOKENS:
            break
        tokens += max(tensor.shape[0] * (tensor.shape[1] if tensor.dim() > 1 else 1) for tensor in batch)
        count += 1
    return batches if count == len(batches) else batches[:count]
