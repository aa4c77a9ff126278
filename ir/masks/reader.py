"""Reading a graph as expressions: what a tensor holds at given indices.

`Reader.read(node, indices)` follows the graph from a node towards its inputs: views change the indices, arange turns
an index into a number, elementwise operators combine what they read. What is not read any further, a user's padding
mask or a learned bias, becomes an `Element` of that node at those indices. So every answer is exact; at worst it says
little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, arguments, dtype, same_sizes, shape
from . import expression as e
from .expression import Constant, Element, Expression, Sum

aten = torch.ops.aten
Indices = tuple[Sum, ...]
Rule = Callable[["Reader", fx.Node, Indices], Expression | None]

_LARGEST = 2000  # parts of an expression beyond which a tensor is not read further


class Reader:
    """Reads tensors of a program as functions of (b, h, i, j).

    Args:
        extents: the sizes of the four axes.
    """

    def __init__(self, program: Program, extents: Sequence[int | torch.SymInt]) -> None:
        self.program = program
        self.extents: Mapping[int, Sum] = {axis: e.size(extent) for axis, extent in enumerate(extents)}
        self.nodes: dict[Expression, fx.Node] = {}  # nodes that broadcast to the four axes, by what they hold
        self._known: dict[tuple[fx.Node, Indices], Expression] = {}

    def mask(self, node: fx.Node) -> Expression:
        """What a tensor that broadcasts to the four axes holds at (b, h, i, j)."""
        return self.read(node, self.aligned(node))

    def aligned(self, node: fx.Node) -> Indices:
        """The indices of a tensor that broadcasts to the four axes."""
        sizes = shape(node)
        return tuple(
            e.whole(0) if isinstance(extent, int) and extent == 1 else e.index(4 - len(sizes) + axis)
            for axis, extent in enumerate(sizes)
        )

    def read(self, node: Any, indices: Indices) -> Expression:
        """What a node, or a literal, holds at some indices."""
        if not isinstance(node, fx.Node):
            return literal(node)
        value = node.meta.get("val")
        if isinstance(value, bool | float):
            return literal(value)
        if isinstance(value, int | torch.SymInt):
            return e.size(value)
        if not isinstance(value, Tensor):
            return Element(node, ())
        key = (node, indices)
        if key not in self._known:
            found = self._read(node, indices)
            if found is None or found.count > _LARGEST:
                found = self.element(node, indices)
            self._known[key] = found
            if len(indices) <= 4 and indices == self.aligned(node):
                self.nodes.setdefault(found, node)
        return self._known[key]

    def _read(self, node: fx.Node, indices: Indices) -> Expression | None:
        if node.op == "get_attr":
            return _constant(self, node, indices)
        if node.op != "call_function":
            return None
        rule = RULES.get(node.target)
        if rule is not None:
            return rule(self, node, indices)
        tags = getattr(node.target, "tags", ())
        return _apply(self, node, indices) if torch.Tag.pointwise in tags else None

    def element(self, node: fx.Node, indices: Indices) -> Expression:
        """An element that is not read further, as a sum where it is a whole number."""
        found = Element(node, indices)
        return found if kind(node) in ("bool", "float") else e.atom(found)

    def operand(self, node: Any, indices: Indices) -> Expression:
        """What an operand that broadcasts against the result's indices holds."""
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            return self.read(node, ())
        sizes = shape(node)
        own = indices[len(indices) - len(sizes) :]
        return self.read(
            node,
            tuple(
                e.whole(0) if isinstance(extent, int) and extent == 1 else found
                for extent, found in zip(sizes, own, strict=True)
            ),
        )


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


# --- views -----------------------------------------------------------------------------------------------------


def _unsqueeze(reader: Reader, node: fx.Node, indices: Indices) -> Expression:
    axis = arguments(node)["dim"] % len(indices)
    return reader.read(node.args[0], indices[:axis] + indices[axis + 1 :])


def _expand(reader: Reader, node: fx.Node, indices: Indices) -> Expression:
    return reader.operand(node.args[0], indices)


def _transpose(reader: Reader, node: fx.Node, indices: Indices) -> Expression:
    given, moved = arguments(node), list(indices)
    first, second = (given[name] % len(indices) for name in ("dim0", "dim1"))
    moved[first], moved[second] = moved[second], moved[first]
    return reader.read(node.args[0], tuple(moved))


def _permute(reader: Reader, node: fx.Node, indices: Indices) -> Expression:
    order = [axis % len(indices) for axis in arguments(node)["dims"]]
    return reader.read(node.args[0], tuple(indices[order.index(axis)] for axis in range(len(indices))))


def _slice(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    axis, start = given["dim"] % len(indices), given["start"]
    first = reader.read(start, ()) if start is not None else e.whole(0)
    if not isinstance(first, Sum):
        return None
    if not first.terms and first.constant < 0:
        first = e.add(e.size(shape(given["self"])[axis]), first)
    if not e.never_negative(first, reader.extents):
        return None  # it would count from the end, or as 0
    moved = e.add(first, indices[axis], given["step"])
    return reader.read(given["self"], (*indices[:axis], moved, *indices[axis + 1 :]))


def _select(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    axis, place = given["dim"] % (len(indices) + 1), reader.read(given["index"], ())
    if not isinstance(place, Sum) or place.terms:
        return None
    if place.constant < 0:
        place = e.add(e.size(shape(given["self"])[axis]), place)
    return reader.read(given["self"], (*indices[:axis], place, *indices[axis:]))


def _reshape(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """Axes of size 1 come and go; others must stay as they are."""
    source: Any = node.args[0]
    before, after = shape(source), shape(node)
    kept_before = [axis for axis, extent in enumerate(before) if not _is_one(extent)]
    kept_after = [axis for axis, extent in enumerate(after) if not _is_one(extent)]
    if not same_sizes([before[axis] for axis in kept_before], [after[axis] for axis in kept_after]):
        return None
    moved = [e.whole(0)] * len(before)
    for axis, place in zip(kept_before, kept_after, strict=True):
        moved[axis] = indices[place]
    return reader.read(source, tuple(moved))


def _is_one(extent: Any) -> bool:
    return isinstance(extent, int) and extent == 1


# --- sources ---------------------------------------------------------------------------------------------------


def _arange(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    start, step = (reader.read(given.get(name, value), ()) for name, value in (("start", 0), ("step", 1)))
    if kind(node) != "int" or not isinstance(start, Sum) or not isinstance(step, Sum) or step.terms:
        return None
    return e.add(start, indices[0], step.constant)


def _filled(value: float | None) -> Rule:
    """Every element the same number; None: the number is an argument."""

    def rule(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
        given = arguments(node)
        stated: Any = value if value is not None else given.get("fill_value", given.get("s"))
        if isinstance(stated, fx.Node):
            return reader.operand(stated, ()) if kind_of(stated) == kind(node) else None
        if kind(node) == "int":
            return e.whole(int(stated))
        return Constant(bool(stated)) if kind(node) == "bool" else Constant(rounded(stated, dtype(node)))

    return rule


def kind_of(node: fx.Node) -> str:
    """The kind of a tensor, or of a number that the graph computes."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return kind(node)
    return "int" if isinstance(value, int | torch.SymInt) else "float"


def _constant(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """A buffer whose values follow a rule: all the same, or one above a diagonal and another elsewhere."""
    tensor = reader.program.tensor(node)
    if not isinstance(tensor, Tensor) or tensor.requires_grad or tensor.numel() == 0 or tensor.is_complex():
        return None
    if tensor.numel() == 1 or bool((tensor == tensor.flatten()[0]).all()):
        return _value(tensor.flatten()[0])
    if tensor.dim() < 2 or any(extent != 1 for extent in tensor.shape[:-2]):
        return None
    table = tensor.reshape(tensor.shape[-2:])
    corner, other = table[-1, 0], table[0, -1]
    offset = int((table[0] == corner).sum()) - 1 if bool(table[0, 0] == corner) else -int((table[:, 0] == other).sum())
    below = torch.ones(table.shape, dtype=torch.bool).tril(offset)
    if not bool((torch.where(below, corner, other) == table).all()):
        return None
    visible = e.at_most(indices[-1], e.add(indices[-2], e.whole(offset)), reader.extents)
    return _chosen(visible, _value(corner), _value(other))


def _value(scalar: Tensor) -> Expression:
    return literal(scalar.item())


def _chosen(condition: Expression, yes: Expression, no: Expression) -> Expression:
    found = e.choose(condition, yes, no)
    return e.atom(found) if isinstance(yes, Sum) else found


def _triangle(lower: bool) -> Rule:
    def rule(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
        given = arguments(node)
        row, column, offset = indices[-2], indices[-1], reader.read(given["diagonal"], ())
        if not isinstance(offset, Sum):
            return None
        edge = e.add(row, offset)
        kept = e.at_most(column, edge, reader.extents) if lower else e.at_most(edge, column, reader.extents)
        inside = reader.read(given["self"], indices)
        nothing: Expression = {"bool": e.FALSE, "int": e.whole(0), "float": Constant(0.0)}[kind(node)]
        return _chosen(kept, inside, nothing)

    return rule


# --- elements of elements --------------------------------------------------------------------------------------


def _index(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """Advanced indexing of the leading axes."""
    given = arguments(node)
    selectors: list[Any] = list(given["indices"])
    if any(item is None or kind(item) != "int" for item in selectors):
        return None
    rank = max(len(shape(item)) for item in selectors)
    places = [reader.operand(item, indices[:rank]) for item in selectors]
    return _element_at(reader, given["self"], (*places, *indices[rank:]))


def _gather(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    axis, place = given["dim"] % len(indices), reader.read(given["index"], indices)
    return _element_at(reader, given["self"], (*indices[:axis], place, *indices[axis + 1 :]))


def _index_select(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    axis = given["dim"] % len(indices)
    place = reader.operand(given["index"], (indices[axis],))
    return _element_at(reader, given["self"], (*indices[:axis], place, *indices[axis + 1 :]))


def _embedding(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    return _element_at(reader, given["weight"], (reader.read(given["indices"], indices[:-1]), indices[-1]))


def _element_at(reader: Reader, source: fx.Node, places: Sequence[Expression]) -> Expression | None:
    """An element of `source`; negative indices count from the end, so only those that cannot be negative are read."""
    sums = [place for place in places if isinstance(place, Sum)]
    if len(sums) < len(places):
        return None
    if all(e.never_negative(place, reader.extents) for place in sums):
        return reader.read(source, tuple(sums))
    # A table indexed by what is computed is kept as an element of the table.
    return reader.element(source, tuple(sums)) if source.op == "get_attr" else None


# --- elementwise -----------------------------------------------------------------------------------------------


def _operands(reader: Reader, node: fx.Node, indices: Indices) -> list[Expression]:
    return [reader.operand(item, indices) for item in node.args[:2]]


def _plain(node: fx.Node) -> bool:
    """Whether no option of an elementwise operator is set."""
    given = arguments(node)
    return given.get("alpha", 1) == 1 and given.get("rounding_mode") is None


def _logical(combine: Callable[..., Expression]) -> Rule:
    def rule(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
        if any(isinstance(item, fx.Node) and kind_of(item) != "bool" for item in node.args[:2]):
            return None
        return combine(*(reader.operand(item, indices) for item in node.args[:2]))

    return rule


def _xor(first: Expression, second: Expression) -> Expression:
    return e.either(e.both(first, e.opposite(second)), e.both(e.opposite(first), second))


def _compared(compare: Callable[[Sum, Sum, Mapping[int, Sum]], Expression]) -> Rule:
    def rule(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
        first, second = _operands(reader, node, indices)
        kinds = [kind_of(item) if isinstance(item, fx.Node) else None for item in node.args[:2]]
        if "float" in kinds or (isinstance(second, Constant) and isinstance(second.value, float)):
            return _compared_floats(reader, node, indices)
        left, right = (_as_number(value, found) for value, found in zip((first, second), kinds, strict=True))
        return compare(left, right, reader.extents) if left is not None and right is not None else None

    return rule


def _as_number(value: Expression, found: str | None) -> Sum | None:
    if found == "bool":
        as_int = converted(value, "bool", "int", torch.int64)
        return as_int if isinstance(as_int, Sum) else None
    return number(value)


def _compared_floats(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """Compared constants, where a choice is between constants."""
    first, second = _operands(reader, node, indices)
    return _fold(node, first, second, lambda value: Constant(bool(value)))


def _arithmetic(on_sums: Callable[[Sum, Sum], Sum | None]) -> Rule:
    def rule(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
        if not _plain(node):
            return _apply(reader, node, indices)
        first, second = _operands(reader, node, indices)
        kinds = [kind_of(item) if isinstance(item, fx.Node) else None for item in node.args[:2]]
        if dtype(node) in (torch.int32, torch.int64):  # narrower ones overflow
            left, right = (_as_number(value, found) for value, found in zip((first, second), kinds, strict=True))
            result = on_sums(left, right) if left is not None and right is not None else None
            return result if result is not None else _apply(reader, node, indices)
        if kind(node) == "float":
            return _fold(node, first, second, lambda value: Constant(float(value))) or _apply(reader, node, indices)
        return _apply(reader, node, indices)

    return rule


def _fold(node: fx.Node, first: Expression, second: Expression, wrap: Callable[[Any], Expression]) -> Expression | None:
    """An operator on constants, or on a constant and a choice between constants, computed by torch itself."""
    if isinstance(first, e.Choice):
        ways = [_fold(node, way, second, wrap) for way in (first.yes, first.no)]
        return None if None in ways else e.choose(first.condition, *ways)  # type: ignore[arg-type]
    if isinstance(second, e.Choice):
        ways = [_fold(node, first, way, wrap) for way in (second.yes, second.no)]
        return None if None in ways else e.choose(second.condition, *ways)  # type: ignore[arg-type]
    values = []
    for item, value in zip(node.args[:2], (first, second), strict=True):
        plain = value.value if isinstance(value, Constant) else None
        if isinstance(value, Sum) and not value.terms:
            plain = value.constant
        if plain is None:
            return None
        values.append(torch.tensor(plain, dtype=dtype(item)) if _is_tensor(item) else plain)
    assert callable(node.target)
    return wrap(node.target(*values).item())


def _is_tensor(item: Any) -> bool:
    return isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor)


def _product(first: Sum, second: Sum) -> Sum | None:
    if not second.terms:
        return e.scale(first, second.constant)
    return e.scale(second, first.constant) if not first.terms else None


def _divided(divide: Callable[[Sum, int], Sum]) -> Callable[[Sum, Sum], Sum | None]:
    return lambda first, second: divide(first, second.constant) if not second.terms and second.constant > 0 else None


def _negative(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    value = reader.operand(node.args[0], indices)
    return e.scale(value, -1) if isinstance(value, Sum) else _apply(reader, node, indices)


def _absolute(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    value = reader.operand(node.args[0], indices)
    return e.absolute(value) if isinstance(value, Sum) else _apply(reader, node, indices)


def _not(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    source: Any = node.args[0]
    if kind(source) != "bool":
        return None
    return e.opposite(reader.operand(source, indices))


def _where(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    condition = reader.operand(given["condition"], indices)
    ways = [_as_kind(reader, node, item, indices) for item in (given["self"], given["other"])]
    return None if None in ways else _chosen(condition, *ways)  # type: ignore[arg-type]


def _masked_fill(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    condition = reader.operand(given["mask"], indices)
    ways = [_as_kind(reader, node, item, indices) for item in (given["value"], given["self"])]
    return None if None in ways else _chosen(condition, *ways)  # type: ignore[arg-type]


def _as_kind(reader: Reader, node: fx.Node, item: Any, indices: Indices) -> Expression | None:
    """An operand in the dtype of the result."""
    value = reader.operand(item, indices)
    before = kind_of(item) if isinstance(item, fx.Node) else {bool: "bool", int: "int", float: "float"}[type(item)]
    if before == kind(node) == "float" and isinstance(item, fx.Node) and dtype(item) == dtype(node):
        return value
    return converted(value, before, kind(node), dtype(node))


def _cast(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    source: Any = node.args[0]
    value = reader.operand(source, indices)
    if dtype(source) == dtype(node):
        return value
    if kind(source) == kind(node) == "int" and not _fits(value, dtype(node)):
        return _apply(reader, node, indices)  # it may overflow
    found = converted(value, kind(source), kind(node), dtype(node))
    return found if found is not None else _apply(reader, node, indices)


def _fits(value: Expression, to: torch.dtype) -> bool:
    """Whether a whole number fits a dtype: any fits 64 bits, what is made of indices and sizes alone 32."""
    if to is torch.int64 or isinstance(value, Element | e.Apply):
        return to is torch.int64
    return to is torch.int32 and all(_fits(part, to) for part in e.parts(value))


def _apply(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """An elementwise operator that is kept as it is."""
    if not isinstance(node.meta["val"], Tensor):
        return None

    def read(item: Any) -> Any:
        return reader.operand(item, indices) if isinstance(item, fx.Node) else item

    operands = tuple(read(item) for item in node.args)
    options = tuple(sorted((name, read(item)) for name, item in node.kwargs.items() if name != "pin_memory"))
    if any(isinstance(item, list | tuple) for item in (*node.args, *node.kwargs.values())):
        return None
    assert callable(node.target)
    found = e.Apply(node.target, operands, (*options, ("result", dtype(node))))
    return e.atom(found) if kind(node) == "int" else found


def _at_most(first: Sum, second: Sum, extents: Mapping[int, Sum]) -> Expression:
    return e.at_most(first, second, extents)


def _less(first: Sum, second: Sum, extents: Mapping[int, Sum]) -> Expression:
    return e.at_most(e.add(first, e.whole(1)), second, extents)


def _swapped(compare: Callable[..., Expression]) -> Callable[..., Expression]:
    return lambda first, second, extents: compare(second, first, extents)


def _unequal(first: Sum, second: Sum, extents: Mapping[int, Sum]) -> Expression:
    return e.opposite(e.equal(first, second, extents))


_SUM, _DIFFERENCE = _arithmetic(lambda a, b: e.add(a, b)), _arithmetic(lambda a, b: e.add(a, b, -1))
_PRODUCT = _arithmetic(_product)


def _multiplied(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    return (_BOTH if kind(node) == "bool" else _PRODUCT)(reader, node, indices)


_BOTH = _logical(e.both)
_FLOOR, _MODULO = _arithmetic(_divided(e.quotient)), _arithmetic(_divided(e.remainder))
RULES: dict[Any, Rule] = {
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten.squeeze.dim, aten.squeeze.default,
                     aten.squeeze.dims, aten.flatten.using_ints), _reshape),
    **dict.fromkeys((aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
                     aten.lift_fresh_copy.default), _expand),
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys((aten.ones.default, aten.new_ones.default, aten.ones_like.default), _filled(1)),
    **dict.fromkeys((aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default), _filled(0)),
    **dict.fromkeys((aten.full.default, aten.new_full.default, aten.full_like.default,
                     aten.scalar_tensor.default), _filled(None)),
    aten.tril.default: _triangle(lower=True),
    aten.triu.default: _triangle(lower=False),
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default), _BOTH),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default), _logical(e.either)),
    **dict.fromkeys((aten.bitwise_xor.Tensor, aten.logical_xor.default), _logical(_xor)),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _not),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compared(_at_most)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compared(_less)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compared(_swapped(_at_most))),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compared(_swapped(_less))),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _compared(e.equal)),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _compared(_unequal)),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _SUM),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _DIFFERENCE),
    aten.rsub.Scalar: _arithmetic(lambda a, b: e.add(b, a, -1)),
    aten.mul.Tensor: _multiplied,
    aten.mul.Scalar: _PRODUCT,
    aten.floor_divide.default: _FLOOR,
    aten.remainder.Scalar: _MODULO,
    aten.remainder.Tensor: _MODULO,
    aten.neg.default: _negative,
    aten.abs.default: _absolute,
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten._to_copy.default: _cast,
}  # fmt: skip
