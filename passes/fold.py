"""Fold: what was left in the graph for training becomes permanent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Program
from ..ir.pruning import head_dims, masks
from ..ir.pruning.units import cut_unread
from ..ir.quantization.absorb import absorb
from ..ir.quantization.fold import fold
from ..ir.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class Fold(Pass):
    """Store quantized weights as integers, and let linear layers between quantize and dequantize multiply integers.

    Masked weights become zero for good, and heads, their dimensions and neurons that nothing reads any more are cut.
    `Quantize` and `MaskWeights` do this themselves unless they are told `fold=False`.

        before:  %y = aten.linear(fxpress.dequantize(%q, %s, %z), fxpress.dequantize(fxpress.quantize(@w, @s), @s))
        after:   %y = fxpress.int8_linear(%q, %s, %z, @integers, @scale, None)
    """

    exact: ClassVar[bool] = False  # sums of integers are exact, those of floats were rounded

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        if count := masks.fold(program):
            result.rewrites["mask"] = count
            result.rewrites.update({**cut_unread(program), **head_dims.cut_unread(program)})
        if count := fold(program):
            result.rewrites["quantize"] = count
        if count := absorb(program):
            result.rewrites["smoothing into values"] = count
        return result
