"""Rotary embedding: x * cos + turn(x) * sin, the same written pair by pair, and as a product of complex numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .. import pattern as p
from ..graph import Program, arguments, dtype, same_sizes, shape
from ..ops.rotary import rotary
from ..pattern import Match, Refusal, Rule
from .pieces import Piece, piece

aten = torch.ops.aten


def _is_call(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def _is_last(axis: Any, node: Any) -> bool:
    return bool(axis % len(shape(node)) == len(shape(node)) - 1)


def joined(node: Any) -> tuple[Any, Any, bool, frozenset[fx.Node]] | None:
    """Two values joined pair by pair along the last axis: (first, second, interleaved, calls).

    cat((a, b), -1): their columns one after the other; stack((a, b), -1) flattened: in turns.
    """
    if _is_call(node, aten.cat.default):
        parts, axis = arguments(node)["tensors"], arguments(node)["dim"]
        return (*parts, False, frozenset((node,))) if len(parts) == 2 and _is_last(axis, node) else None
    if _is_call(node, aten.reshape.default):
        stack: Any = node.args[0]
        if not _is_call(stack, aten.stack.default):
            return None
        parts, axis = arguments(stack)["tensors"], arguments(stack)["dim"]
        size, before = shape(stack), shape(node)
        flat = len(size) == len(before) + 1 and same_sizes(size[:-2], before[:-1])
        if len(parts) == 2 and _is_last(axis, stack) and flat:
            return (*parts, True, frozenset((node, stack)))
    return None


def _halves(first: Piece, second: Piece, interleaved: bool) -> bool:
    """Whether two pieces are the first and the second columns of the pairs of one tensor."""
    width = shape(first.source)[-1]
    if first.source is not second.source or width % 2:
        return False
    if interleaved:
        return (first.start, first.step, second.start, second.step) == (0, 2, 1, 2) and {first.stop, second.stop} <= {
            width - 1,
            width,
        }
    half = width // 2
    return (first.start, first.stop, second.start, second.stop) == (0, half, half, width) and (
        first.step == second.step == 1
    )


def _turned(node: Any) -> tuple[fx.Node, bool, frozenset[fx.Node]] | None:
    """turn(x): (x, interleaved, calls)."""
    pair = joined(node)
    if pair is None or not _is_call(pair[0], aten.neg.default):
        return None
    second, first = piece(pair[0].args[0]), piece(pair[1])
    if first is None or second is None or not _halves(first, second, pair[2]):
        return None
    return first.source, pair[2], pair[3] | first.nodes | second.nodes | {pair[0]}


def _factors(node: Any) -> Iterator[tuple[Any, Any]]:
    """The operands of a product, both ways."""
    if _is_call(node, aten.mul.Tensor):
        yield node.args[:2]
        yield node.args[1::-1]


def _match(root: fx.Node, x: Any, cos: Any, sin: Any, interleaved: bool, nodes: frozenset[fx.Node],
           shared: frozenset[fx.Node]) -> Match | Refusal:  # fmt: skip
    """A match, unless a part is read elsewhere; the pieces of x may be."""
    leaked = p.leak(nodes, root, shared)
    if leaked:
        return Refusal(leaked)
    return Match(root, {"x": x, "cos": cos, "sin": sin, "interleaved": interleaved}, nodes)


def _whole(node: fx.Node) -> Match | Refusal | None:
    """x * cos + turn(x) * sin, cos and sin as wide as x."""
    if not _is_call(node, aten.add.Tensor) or node.kwargs:
        return None
    first: Any = node.args[0]
    second: Any = node.args[1]
    for straight, crossed in ((first, second), (second, first)):
        for turned, sin in _factors(crossed):
            found = _turned(turned)
            if found is None:
                continue
            x, interleaved, nodes = found
            for source, cos in _factors(straight):
                if source is x:
                    return _match(node, x, cos, sin, interleaved, nodes | {node, straight, crossed}, frozenset())
            return Refusal(f"{turned.name} turns {x.name}, but what is added to it is no product with {x.name}")
    return None


def _pairwise(node: fx.Node) -> Match | Refusal | None:
    """(first * cos - second * sin, second * cos + first * sin), joined; cos and sin half as wide as x."""
    pair = joined(node)
    if pair is None or not (_is_call(pair[0], aten.sub.Tensor) and _is_call(pair[1], aten.add.Tensor)):
        return None
    if pair[0].kwargs or pair[1].kwargs:
        return None
    minuend, subtrahend = pair[0].args[:2]
    for left, right in (pair[1].args[:2], pair[1].args[1::-1]):
        for first, cos in _factors(minuend):
            for second, sin in _factors(subtrahend):
                crossed = (second, cos) in _factors(left) and (first, sin) in _factors(right)
                a, b = piece(first), piece(second)
                if crossed and a is not None and b is not None and _halves(a, b, pair[2]):
                    nodes = pair[3] | {*pair[:2], minuend, subtrahend, left, right} | a.nodes | b.nodes
                    return _match(node, a.source, cos, sin, pair[2], nodes, a.nodes | b.nodes)
    return None


def _condition(found: Match) -> Any:
    x, cos, sin = found["x"], found["cos"], found["sin"]
    if not (isinstance(cos, fx.Node) and isinstance(sin, fx.Node)):
        return Refusal("cos or sin is a number")
    wide = [torch.promote_types(dtype(x), dtype(angle)) for angle in (cos, sin)]  # in which the products are computed
    if not wide[0] == wide[1] == dtype(found.root):
        return Refusal("the two products differ in dtype")
    if not same_sizes(shape(found.root), shape(x)):
        return Refusal("the input broadcasts")
    return True


def _whole_condition(found: Match) -> Any:
    x, cos, sin = found["x"], found["cos"], found["sin"]
    refused = _condition(found)
    if isinstance(refused, Refusal):
        return refused
    if not (same_sizes(shape(cos)[-1:], shape(x)[-1:]) and same_sizes(shape(sin)[-1:], shape(x)[-1:])):
        return Refusal("cos and sin are not as wide as the input")
    return True


def _pairwise_condition(found: Match) -> Any:
    refused = _condition(found)
    if isinstance(refused, Refusal):
        return refused
    half = shape(found["x"])[-1] // 2
    if not same_sizes((*shape(found["cos"])[-1:], *shape(found["sin"])[-1:]), (half, half)):
        return Refusal("cos and sin are not half as wide as the input")
    return True


def _replace(program: Program, found: Match, _: Any) -> None:
    options: dict[str, Any] = {"interleaved": True} if found["interleaved"] else {}
    wide = dtype(found.root)
    operands = [
        item if dtype(item) == wide else program.call(aten._to_copy.default, item, dtype=wide, before=found.root)
        for item in (found[name] for name in ("x", "cos", "sin"))
    ]
    new = program.call(rotary, *operands, before=found.root, **options)
    program.replace(found.root, new)


def _pairwise_replace(program: Program, found: Match, _: Any) -> None:
    wide = [_doubled(program, found[name], bool(found["interleaved"]), found.root) for name in ("cos", "sin")]
    _replace(program, Match(found.root, {**found.captures, "cos": wide[0], "sin": wide[1]}, found.nodes), None)


def _doubled(program: Program, angle: Any, interleaved: bool, before: fx.Node) -> fx.Node:
    """cos or sin of each pair, stated for both of its columns."""
    if interleaved:
        return program.call(aten.repeat_interleave.self_int, angle, 2, -1, before=before)
    return program.call(aten.cat.default, [angle, angle], -1, before=before)


# --- complex numbers -------------------------------------------------------------------------------------------


def _complex(node: fx.Node) -> Match | Refusal | None:
    """view_as_real(view_as_complex(pairs) * angles), flattened: interleaved rotation (Llama's first release)."""
    if not _is_call(node, aten.reshape.default):
        return None
    real: Any = node.args[0]
    if not _is_call(real, aten.view_as_real.default):
        return None
    for paired, angles in _factors(real.args[0]):
        if not _is_call(paired, aten.view_as_complex.default):
            continue
        if not isinstance(angles, fx.Node) or not same_sizes(shape(angles)[-1:], shape(paired)[-1:]):
            return Refusal("the angles are not half as wide as the input")
        if not same_sizes(shape(node), (*shape(paired)[:-1], 2 * shape(paired)[-1])):
            return Refusal("the pairs are not joined along the last axis, or the input broadcasts")
        nodes = frozenset((node, real, real.args[0], paired))
        return _match(node, paired.args[0], angles, angles, True, nodes, frozenset())
    return None


def _complex_replace(program: Program, found: Match, _: Any) -> None:
    pairs: Any = found["x"]
    flat = program.call(aten.flatten.using_ints, pairs, -2, before=found.root)
    cos, sin = _parts(program, found["cos"], found.root)
    captures = {"x": flat, "cos": cos, "sin": sin, "interleaved": True}
    _pairwise_replace(program, Match(found.root, captures, found.nodes), None)


def _parts(program: Program, angles: Any, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Real and imaginary part, without complex numbers where the value was made from length and angle."""
    if _is_call(angles, aten.polar.default):
        length, angle = angles.args
        cos, sin = (program.call(part.default, angle, before=before) for part in (aten.cos, aten.sin))
        return tuple(program.call(aten.mul.Tensor, length, item, before=before) for item in (cos, sin))  # type: ignore[return-value]
    if _is_call(angles, aten._conj.default):
        cos, sin = _parts(program, angles.args[0], before)
        return cos, program.call(aten.neg.default, sin, before=before)
    scaled = _is_call(angles, aten.mul.Tensor) and isinstance(angles.args[1], int | float)
    viewed = angles.op == "call_function" and angles.meta["val"].is_conj()  # a view of what torch conjugates later
    if scaled or viewed or _is_call(angles, aten.unsqueeze.default):
        parts = _parts(program, angles.args[0], before)
        return tuple(program.call(angles.target, item, *angles.args[1:], before=before) for item in parts)  # type: ignore[return-value]
    pairs = program.call(aten.view_as_real.default, angles, before=before)
    return tuple(program.call(aten.select.int, pairs, -1, index, before=before) for index in (0, 1))  # type: ignore[return-value]


# --- partial rotation ------------------------------------------------------------------------------------------


def _partial(node: fx.Node) -> Match | Refusal | None:
    """The first columns rotated, joined with the rest as it was."""
    pair = joined(node)
    if pair is None or pair[2] or not _is_call(pair[0], rotary):
        return None
    turned, rest = pair[:2]
    given = arguments(turned)
    first, second = piece(given["input"]), piece(rest)
    if first is None or second is None or not same_sizes(shape(given["cos"])[-1:], shape(turned)[-1:]):
        return None
    if second.start == second.stop:  # all columns are rotated, nothing is joined
        first = second = Piece(given["input"], 0, second.start)
    end = shape(first.source)[-1]
    rejoined = (first.start, first.stop, second.start, second.stop) == (0, shape(turned)[-1], first.stop, end)
    complete = first is second or (rejoined and first.source is second.source and first.step == second.step == 1)
    if not complete:
        return Refusal("what is joined to the rotated columns is not the rest of the same tensor")
    pieces = first.nodes | second.nodes
    return _match(node, first.source, given["cos"], given["sin"], given["interleaved"], pieces | {node, turned}, pieces)


def states_pairs_twice(value: Any, interleaved: bool) -> bool:
    """Whether cos or sin is known to be the same for both columns of a pair, from how it was made."""
    same = joined(value)
    if same is not None:
        return same[0] is same[1] and same[2] == interleaved
    if _is_call(value, aten.repeat_interleave.self_int):
        given = arguments(value)
        return interleaved and given["repeats"] == 2 and given["dim"] is not None and _is_last(given["dim"], value)
    if _is_call(value, aten.cos.default, aten.sin.default, aten._to_copy.default):
        return states_pairs_twice(value.args[0], interleaved)
    if _is_call(value, aten.mul.Tensor) and not isinstance(value.args[1], fx.Node):
        return states_pairs_twice(value.args[0], interleaved)
    if _is_call(value, aten.unsqueeze.default):
        last = value.args[1] % len(shape(value)) == len(shape(value)) - 1
        return not last and states_pairs_twice(value.args[0], interleaved)
    return False


RULES = (
    Rule("rotary", _whole, _whole_condition, _replace),
    Rule("rotary", _pairwise, _pairwise_condition, _pairwise_replace),
    Rule("rotary", _complex, lambda _: True, _complex_replace),
    Rule("rotary_partial", _partial, _condition, _replace),
)
