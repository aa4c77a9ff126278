"""Fitting a replacement's weights to what exact attention gives, layer by layer (as LoLCATs: Zhang et al., 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..rewrite import Track
from .site import Sample

Attend = Callable[[Sample, Mapping[str, Tensor]], Tensor]
_CHECKS = 10  # how often the error over all samples is looked at


def fit(
    attend: Attend,
    weights: Mapping[str, Tensor],
    samples: Sequence[Sample],
    track: Track,
    title: str,
    *,
    steps: int,
    rate: float,
) -> dict[str, Tensor]:
    """The weights of least squared error of the attention's output, by Adam, a batch a step; padding is left out.

    What is returned is the best that was seen, the start included.

    Args:
        attend: the output of a sample, [B, H, N, E], for weights.
        steps, rate: how long, and Adam's learning rate, which falls to zero.
    """
    found = {name: tensor.detach().clone() for name, tensor in weights.items()}
    if not samples or not steps:
        return found
    with torch.enable_grad():
        learned = {name: tensor.clone().requires_grad_() for name, tensor in found.items()}
        optimizer = torch.optim.Adam(learned.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        least = error(attend, found, samples)
        for step in track(range(steps), title):
            optimizer.zero_grad()
            sample = samples[step % len(samples)]
            loss = _squared(attend(sample, learned), sample)
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
                now = {name: tensor.detach().clone() for name, tensor in learned.items()}
                reached = error(attend, now, samples)
                if reached < least:
                    least, found = reached, now
    return found


def error(attend: Attend, weights: Mapping[str, Tensor], samples: Sequence[Sample]) -> float:
    """Energy of the output's error over that of the output."""
    with torch.no_grad():
        wrong = sum(float(_energy(attend(sample, weights) - sample.output, sample)) for sample in samples)
        return wrong / max(sum(float(_energy(sample.output, sample)) for sample in samples), 1e-30)


def _squared(found: Tensor, sample: Sample) -> Tensor:
    return _energy(found - sample.output, sample) / _energy(sample.output, sample).clamp(min=1e-30)


def _energy(output: Tensor, sample: Sample) -> Tensor:
    squares = output.square().sum((1, 3))  # [B, N]
    return squares.sum() if sample.rows is None else (squares * sample.rows.to(squares)).sum()
