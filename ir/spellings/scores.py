"""Attention written out, read from the product of probabilities and values up to that of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph import arguments, dtype, same_sizes, shape, source_of
from ..pattern import Match, Refusal, spell
from .magnitude import magnitude
from .numbers import held, is_zero_or_one, number, times_complement
from .softmax import MAXIMA, reduced

aten = torch.ops.aten

MASKED = -1e4  # what stands for "masked" among scores is at most this: its exponential is 0 in fp32 and fp64


class Mismatch(Exception):
    """What is read is no attention; the message says where and why."""


@dataclass(frozen=True)
class Term:
    """A step that masks or biases scores.

    An addition of `factor` times `tensor`; or, where `fill` is given, the replacement of scores by that value: those
    where `tensor` is False if `keeps`, else those where it is True. `at` is the shape of the scores there.
    """

    tensor: fx.Node
    at: tuple[Any, ...]
    factor: float = 1.0
    fill: float | None = None
    keeps: bool = True


@dataclass
class Reading:
    """What was read: softmax(mask(softcap(query key^T scale))) value, terms in the order in which they are applied."""

    query: Any
    key: Any
    value: Any
    product: tuple[Any, ...]  # the shape of the scores where queries and keys are multiplied
    transposed: bool = False  # the key is [..., D, M]
    scale: float | None = 1.0
    multiplier: Any = None  # a scale that is no number, and multiplies the query
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    sinks: fx.Node | None = None
    right: int | None = None
    safe: bool = False  # a row of -inf gives zeros
    clamped: bool = False  # scores are at least the smallest number
    heads: Any = None  # the number of heads where the scores are seen as [B, H, N, M]


def find(root: fx.Node) -> Match | Refusal | None:
    """Attention whose result is the matmul `root`; captured as `reading`. A Refusal for a softmax that is none.

    Or a matmul times the share of a row's probability that sinks leave it, sigmoid(logsumexp(scores) - sinks).
    """
    if root.target is aten.mul.Tensor:
        return _find_shared(root)
    if root.target is not aten.matmul.default:
        return None
    softmax = _softmax_behind(root.args[0])
    if softmax is None:
        other = _softmax_behind(root.args[1])
        if other is not None:
            return Refusal(f"{other.name} is the second operand of {root.name}, expected the first")
        powers = _softmax_behind(root.args[0], (aten.exp.default,))
        if powers is None or not leads_to_product(powers.args[0]):
            return None
        return Refusal(f"expected a softmax of the scores, found {spell(powers)}{source_of(powers)}")
    reader = _Reader(root)
    try:
        reading = reader.read()
        _check_readers(reader.nodes, root)
    except Mismatch as mismatch:
        return Refusal(f"{mismatch}")
    return Match(root, {"reading": reading}, frozenset(reader.nodes))


def _find_shared(root: fx.Node) -> Match | Refusal | None:
    """Attention with sinks as Granite writes it: the probabilities of the sinks are taken off the result."""
    for matmul, share in (root.args, reversed(root.args)):
        gate = _chain(share, aten.unsqueeze.default, aten.sigmoid.default, aten.sub.Tensor)
        if gate is None or not isinstance(matmul, fx.Node) or matmul.target is not aten.matmul.default:
            continue
        total, sinks = gate[-1].args[:2]
        if not isinstance(total, fx.Node) or total.target is not aten.logsumexp.default:
            continue
        reader = _Reader(matmul)
        try:
            softmax = _softmax_behind(matmul.args[0])
            if softmax is None or total.args[0] is not softmax.args[0] or not is_last(total.args[1], softmax):
                raise Mismatch(f"{total.name} is not that of the scores of {spell(softmax)}")
            if arguments(gate[-1])["alpha"] != 1:
                raise Mismatch(f"{gate[-1].name} takes a multiple of the sinks")
            reader.reading.sinks = _vector(sinks, shape(softmax)[1:2] if len(shape(softmax)) == 4 else ())
            reading = reader.read()
            if not reading.safe and held(sum(map(_lowest, reading.terms)), dtype(matmul)) == -math.inf:
                raise Mismatch(f"{matmul.name} is NaN where a mask of -inf leaves no key, expected a finite one")
            reader.nodes |= {root, total, *gate}
            _check_readers(reader.nodes, root)
        except Mismatch as mismatch:
            return Refusal(f"{mismatch}")
        return Match(root, {"reading": reading}, frozenset(reader.nodes))
    return None


def _lowest(term: Term) -> float:
    """The lowest number that a term adds to scores, or fills them with."""
    return -abs(term.factor) * magnitude(term.tensor) if term.fill is None else term.fill


def _chain(node: Any, *targets: Any) -> list[fx.Node] | None:
    """The nodes from one towards its inputs, if they are calls of these operators; casts may stand between."""
    found: list[fx.Node] = []
    waiting = list(targets)
    while waiting:
        if not isinstance(node, fx.Node) or node.target not in (waiting[0], aten._to_copy.default):
            return None
        found.append(node)
        if node.target is waiting[0]:
            waiting.pop(0)
        node = node.args[0]
    return found


def _check_readers(nodes: set[fx.Node], root: fx.Node) -> None:
    for node in nodes - {root}:
        for user in node.users:
            if user not in nodes:
                reader = "returned by the model" if user.op == "output" else f"also read by {user.name}"
                raise Mismatch(f"{node.name} is {reader}{source_of(node)}")


_SOFTMAXES = (aten.softmax.int, aten._safe_softmax.default)
_AFTER = {
    aten._to_copy.default, aten.reshape.default, aten.slice.Tensor, aten.dropout.default, aten.mul.Tensor,
    aten.div.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.transpose.int, aten.nan_to_num.default,
}  # fmt: skip


def _softmax_behind(value: Any, targets: tuple[Any, ...] = _SOFTMAXES) -> fx.Node | None:
    """The softmax that a value is made of by steps as they stand between probabilities and values."""
    seen, waiting = set(), [value]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in targets:
            return node
        if node.target in _AFTER:
            waiting += reversed(node.all_input_nodes)
    return None


def is_last(axis: Any, node: fx.Node) -> bool:
    """Whether an axis, or a list of one, is the last of a node's value."""
    axes = axis if isinstance(axis, list | tuple) else [axis]
    return len(axes) == 1 and axes[0] % len(shape(node)) == len(shape(node)) - 1


class _Reader:
    """Follows one attention upwards; `factor` is what everything above the current node is multiplied by."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.nodes = {root}
        self.factor = 1.0
        self.capped = False
        self.zeroed = False  # NaN becomes 0 after the softmax: rows of -inf (where scores are NaN, they are a bug)
        self.reading = Reading(None, None, root.args[1], ())

    def read(self) -> Reading:
        scores = self._softmax()
        while True:
            if scores.target is aten.matmul.default:
                self._product(scores, *scores.args)
                self.reading.safe |= self.zeroed
                return self.reading
            step = _STEPS.get(scores.target)
            if step is None or not leads_to_product(scores):
                raise Mismatch(f"expected the product of queries and keys, found {spell(scores)}")
            self.nodes.add(scores)
            scores = step(self, scores, arguments(scores))
            if not isinstance(scores, fx.Node):
                raise Mismatch(f"expected scores, found {scores!r}")
            if len(shape(scores)) == 4:
                self.reading.heads = self.reading.heads or shape(scores)[1]

    # --- probabilities

    def _softmax(self) -> Any:
        """Up to the softmax and over it; gives the scores."""
        node: Any = self.root.args[0]
        cut: fx.Node | None = None
        while node.target not in _SOFTMAXES:
            self.nodes.add(node)
            given = arguments(node)
            if node.target is aten.slice.Tensor and cut is None and is_last(given["dim"], node):
                cut = node
            elif node.target is aten.reshape.default:
                self._reshape(node, given)
            elif node.target is aten.nan_to_num.default and number(given["nan"] or 0) == 0:
                self.zeroed = True
            elif node.target is aten.dropout.default:
                raise Mismatch(f"{node.name} drops probabilities with p={given['p']}")
            elif node.target is not aten._to_copy.default:
                raise Mismatch(f"{spell(node)} changes the probabilities after the softmax{source_of(node)}")
            node = given["self"]
        self.nodes.add(node)
        given = arguments(node)
        if not is_last(given["dim"], node):
            raise Mismatch(f"{node.name} is over axis {given['dim']} of {len(shape(node))}, expected the last")
        self._check_precision(node)
        self.reading.safe = node.target is aten._safe_softmax.default
        if len(shape(node)) == 4:
            self.reading.heads = shape(node)[1]
        return given["self"] if cut is None else self._sinks(given["self"], cut)

    def _sinks(self, node: Any, cut: fx.Node) -> Any:
        """Over the concatenation of scores and sinks, whose column the slice `cut` drops; gives the scores."""
        while node.target in (aten._to_copy.default, aten.sub.Tensor):
            self.nodes.add(node)
            given = arguments(node)
            node = self._sub(node, given) if node.target is aten.sub.Tensor else given["self"]
        given = arguments(node)
        parts = given.get("tensors", ())
        if node.target is not aten.cat.default or len(parts) != 2 or not is_last(given["dim"], node):
            raise Mismatch(f"expected scores and sinks joined by cat on the last axis, found {spell(node)}")
        self.nodes.add(node)
        first = leads_to_product(parts[0])
        scores, sinks = parts if first else reversed(parts)
        given = arguments(cut)
        drops_one = given["step"] == 1 and same_sizes(shape(cut)[-1:], [shape(node)[-1] - 1])
        if not (drops_one and (given["start"] or 0) == (0 if first else 1) and same_sizes(shape(sinks)[-1:], [1])):
            raise Mismatch(f"expected the column of the sinks to be dropped from {node.name}")
        if self.reading.sinks is not None:
            raise Mismatch(f"{node.name} joins sinks to scores that have sinks")
        self.reading.sinks = _per_head(sinks)
        return scores

    # --- scores

    def _add_term(self, node: fx.Node, tensor: Any, factor: float) -> None:
        if not isinstance(tensor, fx.Node):
            raise Mismatch(f"{node.name} adds {tensor!r} to the scores, expected a tensor")
        tensor = self._unexpanded(tensor)
        self._add(Term(tensor, shape(node), factor), node)
        if not dtype(tensor).is_floating_point:
            raise Mismatch(f"{node.name} adds a {dtype(tensor)} tensor".replace("torch.", ""))

    def _unexpanded(self, mask: Any) -> Any:
        """A mask before it is expanded to the scores' shape: it broadcasts, and must not read the scores' sizes."""
        while isinstance(mask, fx.Node) and mask.target in (aten.expand.default, aten.expand_as.default):
            if mask.target is aten.expand_as.default:
                self.nodes.add(mask)
            mask = mask.args[0]
        return mask

    def _add(self, term: Term, node: fx.Node) -> None:
        if self.capped:
            raise Mismatch(f"{node.name} stands before the soft cap, expected masks after it")
        if self.reading.multiplier is not None:
            raise Mismatch(f"{node.name} stands before a scale that is no number, expected masks after it")
        self.reading.terms.insert(0, term)

    def _same_shape(self, node: fx.Node, scores: Any) -> Any:
        if not same_sizes(shape(node), shape(scores)):
            raise Mismatch(f"{node.name} broadcasts the scores from {shape(scores)} to {shape(node)}")
        return scores

    def _check_precision(self, node: fx.Node) -> None:
        if dtype(node) is torch.float64 and dtype(self.root) is not torch.float64:
            raise Mismatch(f"{node.name} computes in float64")

    def _cast(self, node: fx.Node, given: dict[str, Any]) -> Any:
        self._check_precision(node)
        return given["self"]

    def _reshape(self, node: fx.Node, given: dict[str, Any]) -> Any:
        before = shape(given["self"])
        if not same_sizes(before[-2:], shape(node)[-2:]):
            raise Mismatch(
                f"{node.name} changes the rows or columns of the scores: {list(before)}, {list(shape(node))}"
            )
        return given["self"]

    def _scaled(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """Multiplication or division of the scores."""
        first, second = given["self"], given["other"]
        divided = node.target is aten.div.Tensor
        scores, by = (first, second) if divided or leads_to_product(first) else (second, first)
        factor = number(by)
        self._same_shape(node, scores)
        if factor is not None and factor != 0 and math.isfinite(factor):
            self.factor = self.factor / factor if divided else self.factor * factor
        elif isinstance(by, fx.Node) and not divided and self._keeps(node, by):
            pass
        elif isinstance(by, fx.Node) and not divided and self.reading.multiplier is None and not self.capped:
            self.reading.multiplier = self._per_row(node, scores, by)
        else:
            raise Mismatch(f"{node.name} scales the scores by {spell(by)}, expected a number")
        return scores

    def _keeps(self, node: fx.Node, mask: fx.Node) -> bool:
        """Scores times a mask of zeros and ones, to which a low number times (1 - mask) is added next: a fill."""
        terms = self.reading.terms
        if not terms or terms[0].fill is not None or not is_zero_or_one(mask):
            return False
        low = held(times_complement(terms[0].tensor, mask), dtype(terms[0].tensor))
        if low is None or not low * terms[0].factor <= MASKED:
            return False
        terms[0] = Term(mask, shape(node), fill=low * terms[0].factor)
        return True

    def _per_row(self, node: fx.Node, scores: fx.Node, by: fx.Node) -> fx.Node:
        """A scale that is the same for all keys, directly after the product: it may as well multiply the query."""
        value = by.meta["val"]
        constant = not isinstance(value, torch.Tensor) or value.dim() == 0 or same_sizes(value.shape[-1:], [1])
        if not constant or scores.target is not aten.matmul.default:
            raise Mismatch(f"{node.name} scales the scores by {spell(by)}, expected one number for each row")
        return by

    def _added(self, node: fx.Node, given: dict[str, Any]) -> Any:
        first, second = given["self"], given["other"]
        swapped = not leads_to_product(first)
        scores, tensor = (second, first) if swapped else (first, second)
        alpha = number(given["alpha"])
        if alpha is None or (swapped and alpha != 1):
            raise Mismatch(f"{node.name} has alpha={spell(given['alpha'])}, expected 1")
        if number(tensor) != 0:
            self._add_term(node, tensor, self.factor * alpha)
        return self._same_shape(node, scores)

    def _sub(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """A mask that is subtracted, or each row's own maximum, which changes no softmax."""
        scores, tensor, alpha = given["self"], given["other"], number(given["alpha"])
        maximum = reduced(tensor, scores, *MAXIMA)
        if maximum is not None and is_last(maximum[0], scores):
            changed = self._changed_by_a_shift()
            if changed:
                raise Mismatch(f"{node.name} takes each row's maximum off the scores, which changes {changed}")
            self.nodes |= maximum[1]
            self.reading.safe = False
            return scores
        if alpha is None or not leads_to_product(scores):
            raise Mismatch(f"expected scores less a mask, found {spell(node)}")
        self._add_term(node, tensor, -self.factor * alpha)
        return self._same_shape(node, scores)

    def _changed_by_a_shift(self) -> str | None:
        """What between the scores and their probabilities another number in all columns of a row would change."""
        if self.capped:
            return "what the soft cap gives"
        if self.reading.clamped:
            return "a row of -inf, which the bound then misses"
        return "the share of the sinks" if self.reading.sinks is not None else None

    def _tanh(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """factor * tanh(x): the soft cap is the factor, and the scores before it are factor * x."""
        if self.capped or self.factor <= 0 or self.reading.multiplier is not None:
            raise Mismatch(f"{node.name} is no soft cap: c * tanh(scores / c)")
        self.capped, self.reading.softcap = True, self.factor
        return given["self"]

    def _filled(self, node: fx.Node, given: dict[str, Any]) -> Any:
        self._fill(node, given["mask"], given["value"], keeps=False)
        return self._same_shape(node, given["self"])

    def _where(self, node: fx.Node, given: dict[str, Any]) -> Any:
        keeps = leads_to_product(given["self"])
        scores, value = (given["self"], given["other"]) if keeps else (given["other"], given["self"])
        self._fill(node, given["condition"], value, keeps)
        return self._same_shape(node, scores)

    def _fill(self, node: fx.Node, mask: fx.Node, value: Any, keeps: bool) -> None:
        fill = held(number(value), dtype(node))
        if fill is None:
            raise Mismatch(f"{node.name} fills masked scores with {spell(value)}, expected a number")
        if math.isfinite(fill) and held(fill * self.factor, dtype(node)) == -math.inf:
            raise Mismatch(f"{node.name} fills masked scores with {fill:g}, which overflows when it is scaled")
        if not fill * self.factor <= MASKED:
            raise Mismatch(f"{node.name} fills masked scores with {fill * self.factor:g}, expected at most {MASKED:g}")
        self._add(Term(self._unexpanded(mask), shape(node), fill=fill * self.factor, keeps=keeps), node)

    def _clamped(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """Scores that are at least the smallest number: a row of -inf becomes one of equal scores."""
        first = given["self"]
        second = given["other"] if node.target is aten.maximum.default else given["min"]
        scores, least = (first, second) if leads_to_product(first) else (second, first)
        lowest = torch.finfo(dtype(scores)).min if dtype(scores) is not torch.float16 else math.nan
        if self.reading.terms or self.capped or self.factor != 1 or number(least) != lowest or given.get("max"):
            raise Mismatch(
                f"{node.name} bounds the scores by {spell(least)}, expected the smallest number, after masks"
            )
        self.reading.clamped = True
        return self._same_shape(node, scores)

    def _product(self, node: fx.Node, query: Any, key: Any) -> None:
        self.nodes.add(node)
        self.reading.query, self.reading.key, self.reading.transposed = query, key, True
        self.reading.scale, self.reading.product = self.factor, shape(node)


_STEPS: dict[Any, Any] = {
    aten._to_copy.default: _Reader._cast,
    aten.reshape.default: _Reader._reshape,
    aten.mul.Tensor: _Reader._scaled,
    aten.div.Tensor: _Reader._scaled,
    aten.add.Tensor: _Reader._added,
    aten.sub.Tensor: _Reader._sub,
    aten.tanh.default: _Reader._tanh,
    aten.masked_fill.Scalar: _Reader._filled,
    aten.masked_fill.Tensor: _Reader._filled,
    aten.where.self: _Reader._where,
    aten.where.ScalarOther: _Reader._where,
    aten.where.ScalarSelf: _Reader._where,
    aten.maximum.default: _Reader._clamped,
    aten.clamp.default: _Reader._clamped,
}


def leads_to_product(value: Any) -> bool:
    """Whether a value is made of a matmul by steps as they stand between that product and a softmax."""
    seen, waiting = set(), [value]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is aten.matmul.default:
            return True
        if node.target in _STEPS:
            waiting += _operands(node)
    return False


def _operands(node: fx.Node) -> Iterator[Any]:
    given = arguments(node)
    return (given[name] for name in ("self", "other") if name in given)


def _per_head(sinks: Any) -> fx.Node:
    """The vector [H] of which the column of sinks [B, H, N, 1] is made."""
    return _vector(sinks, (shape(sinks)[1],) if len(shape(sinks)) == 4 else ())


def _vector(sinks: Any, wanted: tuple[Any, ...]) -> fx.Node:
    """The vector of that shape of which a tensor is made by views."""
    node = sinks
    while isinstance(node, fx.Node) and len(shape(node)) > 1:
        if node.target not in (
            aten.expand.default,
            aten.reshape.default,
            aten.unsqueeze.default,
            aten._to_copy.default,
        ):
            raise Mismatch(f"expected sinks that are one number for each head, found {spell(node)}")
        node = node.args[0]
    if not isinstance(node, fx.Node) or not same_sizes(shape(node), wanted):
        raise Mismatch(f"expected sinks that are one number for each head, found {spell(node)}")
    return node
