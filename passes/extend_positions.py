"""ExtendPositions: longer inputs than a model's learned positions, by repeating them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import InputError, RewriteError
from ..ir.graph import Program, arguments, shape, size_text
from ..ir.rewrite import Applied, Context, Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class ExtendPositions(Pass):
    """Let a model take more tokens than it has learned positions for: their embeddings are repeated (as Longformer was
    made of RoBERTa: Beltagy et al., 2020). Up to the old length nothing changes; beyond it, attention within a window
    shorter than that sees each token at a distance that it knows.

        before:  %p = aten.embedding(@positions, %i)                  @positions: f32[512, 384]
        after:   the same                                             @positions: f32[4096, 384]

    A table of positions is one that is looked up by numbers which grow by one from token to token on the example.
    Whole numbers that are stored for each position are continued as they are: 0, 1, 2, ..., or all alike.

    Attributes:
        length: the most tokens that the model shall take.
    """

    length: int

    def __post_init__(self) -> None:
        if type(self.length) is not int or self.length < 1:
            raise InputError(f"length must be a positive integer, found {self.length!r}")

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        found = _tables(program, context.inputs)
        if not found:
            raise RewriteError("the program looks up no table by position, so that nothing limits its length by one")
        longer = [item for item in found if item.learned < self.length]
        for item in longer:
            buffers = [_continued(program, buffer, item, self.length) for buffer in _stored(item)]
            if not context.take():
                return result
            table = program.tensor(item.weight)
            head, body = table[: item.offset], table[item.offset :]
            repeated = body.repeat(-(-self.length // len(body)), 1)[: self.length]
            program.set_weight(item.weight, torch.cat((head, repeated)))
            for node, tensor in buffers:
                program.set_weight(node, tensor)
            program.refresh([user for node in (item.weight, *(node for node, _ in buffers)) for user in node.users])
            result.rewrites["positions"] += 1
            detail = f"{item.learned} positions repeated to {self.length}"
            result.matches.append(Applied("positions", str(item.weight.target), detail))
        for item in longer:  # once all of them hold so many: the shortest is what limits the length
            symbol = size_text(shape(item.lookup)[-2], program.symbols)
            if symbol in program.signature.ranges:
                program.set_longest(symbol, self.length)
        program.clean()
        return result


@dataclass(frozen=True)
class _Table:
    """A table that is looked up by position: the row of the first one, and how many are learned from there on."""

    lookup: fx.Node
    weight: fx.Node
    offset: int
    learned: int


def _tables(program: Program, inputs: Sequence[Tensor]) -> list[_Table]:
    """The tables of positions; each once, however often it is looked up."""
    found: dict[str, _Table] = {}
    lookups = [node for node in program.calls(aten.embedding.default) if arguments(node)["indices"].op != "placeholder"]
    places: list[Any] = [item.args[1] for item in lookups]
    for node, index in zip(lookups, program.values(places, inputs), strict=True):
        weight: Any = node.args[0]
        rows = index.reshape(-1, index.shape[-1]) if index.dim() else index.reshape(1, 1)
        steps = rows[:, 1:] - rows[:, :-1]
        if weight.op != "get_attr" or rows.shape[1] < 2 or not bool((steps == 1).all(1).any()):
            continue
        first = int(rows[(steps == 1).all(1)][0, 0])
        learned = int(weight.meta["val"].shape[0]) - first
        found.setdefault(str(weight.target), _Table(node, weight, first, learned))
    return list(found.values())


def _stored(table: _Table) -> list[fx.Node]:
    """Whole numbers that are stored for each position: those that the lookup's index is made of, and those beside it
    that are read by the same index."""
    found: dict[fx.Node, None] = {}
    sizes = (table.learned, table.learned + table.offset)
    seen: set[fx.Node] = set()
    waiting: list[Any] = [arguments(table.lookup)["indices"]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, Tensor):
            if not value.is_floating_point() and value.dim() and value.shape[-1] in sizes:
                found[node] = None
            continue
        waiting += node.all_input_nodes
        waiting += [user for user in node.users if user.target is aten.gather.default]
    return list(found)


def _continued(program: Program, node: fx.Node, table: _Table, length: int) -> tuple[fx.Node, Tensor]:
    """Stored numbers up to another length."""
    stored = program.tensor(node)
    more = length - table.learned
    last, first = stored[..., -1:], stored[..., :1]
    if bool((stored == first).all()):
        added = last.expand(*last.shape[:-1], more)
    elif bool((stored[..., 1:] - stored[..., :-1] == 1).all()):
        added = last + torch.arange(1, more + 1, dtype=stored.dtype)
    else:
        raise RewriteError(
            f"the numbers of {node.target} are neither alike nor 0, 1, 2, ...: it is not clear how they go on"
        )
    return node, torch.cat((stored, added), -1)
