"""Running a program on several batches at once, node by node.

At each node the values of all batches are there, computed from whatever the nodes before were replaced by: what methods
need that go from layer to layer (GPTQ), and what statistics of activations are taken from. A value is kept until its
last reader has run, so that what is kept is the widest place in the graph, times the batches; beyond 2 GiB it lies in
files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import FxpressError, InputError, RewriteError, one_line
from ..graph import Program, attribute, module_path, source_of
from ..packing import Padding, key_masks
from ..rewrite import Track, untracked
from .spill import LIMIT, Spill

Visit = Callable[[fx.Node], list[Any] | None]


class BatchError(InputError):
    """A batch that the program fails on: where, and the very batch, whose number is known where all are."""

    def __init__(self, where: str, batch: Sequence[Tensor]) -> None:
        super().__init__(where)
        self.batch = batch


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Numbers that no statistics can be taken from: say in which layer they were met."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, FxpressError):
            raise
        raise RewriteError(
            f"calibration fails at {name}: {error}; look for a batch that causes it, or a weight"
        ) from error


class Lockstep:
    """One pass over a program with all batches.

    Args:
        batches: flat inputs, one list of tensors a batch.
        track, title: how the progress over the nodes is shown, see `Context.track`.
        memory: bytes that values may take; those beyond lie in temporary files.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Tensor]],
        track: Track | None = None,
        title: str = "",
        memory: int = LIMIT,
    ) -> None:
        self.program, self.batches = program, batches
        self._spill = Spill(memory)
        self._track, self._title = track or untracked, title
        self._values: dict[fx.Node, list[Any]] = {}
        self._key_masks = key_masks(program)
        found = [program.values(self._key_masks, batch) for batch in batches]
        self._masks = [[mask.bool() for mask in masks] for masks in zip(*found, strict=True)]

    def run(self, visit: Visit) -> list[list[Any]]:
        """Run every node, unless `visit(node)`, asked before each call, gives its values. The outputs, by batch."""
        last = _last_readers(self.program.graph)
        taken = iter(range(len(self.batches[0])) if self.batches else ())
        with torch.no_grad():
            for node in self._track(list(self.program.graph.nodes), self._title):
                if node.op == "output":
                    return [self._arguments(node.args[0], index) for index in range(len(self.batches))]
                if node.op == "placeholder":
                    place = next(taken)
                    self._values[node] = [batch[place] for batch in self.batches]
                elif node.op == "get_attr":
                    weight = attribute(self.program.module, str(node.target))
                    self._values[node] = [weight] * len(self.batches)
                else:
                    found = visit(node)
                    self._values[node] = found or [self._call(node, index) for index in range(len(self.batches))]
                for done in last.get(node, ()):
                    del self._values[done]
        raise AssertionError("a graph ends with its output")

    def values(self, node: fx.Node) -> list[Any]:
        """The values of a node that something still reads, by batch."""
        return self._values[node]

    def rows(self, node: fx.Node) -> list[Tensor]:
        """An activation [..., K] as rows [tokens, K], by batch, without the tokens that attention masks as padding."""
        return [self.unpadded(node, value, index) for index, value in enumerate(self._values[node])]

    def rows_as_read(self, node: fx.Node) -> Sequence[Tensor]:
        """`rows`, each computed when it is read, which has to be while the node's values are there."""
        return _Rows(self, node, self._values[node])

    def hold(self, value: Any) -> Any:
        """A value that is to be kept for a while: as it is, or in a file where memory is short."""
        return self._spill.hold(value)

    def unpadded(self, node: fx.Node, value: Tensor, index: int) -> Tensor:
        """A value [..., K] of a batch as rows [tokens, K], without the padding among the tokens of `node`."""
        mask = self.mask(node, index) if value.dim() == 3 else None
        rows = value.reshape(-1, value.shape[-1])
        return rows if mask is None else rows[mask.reshape(-1)]

    def mask(self, node: fx.Node, index: int, axis: int = 1) -> Tensor | None:
        """The padding mask of a node's tokens in a batch, [B, N], True at real tokens; `axis` is that of N."""
        found = self._padding.mask(node, (0, axis)) if self._masks else None
        return None if found is None else self._masks[self._key_masks.index(found)][index]

    @cached_property
    def _padding(self) -> Padding:
        return Padding(self.program)

    def _call(self, node: fx.Node, index: int) -> Any:
        assert callable(node.target)
        try:
            found = node.target(*self._arguments(node.args, index), **self._arguments(node.kwargs, index))
        except (LookupError, RuntimeError, ValueError) as error:
            where = f"fails at {module_path(node) or node.name}{source_of(node)}: {one_line(error)}"
            raise BatchError(where, self.batches[index]) from error
        return self._spill.hold(found, *(self._values[used][index] for used in node.all_input_nodes))

    def _arguments(self, given: Any, index: int) -> Any:
        return fx.node.map_arg(given, lambda used: self._values[used][index])


class _Rows(Sequence[Tensor]):
    def __init__(self, lockstep: Lockstep, node: fx.Node, values: Sequence[Any]) -> None:
        self._lockstep, self._node, self._values = lockstep, node, values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._lockstep.unpadded(self._node, self._values[index], index)


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that nothing reads after a node."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                found.setdefault(node, []).append(used)
        if node.op != "output" and node not in seen:
            found.setdefault(node, []).append(node)  # nothing reads it at all
    return found
