"""Weights on a grid of integers or of float8_e4m3: the grid, a quantized weight, and rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.float8 import FLOAT8, LARGEST

Clip = Literal["minmax", "mse"]

# Ranges that "mse" tries, relative to the largest magnitude. Two bits on Gaussian rows want about .4 of it.
_SHRUNKEN = [1 - step / 50 for step in range(41)]


@dataclass(frozen=True)
class Grid:
    """What integers a weight's rows are rounded to, or what numbers of float8_e4m3.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point; with 8 bits -128 stays unused, so that the negative of each value is on the grid too.
        group: how many numbers along the last axis share a scale, None for the whole row; the last group of a row may
            be shorter.
        float8: the numbers of float8_e4m3, which have 8 bits and no zero point.
        nested: scales of groups are whole multiples of one scale of their row, so small that (integer - zero point) *
            multiple is an integer of 8 bits (Lin et al., 2025, QServe): those are multiplied as weights of 8 bits are.

    Raises:
        ValueError: bits or group are out of range, or do not go with float8 or nested.
    """

    bits: int = 8
    symmetric: bool = True
    group: int | None = None
    float8: bool = False
    nested: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"grid has {self.bits} bits, expected 2 to 8")
        if self.group is not None and self.group < 1:
            raise ValueError(f"grid has groups of {self.group}, expected 1 or more, or None")
        if self.float8 and (self.bits != 8 or not self.symmetric):
            raise ValueError("grid of float8 has other bits or a zero point, expected 8 bits and symmetric=True")
        if self.nested and self.bits > 4:
            raise ValueError(f"grid of nested scales has {self.bits} bits, expected 4 or fewer")

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest number."""
        return (-int(LARGEST), int(LARGEST)) if self.float8 else limits(self.bits, self.symmetric)

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are stored as."""
        return FLOAT8 if self.float8 else torch.int8


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest integer: -127..127 for symmetric 8 bits, else all of them (4 bits: -8..7).

    One of 16 integers is too many to give away for the sake of symmetry, one of 256 is not.
    """
    half = 2 ** (bits - 1)
    return (-127 if symmetric and bits == 8 else -half), half - 1


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight: value = (integer - zero_point) * scale.

    Attributes:
        integers: int8 [N, K], within the grid's limits; float8_e4m3fn on the grid of float8.
        scale: float [N, G], positive, one for each group of a row; fp64 if the weight was, else fp32.
        zero_point: int8 [N, G], within the grid's limits; None for zero.
        group: how many numbers of a row share a scale; None for all of them (G = 1).
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group: int | None

    def dequantize(self) -> Tensor:
        """The values, [N, K], in the dtype of `scale`."""
        columns = self.integers.shape[1]
        values = self.integers.to(self.scale.dtype)
        if self.zero_point is not None:
            values = values - spread(self.zero_point, self.group, columns).to(self.scale.dtype)
        return values * spread(self.scale, self.group, columns)


def nearest(weight: Tensor, grid: Grid, *, clip: Clip = "minmax", importance: Tensor | None = None) -> Quantized:
    """Round a weight to the nearest value of its grid, ties to even.

    Args:
        weight: [N, K], float; computed in fp32, fp64 stays.
        grid: its integers.
        clip: how the scale of a row or group is found, see `find_scale`.
        importance: [K], see `find_scale`.

    Raises:
        ValueError: the weight is no matrix of finite floats, or `find_scale` refuses.
    """
    scale, zero_point = find_scale(weight, grid, clip=clip, importance=importance)
    return quantize(weight, scale, zero_point, grid)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Quantized:
    """Round a weight [N, K] to the grid with given scale and zero point, [N, G]; ties to even, saturating."""
    values = checked(weight)
    columns = values.shape[1]
    zeros = None if zero_point is None else spread(zero_point, grid.group, columns)
    integers = to_integers(values, spread(scale, grid.group, columns), zeros, grid)
    return Quantized(integers.to(grid.dtype), scale, zero_point, grid.group)


def to_integers(values: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The integers of values, still as floats; scale and zero point broadcast against them."""
    if grid.float8:
        return (values / scale).clamp(*grid.limits).to(grid.dtype).to(values.dtype)
    integers = (values / scale).round()  # torch rounds ties to even
    return (integers if zero_point is None else integers + zero_point).clamp(*grid.limits)


def find_scale(
    weight: Tensor, grid: Grid, *, clip: Clip = "minmax", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point unless the grid is symmetric, of each row or group of a weight.

    The grid's integers are spread evenly over the range of the values; a symmetric range reaches as far below zero as
    above, an asymmetric one contains zero. So the error of no value exceeds half a step. A group of zeros has scale 1.

    Args:
        weight: [N, K], float.
        grid: the integers.
        clip: "minmax" takes the whole range; "mse" shrinks it, as far as the squared error of the group gets smaller.
            Of nested scales "minmax" takes the least multiple for the whole range, "mse" that of the least error.
        importance: [K], not negative: weights of the squared error, such as the mean square of each input.

    Returns:
        The scale, [N, G], fp64 if the weight is, else fp32, and the zero point, int8 [N, G] or None.

    Raises:
        ValueError: the weight is no matrix of finite floats; unknown `clip`; importance of another shape, not finite or
            negative.
    """
    if clip not in ("minmax", "mse"):
        raise ValueError(f"clip is {clip!r}, expected 'minmax' or 'mse'")
    values = checked(weight)
    groups = _grouped(values, grid.group)
    cost = _importance(importance, values, grid.group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero_point = _spread_over(low, high, grid)
    full = scale
    if clip == "mse":
        least = torch.full_like(scale, torch.inf)
        for ratio in _SHRUNKEN:
            tried, zeros = _spread_over(low * ratio, high * ratio, grid)
            total = _error(groups, tried, zeros, grid, full, cost)
            better = total < least
            least = torch.where(better, total, least)
            scale = torch.where(better, tried, scale)
            zero_point = None if zeros is None or zero_point is None else torch.where(better, zeros, zero_point)
    if grid.nested:
        room = _room(zero_point, grid).expand_as(scale)
        used = (groups != 0).any(-1, keepdim=True)
        row = torch.where(used, scale / room, 0).amax(1, keepdim=True)
        row = torch.where(row >= torch.finfo(row.dtype).tiny, row, 1)
        least, wanted = torch.full_like(scale, torch.inf), scale
        scale = row.expand_as(scale)
        for step in range(1, int(room.max()) + 1):
            tried = row * step
            total = _error(groups, tried, zero_point, grid, full, cost)
            allowed = (room >= step) & (tried >= wanted * (1 - 1e-5) if clip == "minmax" else True)
            better = used & allowed & (total < least)
            least, scale = torch.where(better, total, least), torch.where(better, tried, scale)
    return scale[..., 0], None if zero_point is None else zero_point[..., 0].to(torch.int8)


def _error(
    groups: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, unit: Tensor, cost: Tensor | None
) -> Tensor:
    """Squared errors of groups, in units of a scale: the squares of small weights must not vanish."""
    integers = to_integers(groups, scale, zero_point, grid)
    error = ((integers if zero_point is None else integers - zero_point) * (scale / unit) - groups / unit).square()
    return (error if cost is None else error * cost).sum(-1, keepdim=True)


def _room(zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The largest multiples with which all integers of groups, less their zero points, stay within -127..127."""
    smallest, largest = grid.limits
    zeros = torch.zeros(()) if zero_point is None else zero_point
    return torch.floor(127 / torch.maximum(zeros - smallest, largest - zeros))


def multiples(scale: Tensor) -> tuple[Tensor, Tensor]:
    """What nested scales [N, G] are made of: multiples from 1 on, int8 [N, G], and the scale of each row, [N, 1].

    They are unique but for common factors, of which the row's scale takes all: fractions of numbers so small differ by
    more than floats are rounded.

    Raises:
        ValueError: the scales of a row are no multiples of one.
    """
    top = scale.amax(-1, keepdim=True)
    rows, found = torch.zeros_like(top), torch.zeros_like(scale)
    for most in range(1, 128):
        row = top / most
        whole = (scale / row).round()
        fits = ((scale / row - whole).abs() < 1e-4).all(-1, keepdim=True) & (rows == 0)
        rows, found = torch.where(fits, row, rows), torch.where(fits, whole, found)
        if bool((rows > 0).all()):
            return found.to(torch.int8), rows
    raise ValueError("scales of groups are no multiples of one scale of their row, expected those of a nested grid")


def _spread_over(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (still a float) that spread the grid's integers over ranges that contain zero."""
    smallest, largest = grid.limits
    steps = largest - smallest
    scale = high / steps - low / steps  # the difference itself could overflow
    # Below the smallest normal number a scale has few digits; what it would describe is as good as zero.
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    if grid.symmetric:
        return scale, None
    return scale, (smallest - low / scale).round().clamp(smallest, largest)


def spread(per_group: Tensor, group: int | None, columns: int) -> Tensor:
    """What each column of a row has, from what each group has: [N, G] to [N, columns], or [N, 1] for whole rows."""
    if group is None or group >= columns:
        return per_group
    return per_group.repeat_interleave(group, -1)[:, :columns]


def checked(weight: Tensor, name: str = "weight") -> Tensor:
    """The values of a weight in fp32, or fp64 if it is fp64.

    Raises:
        ValueError: it is no matrix with columns, no float, or holds NaN or infinity.
    """
    if weight.dim() != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        kind = f"{weight.dtype}{list(weight.shape)}".removeprefix("torch.")
        raise ValueError(f"{name} is {kind}, expected a float matrix [N, K] with K > 0")
    wrong = ~weight.detach().isfinite()
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} is {weight[row, column].item()} at [{row}, {column}], expected finite numbers")
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _grouped(values: Tensor, group: int | None) -> Tensor:
    """Rows [N, K] as groups [N, G, group], the last one filled with zeros: they change neither range nor error."""
    rows, columns = values.shape
    if group is None or group >= columns:
        return values.unsqueeze(1)
    return torch.nn.functional.pad(values, (0, -columns % group)).view(rows, -1, group)


def _importance(importance: Tensor | None, values: Tensor, group: int | None) -> Tensor | None:
    """The weights of the squared errors as groups, [1, G, group]."""
    if importance is None:
        return None
    if importance.shape != values.shape[1:]:
        raise ValueError(f"importance is {list(importance.shape)}, expected {list(values.shape[1:])}")
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance has NaN, infinity or negative numbers")
    largest = importance.max().clamp(min=torch.finfo(values.dtype).tiny)  # relative: no over- or underflow
    return _grouped((importance.to(values) / largest.to(values)).unsqueeze(0), group)
