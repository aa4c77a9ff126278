"""What an expression is worth where a condition does not hold, as is asked of products with masks."""

from __future__ import annotations

import torch

from .expression import (
    And,
    Apply,
    Choice,
    Constant,
    Expression,
    Not,
    NotPositive,
    Or,
    Sum,
    Zero,
    add,
    opposite,
    scale,
)

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, aten.to.dtype)
Number = bool | int | float


def worth_without(value: Expression, condition: Expression) -> Number | None:
    """The one number that an expression is wherever a condition does not hold; None: several, or it is not seen.

    What is multiplied by zero is taken to be finite.
    """

    def worth(part: object) -> Number | None:
        if isinstance(part, Expression):
            return worth_without(part, condition)
        return part if isinstance(part, bool | int | float) else None

    if isinstance(value, Constant):
        return value.value
    if value == condition or value == opposite(condition):
        return value != condition
    if isinstance(value, Not):
        found = worth(value.of)
        return None if found is None else not found
    if isinstance(value, And | Or):
        each = [worth(part) for part in value.conditions]
        decisive = isinstance(value, Or)
        if any(found is not None and bool(found) == decisive for found in each):
            return decisive
        return None if None in each else not decisive
    if isinstance(value, Sum):
        return _sum(value, condition)
    if isinstance(value, Zero | NotPositive):
        found = _sum(value.of, condition)
        return None if found is None else found == 0 if isinstance(value, Zero) else found <= 0
    if isinstance(value, Choice):
        chosen, yes, no = worth(value.condition), worth(value.yes), worth(value.no)
        return (yes if yes == no else None) if chosen is None else yes if chosen else no
    if isinstance(value, Apply) and value.target in _CASTS:
        return worth(value.operands[0])
    if isinstance(value, Apply) and value.target is aten.mul.Tensor:
        return 0.0 if any(worth(part) == 0 for part in value.operands) else None
    return None


def _sum(value: Sum, condition: Expression) -> int | None:
    """Where `s != 0` does not hold, s is 0, and so are its multiples."""
    zero = opposite(condition)
    if isinstance(zero, Zero) and zero.of.terms:
        part, factor = next(iter(zero.of.terms))
        times, rest = divmod(value.factor(part), factor)
        value = value if rest else add(value, scale(zero.of, times), -1)
    found = value.constant
    for part, factor in value.terms:
        number = None if isinstance(part, Sum) else worth_without(part, condition)
        if number is None:
            return None
        found += int(number) * factor
    return found
