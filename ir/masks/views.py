"""Reading views, constants and elements: operators that move indices or make numbers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..graph import arguments, dtype, same_sizes, shape
from . import expression as e
from .expression import Constant, Expression, Sum
from .values import Indices, Rule, chosen, is_one, kind, kind_of, literal, number, rounded

if TYPE_CHECKING:
    from .reader import Reader

aten = torch.ops.aten


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
    """Axes of size 1 come and go; others must stay as they are, unless all elements are one number."""
    source: Any = node.args[0]
    before, after = shape(source), shape(node)
    if source.target in FILLED:
        return reader.read(source, (e.whole(0),) * len(before))
    kept_before = [axis for axis, extent in enumerate(before) if not is_one(extent)]
    kept_after = [axis for axis, extent in enumerate(after) if not is_one(extent)]
    if not same_sizes([before[axis] for axis in kept_before], [after[axis] for axis in kept_after]):
        return None
    moved = [e.whole(0)] * len(before)
    for axis, place in zip(kept_before, kept_after, strict=True):
        moved[axis] = indices[place]
    return reader.read(source, tuple(moved))


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


def constant(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
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
    return chosen(visible, _value(corner), _value(other))


def _value(scalar: Tensor) -> Expression:
    return literal(scalar.item())


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
        return chosen(kept, inside, nothing)

    return rule


# --- along an axis ---------------------------------------------------------------------------------------------


def _difference(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """What each element is more than the one before; before the first stands what is prepended, if anything is."""
    given = arguments(node)
    if given["n"] != 1 or given["append"] is not None or dtype(node) not in (torch.int32, torch.int64):
        return None
    source, axis, first = given["self"], given["dim"] % len(indices), given["prepend"]

    def at(tensor: fx.Node, place: Sum) -> Expression:
        return reader.read(tensor, (*indices[:axis], place, *indices[axis + 1 :]))

    place, next_place = indices[axis], e.add(indices[axis], e.whole(1))
    if first is None:
        minuend, subtrahend = at(source, next_place), at(source, place)
    elif same_sizes(shape(first)[axis : axis + 1], (1,)) and dtype(first) == dtype(source):
        before = at(source, e.add(place, e.whole(-1)))
        at_first = e.equal(place, e.whole(0), reader.extents)
        minuend, subtrahend = at(source, place), chosen(at_first, at(first, e.whole(0)), before)
    else:
        return None
    both = isinstance(minuend, Sum) and isinstance(subtrahend, Sum)
    return e.add(minuend, subtrahend, -1) if both else None  # type: ignore[arg-type]


def _running_sum(reader: Reader, node: fx.Node, indices: Indices) -> Expression | None:
    """A sum of equal numbers is a multiple of how many there are."""
    given = arguments(node)
    axis = given["dim"] % len(indices)
    if kind(node) != "int" or kind(given["self"]) == "float":
        return None
    found = number(reader.read(given["self"], (*indices[:axis], e.index(e.SUMMED), *indices[axis + 1 :])))
    if found is None or found.terms:
        return None
    return e.scale(e.add(indices[axis], e.whole(1)), found.constant)


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


FILLED: dict[Any, Rule] = {
    **dict.fromkeys((aten.ones.default, aten.new_ones.default, aten.ones_like.default), _filled(1)),
    **dict.fromkeys((aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default), _filled(0)),
    **dict.fromkeys((aten.full.default, aten.new_full.default, aten.full_like.default,
                     aten.scalar_tensor.default), _filled(None)),
}  # fmt: skip

VIEWS: dict[Any, Rule] = {
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
    **FILLED,
    aten.tril.default: _triangle(lower=True),
    aten.triu.default: _triangle(lower=False),
    aten.diff.default: _difference,
    aten.cumsum.default: _running_sum,
    aten.index.Tensor: _index,
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
}  # fmt: skip
