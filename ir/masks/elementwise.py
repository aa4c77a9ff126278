"""Reading elementwise operators: logic, comparisons, arithmetic, choices, casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..graph import arguments, dtype
from . import expression as e
from .expression import Constant, Expression, Sum
from .values import Indices, Rule, chosen, converted, fits, kind, kind_of, number

if TYPE_CHECKING:
    from .reader import Reader

aten = torch.ops.aten


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
            return apply(reader, node, indices)
        first, second = _operands(reader, node, indices)
        kinds = [kind_of(item) if isinstance(item, fx.Node) else None for item in node.args[:2]]
        if dtype(node) in (torch.int32, torch.int64):  # narrower ones overflow
            left, right = (_as_number(value, found) for value, found in zip((first, second), kinds, strict=True))
            result = on_sums(left, right) if left is not None and right is not None else None
            return result if result is not None else apply(reader, node, indices)
        if kind(node) == "float":
            return _fold(node, first, second, lambda value: Constant(float(value))) or apply(reader, node, indices)
        return apply(reader, node, indices)

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
    return e.scale(value, -1) if isinstance(value, Sum) else apply(reader, node, indices)


def _absolute(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    value = reader.operand(node.args[0], indices)
    return e.absolute(value) if isinstance(value, Sum) else apply(reader, node, indices)


def _not(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    source: Any = node.args[0]
    if kind(source) != "bool":
        return None
    return e.opposite(reader.operand(source, indices))


def _where(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    condition = reader.operand(given["condition"], indices)
    ways = [_as_kind(reader, node, item, indices) for item in (given["self"], given["other"])]
    return None if None in ways else chosen(condition, *ways)  # type: ignore[arg-type]


def _masked_fill(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    given = arguments(node)
    condition = reader.operand(given["mask"], indices)
    ways = [_as_kind(reader, node, item, indices) for item in (given["value"], given["self"])]
    return None if None in ways else chosen(condition, *ways)  # type: ignore[arg-type]


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
    if kind(source) == kind(node) == "int" and not fits(value, dtype(node)):
        return apply(reader, node, indices)  # it may overflow
    found = converted(value, kind(source), kind(node), dtype(node))
    return found if found is not None else apply(reader, node, indices)


def apply(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
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


ELEMENTWISE: dict[Any, Rule] = {
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
