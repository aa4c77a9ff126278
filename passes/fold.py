"""Fold: what was left in the graph for training becomes permanent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Program
from ..ir.quantization.fold import fold
from ..ir.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class Fold(Pass):
    """Store quantized weights as integers, and let linear layers between quantize and dequantize multiply integers.

    `Quantize` does this itself unless it is told `fold=False`.

        before:  %y = aten.linear(fxpress.dequantize(%q, %s, %z), fxpress.dequantize(fxpress.quantize(@w, @s), @s))
        after:   %y = fxpress.int8_linear(%q, %s, %z, @integers, @scale, None)
    """

    exact: ClassVar[bool] = False  # sums of integers are exact, those of floats were rounded

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        if count := fold(program):
            result.rewrites["quantize"] = count
        return result
