"""GPTQ: rounding a weight so that its outputs, not its numbers, stay close (Frantar et al., 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..calibration.sweep import checked_gram, output_error, sweep
from .grid import Clip, Grid, Quantized, checked, find_scale, quantize, spread, to_integers

Order = Literal["importance", "natural"]


def gptq(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    block: int = 128,
    order: Order = "importance",
    clip: Clip = "mse",
) -> Quantized:
    """Quantize a weight column by column, each making up for the rounding of those before.

    The scales are those of the weight as it was, found before the sweep: a group is a run of neighbouring columns in
    whatever order they are visited, and the result is stored as `nearest` stores it. A number that is exactly 0, as
    pruning leaves them, stays 0. For no output is the error larger
    than with `nearest` and the same scales: where the sweep does not pay, the row is simply rounded.

    Args:
        weight: [N, K], float; computed in fp32, fp64 stays.
        gram: [K, K], sum x^T x over the inputs x of calibration tokens.
        grid: the integers.
        damp: see `sweep`.
        block: see `sweep`.
        order: "importance" visits the columns with the largest inputs first, while all others can still make up for
            them; "natural" from left to right.
        clip: see `find_scale`; "mse" weighs each column by its mean squared input.

    Raises:
        ValueError: the weight is no matrix of finite floats; the gram matrix does not fit or is no gram matrix; unknown
            order or clip.
    """
    if order not in ("importance", "natural"):
        raise ValueError(f"order is {order!r}, expected 'importance' or 'natural'")
    values = checked(weight)
    columns = values.shape[1]
    power = checked_gram(gram, columns).diagonal()
    scale, zero_point = find_scale(values, grid, clip=clip, importance=power)
    scales = spread(scale, grid.group, columns).expand_as(values)
    zeros = None if zero_point is None else spread(zero_point.to(scale), grid.group, columns).expand_as(values)

    def project(column: Tensor, index: int) -> Tensor:
        zero = None if zeros is None else zeros[:, index]
        integers = to_integers(torch.where(values[:, index] == 0, 0, column), scales[:, index], zero, grid)
        return (integers if zero is None else integers - zero) * scales[:, index]

    visits = torch.argsort(power, descending=True, stable=True) if order == "importance" else None
    swept = quantize(sweep(values, gram, project, order=visits, damp=damp, block=block), scale, zero_point, grid)
    rounded = quantize(values, scale, zero_point, grid)
    wide = gram.double()
    after, before = (output_error((each.dequantize() - values).double(), wide) for each in (swept, rounded))
    integers = torch.where((after <= before).unsqueeze(1), swept.integers, rounded.integers)
    return Quantized(integers, scale, zero_point, grid.group)
