"""What a mask means to a kernel: which keys are padding, which band each query sees, and what remains a bias."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import Program, arguments, dtype, shape
from ..ops.attention import ABSORBED, ABSORBING, attention
from ..pattern import Refusal
from ..rewrite import Applied, Context, PassResult
from ..spellings.magnitude import magnitude
from . import expression as e
from .emit import Emitter, input_of_size, size_node
from .expression import Constant, Element, Expression, Index, Sum
from .reader import Reader

aten = torch.ops.aten
BATCH, HEAD, QUERY, KEY = range(4)


@dataclass(frozen=True)
class Meaning:
    """A mask taken apart: key j is visible to query i of head h where all of these allow it.

    Attributes:
        key_mask: a condition on (b, j): which keys are no padding; None: all.
        left, right: the band i - left <= j <= i + right; None: no limit on that side.
        rest: conditions that are neither.
        bias: what is added to the scores of visible keys; None: nothing.
        hidden: what an additive mask adds to the scores of invisible keys; None for a boolean mask.
    """

    key_mask: Expression | None
    left: Sum | None
    right: Sum | None
    rest: frozenset[Expression]
    bias: Expression | None = None
    hidden: float | None = None

    def __str__(self) -> str:
        parts = [] if self.key_mask is None else [e.spell(self.key_mask)]
        parts += (
            [] if self.left is None else [f"i - {e.spell(self.left)} <= j" if self.left != e.whole(0) else "i <= j"]
        )
        parts += (
            [] if self.right is None else [f"j <= i + {e.spell(self.right)}" if self.right != e.whole(0) else "j <= i"]
        )
        parts += sorted(f"({e.spell(item)})" if isinstance(item, e.Or) else e.spell(item) for item in self.rest)
        text = " & ".join(parts) or "every key"
        return text if self.bias is None else f"{text}, biased by {e.spell(self.bias)}"

    @property
    def is_key_padding(self) -> bool:
        """Whether it only hides keys of a row of the batch, the same ones from every query."""
        return not self.rest and self.left is self.right is self.bias is None

    @property
    def is_causal(self) -> bool:
        """Whether query i sees no key after key i."""
        return self.right == e.whole(0)

    @property
    def window(self) -> int | None:
        """How many keys at most a query sees; None: no fixed number."""
        if self.left is None or self.right is None:
            return None
        width = e.add(e.add(self.left, self.right), e.whole(1))
        return None if width.terms else width.constant

    @property
    def block(self) -> int | None:
        """The size of the diagonal blocks outside of which nothing is visible (`i // c == j // c`); None: no blocks."""
        for condition in self.rest:
            if isinstance(condition, e.Zero) and len(condition.of.terms) == 2 and not condition.of.constant:
                (first, times), (second, other) = condition.of.terms
                both_quotients = isinstance(first, e.Quotient) and isinstance(second, e.Quotient)
                if both_quotients and times == -other and _differ_by_axes(first.args[0], second.args[0]):
                    return int(first.args[1]) if first.args[1] == second.args[1] else None
        return None

    @property
    def is_position_bias(self) -> bool:
        """Whether the bias depends on the head and on i - j alone (ALiBi, T5)."""
        return self.bias is not None and depends_on_difference(self.bias)


def _differ_by_axes(first: Sum, second: Sum) -> bool:
    """Whether two sums are the same but for i in one and j in the other."""
    return e.add(first, second, -1) in (
        e.add(e.index(QUERY), e.index(KEY), -1),
        e.add(e.index(KEY), e.index(QUERY), -1),
    )


def depends_on_difference(value: Expression) -> bool:
    """Whether an expression depends on the query and key index only through i - j."""
    if isinstance(value, Sum):
        row, column = (value.factor(Index(axis)) for axis in (QUERY, KEY))
        others = [part for part, _ in value.terms if not isinstance(part, Index)]
        return row + column == 0 and BATCH not in value.axes and all(map(depends_on_difference, others))
    if BATCH in value.axes:
        return False
    if not value.axes & {QUERY, KEY}:
        return True
    return not isinstance(value, Index) and all(depends_on_difference(part) for part in e.parts(value))


def read(value: Expression) -> Meaning | Refusal:
    """Take a mask apart: a condition (True: visible), or what is added to the scores.

    Returns:
        the meaning, or a Refusal that says what cannot be taken apart.
    """
    if e.is_condition(value) or (isinstance(value, Element) and dtype(value.node) is torch.bool):
        return _of_conditions(e.conjuncts(value))
    split = _split(value)
    if isinstance(split, Refusal):
        return split
    visible, bias, hidden = split
    found = _of_conditions(e.conjuncts(visible))
    return Meaning(found.key_mask, found.left, found.right, found.rest, bias, hidden)


def _of_conditions(conditions: Iterable[Expression]) -> Meaning:
    keys: list[Expression] = []
    rest: list[Expression] = []
    left: Sum | None = None
    right: Sum | None = None
    for condition in sorted(conditions, key=e.spell):
        limit = _limit(condition)
        if condition.axes <= {BATCH, KEY}:
            keys.append(condition)
        elif limit is None:
            rest.append(condition)
        elif limit[0] == "left":
            left = _tighter(left, limit[1], condition, rest)
        else:
            right = _tighter(right, limit[1], condition, rest)
    return Meaning(e.both(*keys) if keys else None, left, right, frozenset(rest))


def _limit(condition: Expression) -> tuple[str, Sum] | None:
    """j <= i + right or i - left <= j, from i and j with factors 1 and -1."""
    if not isinstance(condition, e.NotPositive):
        return None
    total, row, column = condition.of, Index(QUERY), Index(KEY)
    factors = (total.factor(row), total.factor(column))
    if factors not in ((1, -1), (-1, 1)):
        return None
    rest = e.add(e.add(total, e.atom(row), -factors[0]), e.atom(column), -factors[1])
    if rest.axes:
        return None
    return ("right" if factors == (-1, 1) else "left"), e.scale(rest, -1)


def _tighter(known: Sum | None, found: Sum, condition: Expression, rest: list[Expression]) -> Sum:
    """The smaller of two limits; one that cannot be compared stays a condition."""
    if known is None:
        return found
    difference = e.add(known, found, -1)
    if difference.terms:
        rest.append(condition)
        return known
    return found if difference.constant > 0 else known


def _split(value: Expression) -> tuple[Expression, Expression | None, float | None] | Refusal:
    """An additive mask as (visible, bias there, number elsewhere)."""
    if isinstance(value, Constant):
        return e.TRUE, None if value.value == 0 else value, None
    if isinstance(value, e.Choice):
        for visible, kept, other in (
            (value.condition, value.yes, value.no),
            (e.opposite(value.condition), value.no, value.yes),
        ):
            if isinstance(other, Constant) and other.value <= -1e4:
                inner = _split(kept)
                if isinstance(inner, Refusal):
                    return inner
                if inner[2] not in (None, other.value):
                    return Refusal(f"hidden keys get {inner[2]} or {other.value}")
                return e.both(visible, inner[0]), inner[1], other.value
        numbers = sorted({leaf for leaf in _leaves(value) if leaf <= -1e4})
        return Refusal(f"hidden keys get {' or '.join(map(str, numbers))}") if numbers else (e.TRUE, value, None)
    if isinstance(value, e.Apply) and value.target in (aten.add.Tensor, aten.add.Scalar):
        parts = [_split(item) for item in value.operands[:2]]
        first, second = parts
        if isinstance(first, Refusal) or isinstance(second, Refusal):
            return first if isinstance(first, Refusal) else second
        if first[2] is not None and second[2] is not None and not first[2] == second[2] == -math.inf:
            return Refusal(f"two masks are added: a key hidden by both gets {first[2] + second[2]}")
        biases = [part[1] for part in (first, second) if part[1] is not None]
        bias = value if first[2] is None and second[2] is None else biases[0] if len(biases) == 1 else None
        if len(biases) == 2 and bias is None:
            bias = e.Apply(value.target, tuple(biases), value.options)
        return e.both(first[0], second[0]), bias, first[2] if first[2] is not None else second[2]
    return e.TRUE, value, None


def _leaves(value: Expression) -> Iterator[float]:
    """The numbers that a choice is made between."""
    if isinstance(value, e.Choice):
        yield from _leaves(value.yes)
        yield from _leaves(value.no)
    elif isinstance(value, Constant):
        yield value.value


# --- from a mask tensor to arguments of the operator -----------------------------------------------------------


def read_masks(program: Program, context: Context, result: PassResult) -> bool:
    """Say in the arguments of each attention what its `bias` says, as far as that is a mask; whether any changed.

    before:  %mask = bool[B, 1, N, M] ...;  %y = fxpress.attention(%q, %k, %v, bias=%mask)
    after:   %y = fxpress.attention(%q, %k, %v, key_mask=%padding, right=0)
    """
    made: dict[Any, fx.Node] = {}
    changed = False
    for node in program.calls(attention):
        if arguments(node)["bias"] is None:
            continue
        found = _as_arguments(program, node, made)
        if isinstance(found, Refusal):
            result.refusals.append(Refusal(found.reason, "mask", node.name))
        elif found[0] and context.take():
            result.matches.append(Applied("mask", node.name, str(found[1])))
            result.rewrites["mask"] += 1
            program.replace(node, program.call_again(node, **found[0]))
            changed = True
    return changed


def _as_arguments(
    program: Program, node: fx.Node, made: dict[Any, fx.Node]
) -> tuple[dict[str, Any], Meaning] | Refusal:
    """What to change in the arguments of an attention (nothing if its bias hides no key), and what that means."""
    given = arguments(node)
    reader = Reader(program, (*shape(given["query"])[:3], shape(given["key"])[2]))
    found = read(reader.mask(given["bias"]))
    if isinstance(found, Refusal):
        return found
    if found.rest:
        return Refusal(f"no argument says {' & '.join(sorted(map(e.spell, found.rest)))}; the mask is {found}")
    hides = [found.key_mask, found.left, found.right]
    if hides == [None, None, None]:
        return ({"bias": None} if found.bias is None else {}), found
    if any(given[name] is not None for name in ("key_mask", "left", "right")):
        return Refusal("the attention has a mask besides its bias")
    changes: dict[str, Any] = {"bias": None}
    if found.hidden is not None and found.hidden > -math.inf:
        if found.hidden > ABSORBING:
            return Refusal(f"hidden keys get {found.hidden}, which scores show through in a row without visible keys")
        changes["empty"] = "mean"
    if found.bias is not None:
        changes["bias"] = reader.nodes.get(found.bias)
        if changes["bias"] is None:
            return Refusal(f"no node holds what is added to visible keys alone: {e.spell(found.bias)}")
        # Bounded from below, hidden keys all get one number, whatever is added to them.
        alike = changes.get("empty") is None or given["empty"] == "mean"
        if not alike and magnitude(changes["bias"]) > ABSORBED:
            return Refusal(f"{e.spell(found.bias)} may itself be as low as the {found.hidden} that hidden keys get")
    for side, limit in (("left", found.left), ("right", found.right)):
        if limit is not None:
            changes[side] = _limit_node(program, limit, node)
            if changes[side] is None:
                return Refusal(f"the band's limit {e.spell(limit)} is made of more than sizes of inputs")
    if found.key_mask is not None:
        unknown = [size for size in _sizes(found.key_mask) if input_of_size(program, size.symbol) is None]
        if unknown:
            return Refusal(f"the size {unknown[0]} is that of no input")
        changes["key_mask"] = _key_mask(program, found.key_mask, node, made)
    return changes, found


def _key_mask(program: Program, condition: Expression, node: fx.Node, made: dict[Any, fx.Node]) -> fx.Node:
    """The condition as a boolean tensor [B, M]; attentions over keys of the same size share it."""
    given = arguments(node)
    extents = (shape(given["query"])[0], shape(given["key"])[2])
    place = (condition, *map(str, extents))  # attentions over keys of one size share what is made
    if place not in made:
        sizes = [
            size_node(program, extent, node) or program.call(aten.sym_size.int, source, axis, before=node)
            for extent, source, axis in zip(extents, (given["query"], given["key"]), (0, 2), strict=True)
        ]
        made[place] = Emitter(program, (BATCH, KEY), (sizes[0], sizes[1]), node).matrix(condition)
    return made[place]


def _sizes(value: Expression) -> Iterator[e.Size]:
    """The sizes in an expression."""
    if isinstance(value, e.Size):
        yield value
    for part in e.parts(value):
        yield from _sizes(part)


def _limit_node(program: Program, limit: Sum, node: fx.Node) -> Any:
    """A band's limit as a number or a node that gives a size; None: it is made of something else."""
    if not limit.terms:
        return limit.constant
    result: Any = limit.constant
    for part, factor in sorted(limit.terms, key=lambda term: e.spell(term[0])):
        size = size_node(program, part.symbol, node) if isinstance(part, e.Size) else None
        if size is None:
            return None
        size = size if factor == 1 else program.call(operator.mul, size, factor, before=node)
        result = (
            size if isinstance(result, int) and result == 0 else program.call(operator.add, size, result, before=node)
        )
    return result
