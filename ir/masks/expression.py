"""Expressions over tensor indices, in normal form.

Integers are sums: whole multiples of indices, sizes and other atoms, and a constant. Comparisons of integers are
`s <= 0` or `s == 0`, and negation is pushed down to what cannot be taken apart. So two spellings of one condition,
`j - i < 1` and `i >= j`, are equal objects. Floats are constants, elements, choices, or operators kept as they are.

Build expressions with the functions below the classes (`add`, `at_most`, `both`, `choose`, ...): they keep the form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

AXES = "bhijk"  # batch, head, query, key: the names of a mask's axes; k: of one that is summed
SUMMED = 4


class Expression:
    """A value for each index (b, h, i, j). Immutable; equal where kind and `args` are."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.count: int
        inner = list(_flat(args))
        self.axes: frozenset[int] = frozenset().union(*(part.axes for part in inner))  # that it depends on
        self.count = 1 + sum(part.count for part in inner)  # of its parts, shared ones counted at every use
        self._hash = hash((type(self).__name__, args))

    def __eq__(self, other: object) -> bool:
        return self is other or (
            type(self) is type(other)
            and isinstance(other, Expression)
            and self._hash == other._hash
            and self.args == other.args
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return spell(self)


def _flat(value: Any) -> Iterator[Expression]:
    if isinstance(value, Expression):
        yield value
    elif isinstance(value, tuple | frozenset):
        for item in value:
            yield from _flat(item)


def parts(value: Expression) -> Iterator[Expression]:
    """The expressions that one is made of."""
    return _flat(value.args)


class Index(Expression):
    """The index along an axis: 0 batch, 1 head, 2 query, 3 key; 4 of any size, while a sum is read."""

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.axis, self.axes = axis, frozenset([axis])


class Size(Expression):
    """A symbolic size, or what is computed from sizes; `symbol` is torch's sympy expression."""

    def __init__(self, symbol: Any) -> None:
        super().__init__(symbol)
        self.symbol = symbol


class Element(Expression):
    """An element of a tensor whose values are not read any further; `indices` are sums."""

    def __init__(self, node: fx.Node, indices: tuple[Sum, ...]) -> None:
        super().__init__(node, indices)
        self.node, self.indices = node, indices


class Sum(Expression):
    """A whole number: multiples of atoms (pairs of atom and factor, not 0), and a constant."""

    def __init__(self, terms: frozenset[tuple[Expression, int]], constant: int) -> None:
        super().__init__(terms, constant)
        self.terms, self.constant = terms, constant

    def factor(self, atom: Expression) -> int:
        """The multiple of an atom."""
        return next((factor for found, factor in self.terms if found == atom), 0)


class Quotient(Expression):
    """A sum divided by a positive number, rounded down."""

    def __init__(self, dividend: Sum, divisor: int) -> None:
        super().__init__(dividend, divisor)
        self.dividend, self.divisor = dividend, divisor


class Remainder(Expression):
    """What is left when a sum is divided by a positive number; never negative."""

    def __init__(self, dividend: Sum, divisor: int) -> None:
        super().__init__(dividend, divisor)
        self.dividend, self.divisor = dividend, divisor


class Absolute(Expression):
    """The absolute value of a sum."""

    def __init__(self, of: Sum) -> None:
        super().__init__(of)
        self.of = of


class Constant(Expression):
    """A truth value or a floating-point number."""

    def __init__(self, value: bool | float) -> None:
        super().__init__(type(value).__name__, repr(value))  # repr: nan equals itself, 0.0 and -0.0 differ
        self.value = value


class NotPositive(Expression):
    """Whether a sum is at most 0."""

    def __init__(self, of: Sum) -> None:
        super().__init__(of)
        self.of = of


class Zero(Expression):
    """Whether a sum is 0."""

    def __init__(self, of: Sum) -> None:
        super().__init__(of)
        self.of = of


class Not(Expression):
    """The opposite of a truth value that cannot be taken apart."""

    def __init__(self, of: Expression) -> None:
        super().__init__(of)
        self.of = of


class And(Expression):
    """Whether all of some conditions (two or more, no `And` among them) hold."""

    def __init__(self, conditions: frozenset[Expression]) -> None:
        super().__init__(conditions)
        self.conditions = conditions


class Or(Expression):
    """Whether any of some conditions (two or more, no `Or` among them) holds."""

    def __init__(self, conditions: frozenset[Expression]) -> None:
        super().__init__(conditions)
        self.conditions = conditions


class Choice(Expression):
    """`yes` where a condition holds, else `no`."""

    def __init__(self, condition: Expression, yes: Expression, no: Expression) -> None:
        super().__init__(condition, yes, no)
        self.condition, self.yes, self.no = condition, yes, no


class Apply(Expression):
    """An elementwise operator kept as it is; `operands` are expressions and literals, `dtype` that of its result."""

    def __init__(self, target: Any, operands: tuple[Any, ...], options: tuple[Any, ...]) -> None:
        super().__init__(target, operands, options)
        self.target, self.operands, self.options = target, operands, options


TRUE, FALSE = Constant(True), Constant(False)


# --- whole numbers ---------------------------------------------------------------------------------------------


def whole(value: int) -> Sum:
    """A number."""
    return Sum(frozenset(), value)


def atom(value: Expression) -> Sum:
    """An atom as a sum."""
    return value if isinstance(value, Sum) else Sum(frozenset([(value, 1)]), 0)


def index(axis: int) -> Sum:
    """The index along an axis."""
    return atom(Index(axis))


def add(first: Sum, second: Sum, factor: int = 1) -> Sum:
    """first + factor * second."""
    terms = dict(first.terms)
    for part, times in second.terms:
        terms[part] = terms.get(part, 0) + factor * times
    kept = frozenset((part, times) for part, times in terms.items() if times)
    return Sum(kept, first.constant + factor * second.constant)


def scale(value: Sum, factor: int) -> Sum:
    """factor * value."""
    return add(whole(0), value, factor)


def size(value: int | torch.SymInt) -> Sum:
    """A tensor's size."""
    if isinstance(value, int):
        return whole(value)
    result = whole(0)
    for symbol, factor in value.node.expr.expand().as_coefficients_dict().items():
        if symbol == 1:
            result = add(result, whole(int(factor)))
        elif not symbol.is_Symbol or int(factor) != factor:
            return atom(Size(value.node.expr))
        else:
            result = add(result, atom(Size(symbol)), int(factor))
    return result


def absolute(value: Sum) -> Sum:
    """|value|."""
    return whole(abs(value.constant)) if not value.terms else atom(Absolute(value))


def quotient(value: Sum, divisor: int) -> Sum:
    """Division by a positive number, rounded down."""
    return whole(value.constant // divisor) if not value.terms else atom(Quotient(value, divisor))


def remainder(value: Sum, divisor: int) -> Sum:
    """What division by a positive number leaves."""
    return whole(value.constant % divisor) if not value.terms else atom(Remainder(value, divisor))


def largest(value: Sum, extents: Mapping[int, Sum]) -> int | None:
    """An upper bound, given the extent of each axis; None where none is known."""
    total = value
    for part, factor in value.terms:
        if isinstance(part, Index | Absolute | Remainder) and factor < 0:
            total = add(total, atom(part), -factor)
        elif isinstance(part, Index) and part.axis in extents:
            total = add(add(total, atom(part), -factor), add(extents[part.axis], whole(-1)), factor)
    # The sizes of inputs are at least 1, which sympy calls positive; what is computed from them may be 0.
    if any(not isinstance(part, Size) or not part.symbol.is_positive or factor > 0 for part, factor in total.terms):
        return None
    return total.constant + sum(factor for _, factor in total.terms)


def never_negative(value: Sum, extents: Mapping[int, Sum]) -> bool:
    """Whether a sum is known to be 0 or more."""
    bound = largest(scale(value, -1), extents)
    return bound is not None and bound <= 0


# --- conditions ------------------------------------------------------------------------------------------------


def at_most(first: Sum, second: Sum, extents: Mapping[int, Sum]) -> Expression:
    """first <= second."""
    difference = add(first, second, -1)
    bound = largest(difference, extents)
    if bound is not None and bound <= 0:
        return TRUE
    bound = largest(add(whole(1), difference, -1), extents)
    if bound is not None and bound <= 0:
        return FALSE
    if len(difference.terms) == 1:
        ((part, factor),) = difference.terms
        rest = whole(difference.constant)
        if isinstance(part, Choice):
            yes, no = (add(rest, atom(value), factor) for value in (part.yes, part.no))
            return _cases(part.condition, at_most(yes, whole(0), extents), at_most(no, whole(0), extents))
        if isinstance(part, Absolute) and abs(factor) == 1:
            ways = (at_most(add(rest, part.of, factor * sign), whole(0), extents) for sign in (1, -1))
            return both(*ways) if factor == 1 else either(*ways)
    return NotPositive(difference)


def equal(first: Sum, second: Sum, extents: Mapping[int, Sum]) -> Expression:
    """first == second."""
    difference = add(first, second, -1)
    if not difference.terms:
        return Constant(difference.constant == 0)
    for sign in (1, -1):  # out of reach on one side
        bound = largest(scale(difference, sign), extents)
        if bound is not None and bound < 0:
            return FALSE
    if len(difference.terms) == 1:
        ((part, factor),) = difference.terms
        if isinstance(part, Choice):
            ways = [add(whole(difference.constant), atom(value), factor) for value in (part.yes, part.no)]
            return _cases(part.condition, *(equal(way, whole(0), extents) for way in ways))
    first_part = min(difference.terms, key=lambda term: spell(term[0]))
    return Zero(difference if first_part[1] > 0 else scale(difference, -1))


def _cases(condition: Expression, yes: Expression, no: Expression) -> Expression:
    return either(both(condition, yes), both(opposite(condition), no))


def opposite(value: Expression) -> Expression:
    """Negation, pushed down."""
    if isinstance(value, Constant):
        return Constant(not value.value)
    if isinstance(value, Not):
        return value.of
    if isinstance(value, NotPositive):
        return NotPositive(add(whole(1), value.of, -1))
    if isinstance(value, And):
        return either(*map(opposite, value.conditions))
    if isinstance(value, Or):
        return both(*map(opposite, value.conditions))
    if isinstance(value, Choice):
        return choose(value.condition, opposite(value.yes), opposite(value.no))
    return Not(value)


def both(*conditions: Expression) -> Expression:
    """Whether all conditions hold."""
    return _joined(And, TRUE, FALSE, conditions)


def either(*conditions: Expression) -> Expression:
    """Whether any condition holds."""
    return _joined(Or, FALSE, TRUE, conditions)


def _joined(kind: Any, neutral: Constant, decisive: Constant, conditions: Iterable[Expression]) -> Expression:
    """Flattened, without doubles; decided where a condition stands beside its opposite."""
    found: set[Expression] = set()
    for condition in conditions:
        found |= condition.conditions if isinstance(condition, kind) else {condition}
    found.discard(neutral)
    if decisive in found or any(opposite(item) in found for item in found if not isinstance(item, And | Or)):
        return decisive
    if len(found) < 2:
        return found.pop() if found else neutral
    return kind(frozenset(found))  # type: ignore[no-any-return]


def conjuncts(condition: Expression) -> frozenset[Expression]:
    """The conditions that hold together where this one does."""
    if condition == TRUE:
        return frozenset()
    return condition.conditions if isinstance(condition, And) else frozenset([condition])


# --- choices ---------------------------------------------------------------------------------------------------


def choose(condition: Expression, yes: Expression, no: Expression) -> Expression:
    """`yes` where a condition holds, else `no`; of truth values, numbers or sums."""
    if condition == TRUE or yes == no:
        return yes
    if _agree(condition, yes, no):
        return no
    if isinstance(condition, Not) and _agree(condition.of, yes, no):
        return yes
    if condition == FALSE:
        return no
    if is_condition(yes) or is_condition(no):
        return _cases(condition, yes, no)
    if isinstance(yes, Choice) and yes.condition == condition:
        return choose(condition, yes.yes, no)
    if isinstance(no, Choice) and no.condition == condition:
        return choose(condition, yes, no.no)
    if isinstance(yes, Choice) and yes.no == no:
        return choose(both(condition, yes.condition), yes.yes, no)
    if isinstance(no, Choice) and no.yes == yes:
        return choose(either(condition, no.condition), yes, no.no)
    if isinstance(no, Choice) and no.no == yes:
        return choose(both(opposite(condition), no.condition), no.yes, yes)
    if isinstance(yes, Choice) and yes.yes == no:
        return choose(either(opposite(condition), yes.condition), no, yes.no)
    return Choice(condition, yes, no)


def _agree(condition: Expression, yes: Expression, no: Expression) -> bool:
    """Whether `yes` is `no` wherever a condition `s == 0` holds: they differ by a multiple of s."""
    if not (isinstance(condition, Zero) and isinstance(yes, Sum) and isinstance(no, Sum)):
        return False
    difference, zero = add(yes, no, -1), condition.of
    part, factor = next(iter(zero.terms))
    times, rest = divmod(difference.factor(part), factor)
    return rest == 0 and difference == scale(zero, times)


def is_condition(value: Expression) -> bool:
    """Whether an expression is known to be a truth value (an element of a tensor may be one unseen)."""
    if isinstance(value, Constant):
        return isinstance(value.value, bool)
    return isinstance(value, NotPositive | Zero | Not | And | Or)


# --- text ------------------------------------------------------------------------------------------------------


def spell(value: Any) -> str:
    """`attention_mask[b, j] & j <= i`: an expression as text."""
    return _SPELLINGS[type(value)](value) if isinstance(value, Expression) else str(value)


def _spell_sum(value: Sum) -> str:
    parts = [_spell_term(part, factor) for part, factor in sorted(value.terms, key=lambda term: spell(term[0]))]
    if value.constant or not parts:
        parts.append(f"{'-' if value.constant < 0 else '+'} {abs(value.constant)}")
    text = " ".join(parts)
    return text.removeprefix("+ ") if text.startswith("+") else text.replace("- ", "-", 1)


def _spell_term(part: Expression, factor: int) -> str:
    times = "" if abs(factor) == 1 else f"{abs(factor)}*"
    return f"{'-' if factor < 0 else '+'} {times}{spell(part)}"


def _spell_relation(value: Sum, relation: str) -> str:
    """Terms that are subtracted stand on the right."""
    left = Sum(frozenset(term for term in value.terms if term[1] > 0), max(value.constant, 0))
    right = Sum(frozenset((part, -factor) for part, factor in value.terms if factor < 0), max(-value.constant, 0))
    return f"{spell(left)} {relation} {spell(right)}"


def _spell_not(value: Not) -> str:
    if isinstance(value.of, Zero):
        return _spell_relation(value.of.of, "!=")
    return f"~{spell(value.of)}"


def _spell_joined(sign: str) -> Callable[[Any], str]:
    def text(value: Any) -> str:
        items = sorted(spell(item) if not isinstance(item, And | Or) else f"({spell(item)})"
                       for item in value.conditions)  # fmt: skip
        return f" {sign} ".join(items)

    return text


def _spell_apply(value: Apply) -> str:
    name = getattr(value.target, "__name__", str(value.target)).partition(".")[0]
    return f"{name}({', '.join(map(spell, value.operands))})"


_SPELLINGS: dict[type, Callable[[Any], str]] = {
    Index: lambda value: AXES[value.axis],
    Size: lambda value: str(value.symbol),
    Element: lambda value: f"{value.node.name}[{', '.join(map(spell, value.indices))}]",
    Sum: _spell_sum,
    Quotient: lambda value: f"({spell(value.dividend)}) // {value.divisor}",
    Remainder: lambda value: f"({spell(value.dividend)}) % {value.divisor}",
    Absolute: lambda value: f"|{spell(value.of)}|",
    Constant: lambda value: f"{value.value}",
    NotPositive: lambda value: _spell_relation(value.of, "<="),
    Zero: lambda value: _spell_relation(value.of, "=="),
    Not: _spell_not,
    And: _spell_joined("&"),
    Or: _spell_joined("|"),
    Choice: lambda value: f"({spell(value.yes)} if {spell(value.condition)} else {spell(value.no)})",
    Apply: _spell_apply,
}
