"""How the linear layers that read one activation are quantized: one way to do it, and its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.float8 import float8_quantize, float8_scale
from ..ops.quantize import dequantize, dynamic_quantize, quantize
from .grid import Quantized


@dataclass(frozen=True)
class Activation:
    """How an activation becomes integers.

    Attributes:
        level: "tensor" or "token": the range is taken at run time, over all of it or for each token; "static": it is
            fixed; "float8": numbers of float8_e4m3, with a scale for each token; "float": it stays as it is.
        low: a number that it is never below: it is subtracted first, and a token's integers need no sign.
        scale, zero_point: of a static one.
    """

    level: str
    low: float | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """The activation, with `low` subtracted already, as its integers have it."""
        if self.level == "float":
            return x
        if self.level == "static":
            assert self.scale is not None
            parts: Sequence[Tensor | None] = (quantize(x, self.scale, self.zero_point), self.scale, self.zero_point)
        elif self.level == "float8":
            scale = float8_scale(x)
            parts = (float8_quantize(x, scale), scale)
        else:
            parts = dynamic_quantize(x, self.level, self.low is not None)
        found: Tensor = dequantize(*parts)
        return found


@dataclass(frozen=True, eq=False)  # two are the same only if they are one: tensors have no single answer to ==
class Choice:
    """One way to quantize the linears that read an activation.

    Attributes:
        activation: its integers.
        smooth: [K], what the input is divided by and the columns of the weights are multiplied by; None: nothing.
        weights: one for each linear, of the smoothed weight; None: it stays as it is.
        corrections: one for each linear, [N], added to the bias; None: nothing.
        noise: energy of the error over the energy of the outputs, on the calibration data; NaN without any.
        bits: of the weights' integers.
    """

    activation: Activation
    smooth: Tensor | None = None
    weights: tuple[Quantized, ...] | None = None
    corrections: tuple[Tensor, ...] | None = None
    noise: float = math.nan
    bits: int = 8

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization-noise ratio of the outputs in dB."""
        return -10 * math.log10(self.noise) if self.noise > 0 else math.inf

    @property
    def name(self) -> str:
        """For reports: `token, smoothed`."""
        return self.activation.level + ", smoothed" * (self.smooth is not None)

    @property
    def nested(self) -> bool:
        """Whether the weights' scales are multiples, with which they are multiplied as integers of 8 bits."""
        return self.bits == 4 and self.activation.level != "float"

    def scaled(self, x: Tensor) -> Tensor:
        """The input before it is rounded: shifted and smoothed, [..., K]."""
        shifted = x - self.activation.low if self.activation.low else x
        return shifted if self.smooth is None else shifted * (1 / self.smooth)

    def inputs(self, x: Tensor) -> Tensor:
        """What the quantized linears multiply: [..., K], float32."""
        return self.activation.rounded(self.scaled(x.float()))

    def bias(self, index: int, bias: Tensor | None) -> Tensor | None:
        """The bias [N] of a linear with what the shift of its input and the correction add; None: there is none."""
        added: Tensor | None = None if self.corrections is None else self.corrections[index].double()
        if self.activation.low and self.weights is not None:
            weight = self.weights[index].dequantize().double()
            shift = (weight if self.smooth is None else weight / self.smooth).sum(-1) * self.activation.low
            added = shift if added is None else added + shift
        if added is None:
            return bias
        return added.float() if bias is None else (bias.detach().double() + added).to(bias.dtype)

    def output(self, inputs: Tensor, index: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a linear gives for `inputs(x)`, in the dtype of `weight`; `weight` and `bias` are its own."""
        found = weight if self.weights is None else self.weights[index].dequantize()
        bias = self.bias(index, bias)
        result = F.linear(inputs, found.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))
        return result.to(weight.dtype)


UNTOUCHED = Choice(Activation("float"), noise=0.0)


def measured(choice: Choice, weights: Sequence[Tensor], sample: Tensor) -> Choice:
    """The choice with its noise on rows [tokens, K]."""
    inputs = choice.inputs(sample)
    noise = signal = 0.0
    for index, weight in enumerate(weights):
        truth = F.linear(sample, weight)
        zero = torch.zeros(len(weight))
        noise += float((choice.output(inputs, index, weight, zero) - truth).square().sum())
        signal += float(truth.square().sum())
    return replace(choice, noise=noise / signal if signal else 0.0)
