"""What an expression is worth at every (b, h, i, j), by which its reader is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, arguments, shape
from ..ops.attention import attention
from . import expression as e
from .reader import Reader


class Values(fx.Interpreter):
    """The value of every node of a program on given inputs, in `values`."""

    def __init__(self, program: Program, tensors: Sequence[Tensor]) -> None:
        super().__init__(program.module)
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*tensors)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep its value."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def symbols(program: Program, tensors: Sequence[Tensor]) -> dict[Any, int]:
    """The number that each symbolic size stands for on given inputs."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return {
        size.node.expr: int(found)
        for node, tensor in zip(placeholders, tensors, strict=True)
        for size, found in zip(node.meta["val"].shape, tensor.shape, strict=True)
        if isinstance(size, torch.SymInt)
    }


def wrong_masks(program: Program, tensors: Sequence[Tensor]) -> Iterator[tuple[fx.Node, e.Expression]]:
    """The masks of attentions that their expression differs from anywhere, on given inputs. Bit for bit."""
    values, known = Values(program, tensors).values, symbols(program, tensors)
    seen = set()
    for node in program.calls(attention):
        given = arguments(node)
        extents = (*shape(given["query"])[:3], shape(given["key"])[2])
        if given["bias"] is None or (given["bias"], str(extents)) in seen:
            continue
        seen.add((given["bias"], str(extents)))
        found = Reader(program, extents).mask(given["bias"])
        sizes = (*values[given["query"]].shape[:3], values[given["key"]].shape[2])
        expected = values[given["bias"]].expand(sizes)
        worth = torch.as_tensor(evaluate(found, sizes, values, known)).expand(sizes)
        if worth.dtype != expected.dtype or not torch.equal(worth, expected):
            yield node, found


def evaluate(value: Any, sizes: Sequence[int], values: Mapping[fx.Node, Any], known: Mapping[Any, int]) -> Any:
    """A tensor that broadcasts to `sizes`, the extents of the four axes; a literal as it is.

    Args:
        values: what the nodes hold whose elements are read.
        known: the numbers that symbolic sizes stand for.
    """

    def of(part: Any) -> Any:
        return evaluate(part, sizes, values, known)

    match value:
        case e.Index(axis=axis):
            return torch.arange(sizes[axis]).reshape([-1 if axis == place else 1 for place in range(4)])
        case e.Size(symbol=symbol):
            return torch.tensor(int(symbol.subs(known)))
        case e.Element(node=node, indices=indices):
            return values[node][tuple(map(of, indices))]
        case e.Sum(terms=terms, constant=constant):
            return sum((of(part).long() * factor for part, factor in terms), start=torch.tensor(constant))
        case e.Quotient(dividend=dividend, divisor=divisor):
            return of(dividend) // divisor
        case e.Remainder(dividend=dividend, divisor=divisor):
            return of(dividend) % divisor
        case e.Absolute(of=inner):
            return of(inner).abs()
        case e.Constant(value=constant):
            return torch.tensor(constant)
        case e.NotPositive(of=inner):
            return of(inner) <= 0
        case e.Zero(of=inner):
            return of(inner) == 0
        case e.Not(of=inner):
            return ~of(inner)
        case e.And(conditions=conditions) | e.Or(conditions=conditions):
            first, *others = map(of, conditions)
            for other in others:
                first = first & other if isinstance(value, e.And) else first | other
            return first
        case e.Choice(condition=condition, yes=yes, no=no):
            return torch.where(of(condition), of(yes), of(no))
        case e.Apply(target=target, operands=operands, options=options):
            given = dict(options)
            dtype = given.pop("result")
            return target(*map(of, operands), **{name: of(item) for name, item in given.items()}).to(dtype)
    return value
