"""What a Program takes from the arguments of dynamo's graph, and how its outputs become those of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.errors import InputError


@dataclass(frozen=True)
class Finish:
    """How a graph's outputs and changed arguments come from a Program's flat outputs.

    Attributes:
        outputs: of each output of the graph ("value", index of a program output), ("constant", value) or ("view", index
            of an output of `views`).
        changed: the arguments that the graph changes in place, and the program outputs with their new values.
        views: what shares memory with an argument or another output, and sizes: a graph of all arguments and some
            program outputs; None: there is nothing of the kind.
        roots: those program outputs.
    """

    outputs: tuple[tuple[str, Any], ...]
    changed: tuple[tuple[int, int], ...] = ()
    views: fx.GraphModule | None = None
    roots: tuple[int, ...] = ()

    def __call__(self, found: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs; its changed arguments are changed."""
        for place, index in self.changed:
            args[place].copy_(found[index])
        views = self.views(*args, *(found[index] for index in self.roots)) if self.views is not None else ()
        return tuple(
            found[item] if kind == "value" else views[item] if kind == "view" else item for kind, item in self.outputs
        )


@dataclass(frozen=True)
class Binding:
    """What a Program of dynamo's graph takes from the graph's arguments, and how its outputs become the graph's.

    Attributes:
        inputs: the argument that each of the program's inputs is; for the last ones (`carriers` of them) an integer,
            which the program reads as the length of an empty tensor.
        weights: the argument that each weight of the program was copied from, by its name.
    """

    inputs: tuple[int, ...]
    carriers: int
    weights: Mapping[str, int]
    finish: Finish

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The program's inputs among the arguments of a call.

        Raises:
            InputError: a negative integer, which no tensor can carry.
        """
        found = [args[place] for place in self.inputs]
        for place in range(len(found) - self.carriers, len(found)):
            if found[place] < 0:
                raise InputError("an integer is negative")
            found[place] = torch.empty(found[place], 0)
        return found

    def copies(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of a call, copied as far as they are inputs or change."""
        copied = {*self.inputs, *(place for place, _ in self.finish.changed)}
        return [
            value.detach().clone() if place in copied and isinstance(value, Tensor) else value
            for place, value in enumerate(args)
        ]

    def shares_changed(self, args: Sequence[Any]) -> bool:
        """Whether an argument that the graph changes shares memory with another argument."""
        homes = [value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor) and value.numel()]
        changed = [args[place] for place, _ in self.finish.changed]
        return any(homes.count(value.untyped_storage().data_ptr()) > 1 for value in changed)
