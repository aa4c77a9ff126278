"""Softmax written out: as the exponential of its logarithm, or as exponentials and their sum.

Only where it is the same for all numbers: exp(x) / sum(exp(x)) is infinity over infinity where a softmax is finite, so
the maximum must have been taken off before.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .. import pattern as p
from ..graph import Program, arguments, dtype, same_sizes, shape
from ..pattern import Match, Refusal, Rule

aten = torch.ops.aten

MAXIMA = (aten.max.dim, aten.amax.default)


def reduced(value: Any, source: Any, *targets: Any) -> tuple[int, frozenset[fx.Node]] | None:
    """The axis, and the calls, if a value is `source` reduced along one axis, which it keeps with size 1."""
    nodes: set[fx.Node] = set()
    added: int | None = None
    found: Any = value
    while isinstance(found, fx.Node) and found.target not in targets:
        if found.target is aten.unsqueeze.default and added is None:
            added = arguments(found)["dim"] % len(shape(found))
        elif found.target is not aten.detach.default and not (
            found.target is operator.getitem and found.args[1] == 0  # of the maximum and where it stands
        ):
            return None
        nodes.add(found)
        found = found.args[0]
    if not isinstance(found, fx.Node) or dtype(value) is not dtype(source):
        return None
    given = arguments(found)
    axes = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
    if given["self"] is not source or len(axes) != 1:
        return None
    axis = axes[0] % len(shape(source))
    kept = given["keepdim"] if added is None else not given["keepdim"] and added == axis
    return (axis, frozenset({found, *nodes})) if kept else None


def _match(root: fx.Node, captures: dict[str, Any], nodes: set[fx.Node], shared: frozenset[fx.Node]) -> Match | Refusal:
    """A match, unless a part is read elsewhere; the shared ones may be."""
    leaked = p.leak(frozenset(nodes), root, shared)
    return Refusal(leaked) if leaked else Match(root, captures, frozenset(nodes))


def _find_exponential(root: fx.Node) -> Match | Refusal | None:
    """exp(log_softmax(x)), or exp(x - logsumexp(x))."""
    inner: Any = root.args[0] if root.target is aten.exp.default else None
    if not isinstance(inner, fx.Node):
        return None
    given = arguments(inner) if inner.op == "call_function" else {}
    if inner.target is aten.log_softmax.int:
        captures = {"scores": given["self"], "axis": given["dim"], "dtype": given["dtype"]}
        return _match(root, captures, {root, inner}, frozenset())
    if inner.target is not aten.sub.Tensor or given["alpha"] != 1:
        return None
    found = reduced(given["other"], given["self"], aten.logsumexp.default)
    if found is None:
        return None
    axis, nodes = found
    if axis != len(shape(root)) - 1 or not _is_multiplied(root):
        return Refusal(f"{root.name} gives other elements beside infinity than a softmax, expected a matmul of it")
    return _match(root, {"scores": given["self"], "axis": axis}, {root, inner, *nodes}, nodes | {inner})


def _is_multiplied(node: fx.Node) -> bool:
    """Whether only the products of whole rows with a matrix are read: one NaN in a row makes all of them NaN."""
    for user in node.users:
        if user.target is aten.matmul.default and user.args[0] is node and user.args[1] is not node:
            continue
        if user.target is aten.reshape.default and not same_sizes(shape(user)[-1:], shape(node)[-1:]):
            return False
        if user.target not in (aten.reshape.default, aten._to_copy.default) or not _is_multiplied(user):
            return False
    return True


def _find_quotient(root: fx.Node) -> Match | Refusal | None:
    """e / sum(e), or (e @ v) / sum(e), where e = exp(x - max(x))."""
    if root.target is not aten.div.Tensor:
        return None
    above: Any = root.args[0]
    product = above if isinstance(above, fx.Node) and above.target is aten.matmul.default else None
    powers: Any = above if product is None else product.args[0]
    if not isinstance(powers, fx.Node) or powers.target is not aten.exp.default:
        return None
    found = reduced(root.args[1], powers, aten.sum.dim_IntList)
    if found is None:
        return None
    axis, summed = found
    shifted: Any = powers.args[0]
    given = arguments(shifted) if isinstance(shifted, fx.Node) and shifted.target is aten.sub.Tensor else {}
    maximum = reduced(given["other"], given["self"], *MAXIMA) if given and given["alpha"] == 1 else None
    if maximum is None or maximum[0] != axis:
        return Refusal(f"{powers.name} overflows where a softmax does not, expected the axis' maximum taken off before")
    captures = {"scores": given["self"], "axis": axis}
    if product is not None:
        rows = same_sizes(shape(product)[-2:-1], shape(powers)[-2:-1])
        if axis != len(shape(powers)) - 1 or not rows:
            return Refusal(f"{product.name} is divided by sums along axis {axis}, expected those of its rows")
        if dtype(product) is torch.float16:
            return Refusal(f"{product.name} overflows where a softmax does not: it is divided after the product")
        captures["value"] = product.args[1]
    nodes = {root, powers, shifted, *summed, *maximum[1]} | ({product} if product is not None else set())
    return _match(root, captures, nodes, maximum[1] | {shifted})


def _condition(found: Match) -> Any:
    scores = found["scores"]
    floats = isinstance(scores, fx.Node) and dtype(scores).is_floating_point
    return True if floats else Refusal(f"{found.root.name} is of no floating tensor")


def _replace(program: Program, found: Match, _: Any) -> None:
    options = () if found.get("dtype") is None else (found["dtype"],)
    new = program.call(aten.softmax.int, found["scores"], found["axis"], *options, before=found.root)
    if found.get("value") is not None:
        new = program.call(aten.matmul.default, new, found["value"], before=found.root)
    program.replace(found.root, new)


RULES = (
    Rule("softmax", _find_exponential, _condition, _replace),
    Rule("softmax", _find_quotient, _condition, _replace),
)
