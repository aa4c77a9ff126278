"""What an expression of the mask algebra is worth at every (b, h, i, j): what its reader is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.ir.graph import Program
from fxpress.ir.masks import expression as e


class Values(fx.Interpreter):
    """The value of every node of a program on given inputs."""

    def __init__(self, program: Program, tensors: Sequence[Tensor]) -> None:
        super().__init__(program.module)
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*tensors)

    def run_node(self, n: fx.Node) -> Any:
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


def evaluate(value: Any, sizes: Sequence[int], values: Mapping[fx.Node, Any], known: Mapping[Any, int]) -> Any:
    """A tensor that broadcasts to `sizes`, the extents of the four axes, or a number."""

    def of(part: Any) -> Any:
        return evaluate(part, sizes, values, known)

    match value:
        case e.Index(axis=axis):
            return torch.arange(sizes[axis]).reshape([-1 if axis == place else 1 for place in range(4)])
        case e.Size(symbol=symbol):
            return torch.tensor(int(symbol.subs(known)))
        case e.Element(node=node, indices=indices):
            return values[node][tuple(torch.as_tensor(of(item)) for item in indices)] if indices else values[node]
        case e.Sum(terms=terms, constant=constant):
            return sum(
                (torch.as_tensor(of(part)).long() * factor for part, factor in terms), start=torch.tensor(constant)
            )
        case e.Quotient(dividend=dividend, divisor=divisor):
            return of(dividend) // divisor
        case e.Remainder(dividend=dividend, divisor=divisor):
            return of(dividend) % divisor
        case e.Absolute(of=inner):
            return abs(of(inner))
        case e.Constant(value=constant):
            return torch.tensor(constant)
        case e.NotPositive(of=inner):
            return torch.as_tensor(of(inner) <= 0)
        case e.Zero(of=inner):
            return torch.as_tensor(of(inner) == 0)
        case e.Not(of=inner):
            return ~of(inner)
        case e.And(conditions=conditions) | e.Or(conditions=conditions):
            first, *others = map(of, conditions)
            for other in others:
                first = first & other if isinstance(value, e.And) else first | other
            return first
        case e.Choice(condition=condition, yes=yes, no=no):
            return torch.where(of(condition), torch.as_tensor(of(yes)), torch.as_tensor(of(no)))
        case e.Apply(target=target, operands=operands, options=options):
            given = dict(options)
            dtype = given.pop("result")
            read = [of(item) if isinstance(item, e.Expression) else item for item in operands]
            schema = target._schema.arguments
            read = [
                torch.as_tensor(item) if str(argument.type) == "Tensor" else item
                for item, argument in zip(read, schema, strict=False)
            ]
            return target(*read, **{name: of(item) for name, item in given.items()}).to(dtype)
    return value
