"""Canonicalize: one spelling for each thing, so that every later pass needs one pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.graph import Program, arguments, same_sizes, same_value, shape
from ..ir.masks.meaning import read_masks
from ..ir.rewrite import Context, Edit, Pass, PassResult, apply_rules, each_call
from ..ir.spellings import activation, linear, norm

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold what has no effect and give each operation one spelling.

    before:  %dropout = aten.dropout(%x, 0.1, False);  %to = aten.to.dtype(%dropout, f32);  %y = aten.linear(%to, @w)
    after:   %y = aten.linear(%x, @w)

    Folded: dropout in evaluation, casts and copies to the same type, full slices, expansions and reshapes to the same
    shape, pairs of inverse transpositions, chains of reshapes, equal computations. Respelled: view as reshape,
    addmm on flattened rows (Hugging Face's Conv1D) as linear, RMSNorm and tanh-GELU written out as one operator.
    """

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        while True:
            changed = _simplify(program, context, result)
            changed |= _share_equal_calls(program, context, result)
            if changed:
                continue
            rules = apply_rules(program, RULES, context)
            result.rewrites += rules.rewrites
            result.refusals = rules.refusals
            if not rules.changes and not read_masks(program, context, result):
                break
        program.clean()
        return result


# --- local simplifications: a call -> the node that replaces it ------------------------------------------------


def _same_type(program: Program, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    kept = isinstance(source, fx.Node) and same_value(node.meta["val"], source.meta["val"])
    return source if kept and node.meta["val"].device == source.meta["val"].device else None


def _cast(program: Program, node: fx.Node) -> fx.Node | None:
    """Nothing where type and device stay; `_to_copy` for every other spelling of a cast that changes only the dtype."""
    kept = _same_type(program, node)
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    moved = before.device != after.device or before.layout != after.layout
    if kept is not None or moved or node.target is aten._to_copy.default:
        return kept
    return program.call(aten._to_copy.default, source, dtype=after.dtype, before=node)


def _respelled(target: Any) -> Edit:
    """An edit that calls another operator with the same arguments."""
    return lambda program, node: program.call(target, *node.args, before=node)


def _dropout(program: Program, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return given["input"] if not given["train"] or given["p"] == 0 else None


def _full_slice(program: Program, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    whole = given["start"] in (None, 0) and given["step"] == 1 and same_sizes(shape(node), shape(given["self"]))
    return given["self"] if whole else None


def _same_shape(program: Program, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    return source if same_sizes(shape(node), shape(source)) else None


def _reshape(program: Program, node: fx.Node) -> fx.Node | None:
    """view -> reshape; known sizes stated instead of -1; a reshape of a reshape reads the first one's source."""
    source: Any = node.args[0]
    if same_sizes(shape(node), shape(source)):
        return source  # type: ignore[no-any-return]
    sizes = _known_sizes(node)
    if source.op == "call_function" and source.target is aten.reshape.default:
        source = source.args[0]
    stated: Any = node.args[1]
    same_call = node.target is aten.reshape.default and source is node.args[0] and sizes == list(stated)
    return None if same_call else program.call(aten.reshape.default, source, sizes, before=node)


def _known_sizes(node: fx.Node) -> list[Any]:
    """The sizes of a reshape with numbers wherever the result's size is a number."""
    stated: Any = node.args[1]
    return [found if isinstance(found, int) else size for size, found in zip(stated, shape(node), strict=True)]


def _transpose(program: Program, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    if source.op != "call_function" or source.target is not aten.transpose.int:
        return None
    rank = len(shape(node))
    axes = {axis % rank for axis in node.args[1:]}  # type: ignore[operator]
    return source.args[0] if axes == {axis % rank for axis in source.args[1:]} else None


def _permute(program: Program, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    order: Any = node.args[1]
    moved = [(axis, to % len(order)) for axis, to in enumerate(order) if axis != to % len(order)]
    if not moved:
        return source  # type: ignore[no-any-return]
    return program.call(aten.transpose.int, source, *moved[0], before=node) if len(moved) == 2 else None


_CASTS = (
    aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default,
)  # fmt: skip
_COPIES = (
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
)  # fmt: skip
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
SIMPLIFICATIONS: dict[Any, Edit] = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_COPIES, _same_type),
    aten.__and__.Tensor: _respelled(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _respelled(aten.bitwise_or.Tensor),
    aten.min.other: _respelled(aten.minimum.default),
    aten.max.other: _respelled(aten.maximum.default),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_RESHAPES, _reshape),
    aten.slice.Tensor: _full_slice,
    aten.expand.default: _same_shape,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
}


def _simplify(program: Program, context: Context, result: PassResult) -> bool:
    changed = False
    for node in each_call(program):
        edit = SIMPLIFICATIONS.get(node.target)
        new = edit(program, node) if edit else None
        if new is None:
            continue
        if not context.take():
            return False
        result.rewrites[str(node.target).removeprefix("aten.").partition(".")[0]] += 1
        program.replace(node, new)
        changed = True
    return changed


def _share_equal_calls(program: Program, context: Context, result: PassResult) -> bool:
    """Common subexpression elimination: one call for equal ones, unless they draw random numbers."""
    known: dict[Any, fx.Node] = {}
    changed = False
    for node in each_call(program):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or not node.users:
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        first = known.setdefault(key, node)
        if first is node:
            continue
        if not context.take():
            return False
        result.rewrites["equal calls"] += 1
        program.replace(node, first)
        changed = True
    return changed


def _freeze(value: Any) -> Any:
    """A hashable form of an argument; types are kept apart (1, 1.0 and True are different arguments)."""
    if isinstance(value, list | tuple):
        return (list, *map(_freeze, value))
    if isinstance(value, dict):
        return (dict, *((name, _freeze(item)) for name, item in sorted(value.items())))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


# Several calls -> one operator.
RULES = (*linear.RULES, *norm.RULES, *activation.RULES)
