"""Values of the kinds that masks are made of: truth values, whole numbers and floats, and conversions between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import Max

from ..graph import dtype
from . import expression as e
from .expression import Constant, Element, Expression, Sum

if TYPE_CHECKING:
    from .reader import Reader

Indices = tuple[Sum, ...]
Rule = Callable[["Reader", fx.Node, Indices], Expression | None]
"""What a call holds at some indices; None where that is not known."""


def is_one(size: Any) -> bool:
    """Whether a size is 1 for certain, so that its axis broadcasts.

    PyTorch keeps `s - max(0, s - 1)`, the length of a slice that begins at s - 1, as it is: it is 1 where s is at least
    1, which follows from the sizes that the program is valid for.
    """
    if not isinstance(size, torch.SymInt):
        return bool(size == 1)
    env = size.node.shape_env

    def settled(part: Any) -> Any:
        for found in part.args:
            if all(env.bound_sympy(found - other).lower >= 0 for other in part.args):
                return found
        return part

    plain = size.node.expr.replace(lambda part: isinstance(part, Max), settled)
    return bool(plain.expand() == 1)


def kind(node: fx.Node) -> str:
    """ "bool", "int" or "float" (all that is neither)."""
    found = dtype(node)
    if found is torch.bool:
        return "bool"
    return "int" if not (found.is_floating_point or found.is_complex) else "float"


def literal(value: Any) -> Expression:
    """A Python number as an expression; whole numbers are sums."""
    if isinstance(value, bool | float):
        return Constant(value)
    return e.whole(value)


def number(value: Expression) -> Sum | None:
    """A truth value or sum as a whole number; None for floats."""
    if isinstance(value, Sum):
        return value
    if isinstance(value, Constant) and isinstance(value.value, bool):
        return e.whole(int(value.value))
    return None


def converted(value: Expression, before: str, after: str, round_to: torch.dtype) -> Expression | None:
    """A value in another kind of dtype; None if that is an operator of its own."""
    if before == after != "float":
        return value
    if after == "bool" and before == "int":
        assert isinstance(value, Sum)
        return e.opposite(e.equal(value, e.whole(0), {}))
    if before == "bool":
        yes, no = (e.whole(1), e.whole(0)) if after == "int" else (Constant(1.0), Constant(0.0))
        chosen = e.choose(value, yes, no)
        return e.atom(chosen) if after == "int" else chosen
    if isinstance(value, Sum) and not value.terms and after == "float":
        return Constant(rounded(value.constant, round_to))
    if isinstance(value, Constant):
        if after == "float":
            return Constant(rounded(value.value, round_to))
        return Constant(value.value != 0) if after == "bool" else None
    if isinstance(value, e.Choice):
        ways = [converted(way, before, after, round_to) for way in (value.yes, value.no)]
        return None if None in ways else e.choose(value.condition, *ways)  # type: ignore[arg-type]
    return None


def rounded(value: float, to: torch.dtype) -> float:
    """A number as a dtype holds it."""
    return float(torch.tensor(value, dtype=torch.float64).to(to))


def kind_of(node: fx.Node) -> str:
    """The kind of a tensor, or of a number that the graph computes."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return kind(node)
    return "int" if isinstance(value, int | torch.SymInt) else "float"


def chosen(condition: Expression, yes: Expression, no: Expression) -> Expression:
    """`yes` or `no`, as a sum where they are whole numbers."""
    found = e.choose(condition, yes, no)
    return e.atom(found) if isinstance(yes, Sum) else found


def fits(value: Expression, to: torch.dtype) -> bool:
    """Whether a whole number fits a dtype: any fits 64 bits, what is made of indices and sizes alone 32."""
    if to is torch.int64 or isinstance(value, Element | e.Apply):
        return to is torch.int64
    return to is torch.int32 and all(fits(part, to) for part in e.parts(value))
