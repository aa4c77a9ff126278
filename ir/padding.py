"""Which vectors of a program's outputs are of tokens that are padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .graph import Program
from .packing import Place, key_masks, regions

Real = Callable[[Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Padding:
    """The key masks of a program, and for each output the one that says its padding, with its axes batch and length.

    Where that is None, the sizes of the output tell: it is [B, M, ...] of a mask [B, M].
    """

    program: Program
    places: tuple[tuple[fx.Node, Place] | None, ...]

    @classmethod
    def of(cls, program: Program, *, follow: bool) -> Padding:
        """Of a program in canonical spelling, as it is now.

        Args:
            follow: follow tokens through the graph to the outputs, which takes a while.
        """
        program = program.copy()
        outputs: Any = next(iter(reversed(program.graph.nodes))).args[0]
        known: dict[Any, tuple[fx.Node, Place]] = {}
        for region in regions(program) if follow else ():
            known |= {node: (region.key_mask, place) for node, place in region.places.items()}
        return cls(program, tuple(known.get(item) for item in outputs))

    def left_out(self, inputs: Sequence[Tensor]) -> Real:
        """A function from all outputs on some inputs to the vectors of their real tokens, [T, ...]."""
        nodes = key_masks(self.program)
        masks = {node: mask.bool() for node, mask in zip(nodes, self.program.values(nodes, inputs), strict=True)}

        def real(outputs: Sequence[Any]) -> list[Any]:
            return [_real(value, place, masks) for value, place in zip(outputs, self.places, strict=True)]

        return real


def _real(value: Any, known: tuple[fx.Node, Place] | None, masks: dict[fx.Node, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if known is not None:
        mask, (batch, length) = masks[known[0]], known[1]
        return value.movedim((batch, length), (0, 1))[mask] if value.dim() > max(batch, length) else value
    found = next((item for item in masks.values() if value.dim() > 2 and value.shape[:2] == item.shape), None)
    return value if found is None else value[found]
