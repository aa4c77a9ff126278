"""The tensors of a call of a compiled model: checked once for each kind of call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.signature import Signature

LIMIT = 1024  # kinds of calls that are remembered: sizes may grow without end


class Binder:
    """Puts the tensors of a call in a program's order.

    To check a call of two tensors takes 20 us of the 55 that Python spends on it, which is as long as a GPU computes a
    small model. A call of the same names, shapes and dtypes as one before is only put in order.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._orders: dict[Any, list[int]] = {}

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors, in the order of the program's inputs.

        Raises:
            InputError: the call does not fit the program.
        """
        values = [*args, *kwargs.values()]
        plain = all(type(value) is Tensor for value in values)
        kind = (len(args), *kwargs, *((value.shape, value.dtype) for value in values)) if plain else None
        if kind in self._orders:
            return [torch.as_tensor(values[place]) for place in self._orders[kind]]
        tensors = self._signature.bind(args, kwargs)
        places = {id(value): place for place, value in enumerate(values)}
        if plain and len(places) == len(values):  # else one tensor stands for two inputs
            if len(self._orders) >= LIMIT:
                self._orders.clear()
            self._orders[kind] = [places[id(tensor)] for tensor in tensors]
        return [torch.as_tensor(value) for value in tensors]  # moved, where there is a default device
