"""Least squares from sums over batches: a linear layer fitted to outputs, as near to what it was as the data allow.

Only products summed over tokens are kept. How strongly the weight is held to what it was is decided by the data: every
other batch is left out, and what is fitted to the rest is judged by those (Stone, 1974).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DAMP = 0.03  # where there is one batch, and no other to judge by


@dataclass(frozen=True)
class Batch:
    """What a layer reads [tokens, K], what it is to give [tokens, N], and what each token counts [tokens]."""

    inputs: Tensor
    outputs: Tensor
    tokens: Tensor


def by_length(outputs: Tensor) -> Tensor:
    """[tokens], what they count so that errors of outputs [tokens, N] are in units of their lengths.

    The few tokens that are a hundred times as long as the others, as many Transformers have them behind feed-forward
    blocks, would else be all that is fitted to.
    """
    return 1 / outputs.double().square().sum(1).clamp(min=1e-12)


def fitted(
    batches: Iterable[Batch], weight: Tensor, bias: Tensor | None, keep: Tensor, damp: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with zeros in the columns that go, the rest fitted to outputs by least squares.

    Args:
        weight: [N, K].
        bias: [N].
        keep: [K], False in the columns that go.
        damp: what pulls towards the weight as it was, in units of the mean weighed square of what the layer reads;
            None: what does best of `DAMPS`.
    """
    kept = keep.nonzero().flatten()
    old = torch.where(keep, weight.double(), 0)
    level = None if bias is None else bias.double()
    halves = [_Sums(len(old), len(kept), level is not None) for _ in range(2)]
    count = 0
    for count, batch in enumerate(batches, 1):
        halves[count % 2].add(batch, old[:, kept], level, kept)
    total = halves[0].plus(halves[1])
    change = total.change(damp or (_best(halves) if count > 1 else DAMP))
    old[:, kept] += change[:, : len(kept)]
    new = old.to(weight.dtype)
    return (new, None) if bias is None or level is None else (new, (level + change[:, -1]).to(bias.dtype))


def off(batches: Iterable[Batch], weight: Tensor, bias: Tensor | None) -> float:
    """The mean squared error of the outputs, each token weighed."""
    total, count = 0.0, 0
    for batch in batches:
        error = F.linear(batch.inputs, weight, bias).double() - batch.outputs.double()
        total += float(error.square().sum(1) @ batch.tokens.double())
        count += len(error)
    return total / max(count, 1)


class _Sums:
    """Over tokens, each weighed: products of what is read, and a 1 for the bias, with itself and what outputs lack."""

    def __init__(self, outputs: int, inputs: int, bias: bool) -> None:
        self.inputs, self.bias = inputs, bias
        self.gram = torch.zeros(inputs + bias, inputs + bias, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs + bias, dtype=torch.float64)

    def add(self, batch: Batch, weight: Tensor, level: Tensor | None, kept: Tensor) -> None:
        x = batch.inputs[:, kept].double()
        lack = batch.outputs.double() - x @ weight.T
        if level is not None:
            lack -= level
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        weighed = x * batch.tokens.double().unsqueeze(1)
        self.gram.addmm_(x.T, weighed)
        self.cross.addmm_(lack.T, weighed)

    def plus(self, other: _Sums) -> _Sums:
        total = _Sums(len(self.cross), self.inputs, self.bias)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        return total

    def change(self, damp: float) -> Tensor:
        """[N, K + 1], or [N, K] without a bias: what added to the weight makes up for what the outputs lack."""
        if not self.gram.numel():
            return self.cross
        inner = self.gram.clone()
        squares = inner.diagonal()
        squares[: self.inputs] += damp * squares[: self.inputs].sum() / max(self.inputs, 1)
        squares += 1e-9 * squares.mean().clamp(min=1e-12)  # the bias is not held, but there may be nothing else to read
        return torch.cholesky_solve(self.cross.T, torch.linalg.cholesky(inner)).T

    def gain(self, change: Tensor) -> float:
        """By how much a change lessens the squared error of these tokens."""
        return float((change * (2 * self.cross - change @ self.gram)).sum())


def _best(halves: list[_Sums]) -> float:
    """The damping of all tokens that does best when each half is fitted to and judged by the other.

    All tokens are pulled as much as half of them, which is half as much of their sum.
    """
    first, second = halves
    gains = [first.gain(second.change(damp)) + second.gain(first.change(damp)) for damp in DAMPS]
    return DAMPS[max(range(len(DAMPS)), key=gains.__getitem__)] / 2
