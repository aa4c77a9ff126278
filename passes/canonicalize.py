"""Canonicalize: one spelling for each thing, so that every later pass needs one pattern."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..ir.graph import Program, arguments, describe_value, dtype, same_sizes, same_value, shape
from ..ir.masks.emit import size_node
from ..ir.masks.meaning import read_masks
from ..ir.rewrite import Context, Edit, Pass, PassResult, apply_rules, each_call
from ..ir.spellings import activation, attention, linear, norm, rotary, softmax

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold what has no effect and give each operation one spelling.

    before:  %dropout = aten.dropout(%x, 0.1, False);  %to = aten.to.dtype(%dropout, f32);  %y = aten.linear(%to, @w)
    after:   %y = aten.linear(%x, @w)

    Folded: dropout in evaluation, casts and copies to the same type, full slices, expansions and reshapes to the same
    shape, chains of transpositions and of reshapes, equal computations. Respelled: view, flatten and unflatten as
    reshape, einsum and bmm as matmul, chunk and split as slice, unbind as select, squares as products, a number less a
    tensor as sub, parts of a weight that is read in parts alone as weights, addmm on flattened rows (Hugging Face's
    Conv1D) as linear; softmax, attention, RMSNorm and tanh-GELU written out as one operator.
    Masks of attention become its arguments (`masks`), as far as they can be read.
    """

    masks: bool = True

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        while True:
            changed = _simplify(program, context, result)
            changed |= _share_equal_calls(program, context, result)
            if changed:
                continue
            program.clean()  # what nothing reads is no reader of what a rule would replace
            rules = apply_rules(program, RULES, context)
            result.rewrites += rules.rewrites
            result.matches += rules.matches
            result.refusals = rules.refusals
            if not rules.changes and not (self.masks and read_masks(program, context, result)):
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


def _detach(program: Program, node: fx.Node) -> fx.Node | None:
    """Nothing where no gradient arrives: behind buffers, integers and another `detach`; programs can be trained."""
    waiting, seen = [node.args[0]], set[Any]()
    while waiting:
        source: Any = waiting.pop()
        if source in seen or source.target is aten.detach.default or not _may_have_gradient(source.meta.get("val")):
            continue
        seen.add(source)
        if source.op == "placeholder" or (source.op == "get_attr" and program.tensor(source).requires_grad):
            return None
        waiting += source.all_input_nodes
    return _same_type(program, node)


def _may_have_gradient(value: Any) -> bool:
    """Whether a tensor, or one of several, is differentiable at all; sizes are not."""
    if isinstance(value, list | tuple):
        return any(map(_may_have_gradient, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _respelled(target: Any) -> Edit:
    """An edit that calls another operator with the same arguments."""
    return lambda program, node: program.call(target, *node.args, before=node)


def _subtracted(program: Program, node: fx.Node) -> fx.Node:
    """number - x as a subtraction."""
    given = arguments(node)
    options = {} if given["alpha"] == 1 else {"alpha": given["alpha"]}
    return program.call(aten.sub.Tensor, given["other"], given["self"], before=node, **options)


def _square(program: Program, node: fx.Node) -> fx.Node | None:
    """pow(x, 2) and square(x) of floats as x * x."""
    given = arguments(node)
    squared = given.get("exponent", 2) == 2 and dtype(node).is_floating_point and dtype(node) == dtype(given["self"])
    return program.call(aten.mul.Tensor, given["self"], given["self"], before=node) if squared else None


def _dropout(program: Program, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return given["input"] if not given["train"] or given["p"] == 0 else None


def _full_slice(program: Program, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    whole = given["start"] in (None, 0) and given["step"] == 1 and same_sizes(shape(node), shape(given["self"]))
    return given["self"] if whole else None


def _joined(program: Program, node: fx.Node) -> fx.Node | None:
    """cat without the empty tensors of one axis that torch passes over, as the caches of models begin with."""
    given = arguments(node)
    parts = [item for item in given["tensors"] if not (same_sizes(shape(item), [0]) and dtype(item) == dtype(node))]
    if not parts or len(parts) == len(given["tensors"]):
        return None
    alone = len(parts) == 1 and dtype(parts[0]) == dtype(node)
    return parts[0] if alone else program.call(aten.cat.default, parts, given["dim"], before=node)


def _slice(program: Program, node: fx.Node) -> fx.Node | None:
    return _full_slice(program, node) or _own_rows(program, node)


def _own_rows(program: Program, node: fx.Node) -> fx.Node | None:
    """Rows of a weight that is read in parts alone, as nn.MultiheadAttention's projections in cross attention are."""
    source: Any = node.args[0]
    if source.op != "get_attr" or not isinstance(program.tensor(source), torch.nn.Parameter):
        return None
    size = shape(source)[0]
    parts: list[tuple[int, int, fx.Node]] = []
    for reader in source.users:
        given = arguments(reader)
        if reader.target is not aten.slice.Tensor or given["dim"] != 0 or given["step"] != 1:
            return None
        if not isinstance(given["start"], int) or not isinstance(given["end"], int) or given["start"] < 0:
            return None
        parts.append((given["start"], min(given["end"], size), reader))
    parts.sort(key=lambda part: part[:2])
    whole = parts[0][0] == 0 and parts[-1][1] == size
    if not whole or any(before[1] != after[0] for before, after in pairwise(parts)):
        return None
    weight = program.tensor(source)
    found = {
        reader: program.add_weight(
            f"{source.target}_{start}", weight.detach()[start:end], trainable=weight.requires_grad
        )
        for start, end, reader in parts
    }
    for reader, own in found.items():
        if reader is not node:
            program.replace(reader, own)
    return found[node]


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
    if same_call:
        return None
    new = program.call(aten.reshape.default, source, sizes, before=node)
    if describe_value(new.meta["val"]) == describe_value(node.meta["val"]) or same_sizes(shape(new), shape(node)):
        return new
    program.graph.erase_node(new)  # -1 stands for a size whose equality torch cannot prove
    return None


def _known_sizes(node: fx.Node) -> list[Any]:
    """The sizes of a reshape with numbers wherever the result's size is a number."""
    stated: Any = node.args[1]
    return [found if isinstance(found, int) else size for size, found in zip(stated, shape(node), strict=True)]


def _flatten(program: Program, node: fx.Node) -> fx.Node | None:
    """flatten, unflatten, reshape_as, view_as -> reshape."""
    source: Any = node.args[0]
    sizes = _sizes_after(program, node, source)
    return program.call(aten.reshape.default, source, sizes, before=node) if sizes.count(-1) < 2 else None


def _sizes_after(program: Program, node: fx.Node, source: fx.Node) -> list[Any]:
    """The sizes of `node`, a reshaped `source`: numbers, sizes of inputs or of `source`, -1 for what is neither."""
    sizes: list[Any] = []
    for size in shape(node):
        known = size_node(program, size, node)  # so that no rule finds `source` read by its own size
        kept = [axis for axis, old in enumerate(shape(source)) if same_sizes([old], [size])]
        if known is not None:
            sizes.append(known)
        elif kept:
            sizes.append(program.call(aten.sym_size.int, source, kept[0], before=node))
        else:
            sizes.append(-1)
    return sizes


def _order(node: Any) -> list[int] | None:
    """The order in which a transposition or permutation reads the axes of its input; None for other calls."""
    if not isinstance(node, fx.Node) or node.target not in (aten.transpose.int, aten.permute.default):
        return None
    given, rank = arguments(node), len(shape(node))
    if node.target is aten.permute.default:
        return [axis % rank for axis in given["dims"]]
    order = list(range(rank))
    first, second = given["dim0"] % rank, given["dim1"] % rank
    order[first], order[second] = second, first
    return order


def _permute(program: Program, node: fx.Node) -> fx.Node | None:
    """One transposition, or one permutation, for a chain of them."""
    source: Any = node.args[0]
    order, before = _order(node), _order(source)
    assert order is not None
    if before is not None:
        order, source = [before[axis] for axis in order], source.args[0]
    moved = [(axis, to) for axis, to in enumerate(order) if axis != to]
    if not moved:
        return source  # type: ignore[no-any-return]
    if len(moved) == 2:
        known = before is None and node.target is aten.transpose.int
        return None if known else program.call(aten.transpose.int, source, *moved[0], before=node)
    return None if before is None else program.call(aten.permute.default, source, order, before=node)


def _matrix_transpose(program: Program, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    rank = len(shape(source))
    return program.call(aten.transpose.int, source, rank - 2, rank - 1, before=node) if rank > 1 else None


def _part(program: Program, node: fx.Node) -> fx.Node | None:
    """The part of a chunk or split as a slice, that of an unbind as a selection."""
    source: Any = node.args[0]
    index: Any = node.args[1]
    if not isinstance(source, fx.Node) or source.target not in (*_SPLITS, aten.unbind.int):
        return None
    given = arguments(source)
    if source.target is aten.unbind.int:
        return program.call(aten.select.int, given["self"], given["dim"], index, before=node)
    sizes = [part.shape[given["dim"]] for part in source.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return program.call(aten.slice.Tensor, given["self"], given["dim"], start, start + sizes[index], before=node)


def _narrow(program: Program, node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    start, length = given["start"], given["length"]
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0):
        return None
    return program.call(aten.slice.Tensor, given["self"], given["dim"], start, start + length, before=node)


def _repeat(program: Program, node: fx.Node) -> fx.Node | None:
    """repeat of axes of size 1 -> expand."""
    source: Any = node.args[0]
    repeats: Any = node.args[1]
    if len(repeats) != len(shape(source)):
        return None
    if not all(count == 1 or same_sizes([size], [1]) for count, size in zip(repeats, shape(source), strict=True)):
        return None
    sizes = [-1 if isinstance(count, int) and count == 1 else count for count in repeats]
    return program.call(aten.expand.default, source, sizes, before=node)


def _softmax(program: Program, node: fx.Node) -> fx.Node | None:
    """softmax under its other names, and without a dtype that it has anyway."""
    given = arguments(node)
    source, wanted = given["self"], given.get("dtype")
    if node.target is aten._softmax.default:
        wanted = torch.float32 if given["half_to_float"] else None
    wanted = None if wanted is dtype(source) else wanted
    if node.target is aten.softmax.int and wanted is given["dtype"]:
        return None
    options = () if wanted is None else (wanted,)
    return program.call(aten.softmax.int, source, given["dim"], *options, before=node)


def _product(program: Program, node: fx.Node) -> fx.Node:
    """baddbmm -> matmul, with a multiplication and an addition where it has them."""
    given = arguments(node)
    product = program.call(aten.matmul.default, given["batch1"], given["batch2"], before=node)
    if given["alpha"] != 1:
        product = program.call(aten.mul.Tensor, product, given["alpha"], before=node)
    if given["beta"] == 0:  # then NaN in what would be added counts for nothing
        return product
    added = given["self"]
    if given["beta"] != 1:
        added = program.call(aten.mul.Tensor, added, given["beta"], before=node)
    return program.call(aten.add.Tensor, added, product, before=node)


def _einsum(program: Program, node: fx.Node) -> fx.Node | None:
    """einsum of two operands that share one summed axis -> matmul of permuted operands; of one operand -> permute."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    operands: Any = node.args[1]
    names = terms.split(",")
    if not result or not all(term.isalpha() and len(set(term)) == len(term) for term in (*names, result)):
        return None
    if len(names) == 1:
        same = set(terms) == set(result)
        return _in_order(program, operands[0], terms, result, node) if same else None
    if len(names) != 2 or not all(same_sizes([a], [b]) for a, b in _shared_sizes(names, operands)):
        return None
    left, right = names
    summed = [name for name in left if name in right and name not in result]
    batch = [name for name in left if name in result and name in right]
    rows = [name for name in left if name in result and name not in right]
    columns = [name for name in right if name in result and name not in left]
    if len(summed) != 1 or len(columns) != 1 or not rows or len(left + right) != len(result) + len(batch) + 2:
        return None
    first = _in_order(program, operands[0], left, [*batch, *rows, *summed], node)
    second = _in_order(program, operands[1], right, [*batch, *summed, *columns], node)
    if batch:
        for _ in rows[1:]:
            second = program.call(aten.unsqueeze.default, second, len(batch), before=node)
    product = program.call(aten.matmul.default, first, second, before=node)
    return _in_order(program, product, [*batch, *rows, *columns], result, node)


def _shared_sizes(names: Sequence[str], operands: Sequence[fx.Node]) -> list[tuple[Any, Any]]:
    """The sizes that two operands of an einsum give to each axis that both have."""
    first, second = (dict(zip(term, shape(item), strict=True)) for term, item in zip(names, operands, strict=True))
    return [(first[name], second[name]) for name in names[0] if name in second]


def _in_order(
    program: Program, tensor: fx.Node, names: Sequence[str], wanted: Sequence[str], before: fx.Node
) -> fx.Node:
    order = [list(names).index(name) for name in wanted]
    if order == sorted(order):
        return tensor
    return program.call(aten.permute.default, tensor, order, before=before)


_CASTS = (
    aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default,
)  # fmt: skip
_COPIES = (
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default,
)  # fmt: skip
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_FOLDINGS = (
    aten.flatten.using_ints, aten.unflatten.int, aten.reshape_as.default, aten.view_as.default,
)  # fmt: skip
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
SIMPLIFICATIONS: dict[Any, Edit] = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_COPIES, _same_type),
    aten.detach.default: _detach,
    aten.__and__.Tensor: _respelled(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _respelled(aten.bitwise_or.Tensor),
    aten.min.other: _respelled(aten.minimum.default),
    aten.max.other: _respelled(aten.maximum.default),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_RESHAPES, _reshape),
    aten.cat.default: _joined,
    aten.slice.Tensor: _slice,
    aten.expand.default: _same_shape,
    aten.transpose.int: _permute,
    aten.permute.default: _permute,
    **dict.fromkeys((aten.mT.default, aten.t.default), _matrix_transpose),
    **dict.fromkeys(_FOLDINGS, _flatten),
    operator.getitem: _part,
    aten.narrow.default: _narrow,
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), _softmax),
    aten.bmm.default: _respelled(aten.matmul.default),
    aten.baddbmm.default: _product,
    aten.einsum.default: _einsum,
    aten.rsub.Scalar: _subtracted,
    **dict.fromkeys((aten.square.default, aten.pow.Tensor_Scalar), _square),
    aten.mul.Scalar: _respelled(aten.mul.Tensor),
    aten.div.Scalar: _respelled(aten.div.Tensor),
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
        result.rewrites[node.target.__name__.partition(".")[0]] += 1  # type: ignore[union-attr]
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
RULES = (*linear.RULES, *norm.RULES, *activation.RULES, *rotary.RULES, *softmax.RULES, *attention.RULES)
