"""The operator table: one declaration an operator, read by the printer, the verifier and every backend.

An operator is a schema plus a reference in plain torch. The reference is registered as the operator's composite
implementation, so that one function is the truth for every backend, the shape rule (it runs on fake tensors) and
the gradient (autograd differentiates through it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload


@dataclass(frozen=True)
class Operator:
    """One operator of the graph language."""

    name: str
    overload: OpOverload
    reference: Callable[..., Any]
    meaning: str  # one line, for documentation and tables


OPERATORS: dict[OpOverload, Operator] = {}
_LIBRARY = torch.library.Library("fxpress", "DEF")


def operator(schema: str, *, meaning: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Declare an operator: decorate its reference; the decorated name becomes the operator (`OpOverload`).

    Args:
        schema: the signature in torch.library's language, e.g. `"scale(Tensor input, float by) -> Tensor"`.
        meaning: one line that says what the operator computes.

    Raises:
        ValueError: if an operator of that name exists already.
    """

    def register(reference: Callable[..., Any]) -> OpOverload:
        name = schema.split("(", 1)[0]
        if any(entry.name == name for entry in OPERATORS.values()):
            raise ValueError(f"operator fxpress::{name} is declared twice; give the second one another name")
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
        overload: OpOverload = getattr(torch.ops.fxpress, name).default
        OPERATORS[overload] = Operator(name, overload, reference, meaning)
        return overload

    return register
