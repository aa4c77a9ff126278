"""The operator table: one declaration an operator, read by the printer, the verifier and every backend.

An operator is a schema plus a reference in plain torch. The reference is registered as the operator's composite
implementation, so that one function is the truth for every backend, the shape rule (it runs on fake tensors) and
the gradient (autograd differentiates through it). Where running it on sizes that are symbols would tie them to the
example's, as counting blocks does, or would take long, the operator states its shape rule beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensor


@dataclass(frozen=True)
class Operator:
    """One operator of the graph language."""

    name: str
    overload: OpOverload
    reference: Callable[..., Any]
    meaning: str  # one line, for documentation and tables


OPERATORS: dict[OpOverload, Operator] = {}


def taking(*names: str) -> list[OpOverload]:
    """The operators that take arguments of these names: "query", "key" and "value" are those of attention."""
    return [target for target in OPERATORS if {*names} <= {item.name for item in target._schema.arguments}]


_LIBRARY = torch.library.Library("fxpress", "DEF")


def operator(
    schema: str, *, meaning: str, shape: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Declare an operator: decorate its reference; the decorated name becomes the operator (`OpOverload`).

    Args:
        schema: the signature in torch.library's language, e.g. `"scale(Tensor input, float by) -> Tensor"`.
        meaning: one line that says what the operator computes.
        shape: the shape rule, from the operator's arguments to empty tensors like its results, or to None where the
            reference has to tell; None: the reference always.

    Raises:
        ValueError: if an operator of that name exists already.
    """

    def register(reference: Callable[..., Any]) -> OpOverload:
        name = schema.split("(", 1)[0]
        if any(entry.name == name for entry in OPERATORS.values()):
            raise ValueError(f"operator fxpress::{name} is declared twice; give the second one another name")
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference if shape is None else _by_shape(reference, shape), "CompositeImplicitAutograd")
        overload: OpOverload = getattr(torch.ops.fxpress, name).default
        OPERATORS[overload] = Operator(name, overload, reference, meaning)
        return overload

    return register


def _by_shape(reference: Callable[..., Any], shape: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, or on fake tensors without gradients the shape rule."""

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        fake = [item for item in given if isinstance(item, FakeTensor)]
        flows = torch.is_grad_enabled() and any(item.requires_grad for item in fake)
        known = shape(*args, **kwargs) if fake and not flows else None
        return reference(*args, **kwargs) if known is None else known

    return run
