"""Which nodes become one kernel: groups, merged greedily by the bytes that need not be written and read.

A group is legal where code can be generated for it and where no path leads from it to itself through others. Views and
operators that read nothing belong to no group: within a kernel they are arithmetic on indices, outside calls on the
host that move no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import networkx as nx
import sympy
import torch
from torch import Tensor, fx

from ...ir.graph import Program, arguments
from ...ir.ops.attention import attention
from .emitter import CannotFuse, Emitter, Frame, Index, Value
from .lowerings.elements import result_dtype
from .lowerings.pointwise import lower_pointwise
from .lowerings.products import PRODUCTS, check_product, product_of
from .lowerings.reductions import REDUCED, reduced_axes
from .lowerings.table import EXTERN, GENERATORS, KERNELS, POINTWISE, VALUES, VIEWS
from .lowerings.views import source_of_view
from .sizes import Sizes, contiguous, product, reshaped

INLINE = 8  # operators of a bias that are computed anew for each score
ONE_TILE = 16384  # columns up to which a row that is reduced is one tile
REACH = 512  # nodes that a group may have: code of more is slow to compile, and registers run out


def kind(node: fx.Node) -> str:
    """What becomes of a node: "size", "input", "generator", "view", "fused", "product", "kernel", "extern", "none"."""
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    value, target = node.meta.get("val"), node.target
    if not isinstance(value, Tensor) and not isinstance(value, list | tuple):
        return "size"
    for table, name in (
        (GENERATORS, "generator"), (VIEWS, "view"), (PRODUCTS, "product"), (KERNELS, "kernel"),
        (POINTWISE, "fused"), (VALUES, "fused"), (EXTERN, "extern"),
    ):  # fmt: skip
        if target in table:
            return "extern" if name in ("generator", "fused") and _of_host_numbers(node) else name
    return "none"


def _of_host_numbers(node: fx.Node) -> bool:
    """Whether a call is given what only the host computes: kernels are given sizes, and know integers of them."""
    values = [used.meta.get("val") for used in node.all_input_nodes]
    if any(isinstance(value, torch.SymFloat | torch.SymBool) for value in values):
        return True
    if all(isinstance(value, Tensor | list | tuple) for value in values) or node.target not in POINTWISE:
        return False
    given = arguments(node)
    return any(isinstance(given.get(name), fx.Node) for name in POINTWISE[node.target].numbers)


@dataclass(eq=False)
class Group:
    """The nodes of one kernel, in the order of the graph."""

    nodes: list[fx.Node]

    @property
    def anchor(self) -> fx.Node | None:
        """The matrix product that the others are the epilogue of."""
        return next((node for node in self.nodes if kind(node) == "product"), None)

    @cached_property
    def name(self) -> str:
        """Its operators, the first ones."""
        names = dict.fromkeys(str(node.target).split(".")[1].strip("_").removesuffix("_") for node in self.nodes)
        kept = [name for name in names if name not in ("to_copy",)] or list(names)
        return "_".join(kept[:2] + kept[-2:] if len(kept) > 4 else kept)


@dataclass
class Planner:
    """Parts a program into groups."""

    program: Program
    sizes: Sizes
    refused: dict[fx.Node, str] = field(default_factory=dict)  # what cannot be fused even alone, and why
    inlined: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)  # by attention: what computes its bias in it

    def plan(self) -> list[Group]:
        """The groups, in an order in which they can run."""
        nodes = list(self.program.graph.nodes)
        self._place = {node: place for place, node in enumerate(nodes)}
        self._group: dict[fx.Node, Group] = {}
        self._readers = {node: readers(node) for node in nodes}
        for node in nodes:
            if kind(node) in ("fused", "product"):
                group = Group([node])
                try:
                    self.emit(group)
                except CannotFuse as reason:
                    self.refused[node] = str(reason)
                    continue
                self._group[node] = group
        for node in nodes:
            if node.target is attention and isinstance(arguments(node)["bias"], fx.Node):
                self._inline(node, arguments(node)["bias"])
        for node in nodes:
            if kind(node) == "generator" and any(not self._computes(reader) for reader in self._readers[node]):
                self._group[node] = Group([node])  # read by what is no generated kernel
        self._graph = self._quotient(nodes)
        self._merge()
        return [item for item in self.order() if isinstance(item, Group)]

    def _computes(self, reader: fx.Node) -> bool:
        """Whether a reader is part of a generated kernel, in which what it reads can be computed; a product multiplies
        what is in memory."""
        grouped = reader in self._group and kind(reader) != "product"
        return grouped or any(reader in chain or reader is node for node, chain in self.inlined.items())

    def _inline(self, node: fx.Node, bias: fx.Node) -> None:
        """Compute an attention's bias where it is added, if little is read for it: no N x M numbers in memory.

        before:  %bias = mul(%slopes, %distance);  %y = attention(%q, %k, %v, %bias)
        after:   %y = attention(%q, %k, %v), which adds slopes[head] * (j - i) to its scores
        """
        chain: set[fx.Node] = set()
        read: set[fx.Node] = set()
        waiting = [bias]
        while waiting:
            here = waiting.pop()
            if kind(here) == "view":
                waiting.append(source_of_view(here))
            elif kind(here) == "fused" and here.target not in REDUCED and here in self._group:
                chain.add(here)
                waiting += [used for used in here.all_input_nodes if kind(used) != "size"]
            elif kind(here) != "generator":
                read.add(here)
        alone = all(reader in chain or reader is node for item in chain for reader in self._readers[item])
        little = sum(map(self._bytes, read)) * 8 <= self._bytes(bias)
        if chain and alone and little and len(chain) <= INLINE:
            self.inlined[node] = chain
            for item in chain:
                del self._group[item]

    def order(self) -> list[Group | fx.Node]:
        """Groups, and nodes outside of any, in an order in which they can run: close to that of the graph."""
        return list(nx.lexicographical_topological_sort(self._graph, key=self._order))

    def edges(self) -> list[tuple[Group | fx.Node, Group | fx.Node]]:
        """What of `order` must run before what."""
        return list(self._graph.edges)

    def _order(self, item: Any) -> int:
        return self._place[item.nodes[0] if isinstance(item, Group) else item]

    def _quotient(self, nodes: Sequence[fx.Node]) -> nx.DiGraph:
        """What must run before what: groups, and calls outside of any. Views are part of what reads them."""
        graph = nx.DiGraph()
        for node in nodes:
            here = self._group.get(node, node)
            if kind(node) in ("view", "size", "output") or (kind(node) == "generator" and node not in self._group):
                continue
            if any(node in chain for chain in self.inlined.values()):
                continue
            graph.add_node(here)
            for reader in self._outside(node):
                there = self._group.get(reader, reader)
                if there is not here and kind(reader) not in ("size", "output"):
                    graph.add_edge(here, there)
        return graph

    def _outside(self, node: fx.Node) -> list[fx.Node]:
        """The readers of a node; of a bias that is computed within attention, the attention."""
        found: list[fx.Node] = []
        for reader in self._readers[node]:
            found += [call for call, chain in self.inlined.items() if reader in chain] or [reader]
        return found

    def _merge(self) -> None:
        candidates = self._candidates()
        while candidates:
            _, first, second = candidates.pop()
            one, other = self._group[first], self._group[second]
            if one is other:
                continue
            merged = self._try(one, other)
            if merged is not None:
                for node in merged.nodes:
                    self._group[node] = merged
                self._contract(one, other, merged)

    def _candidates(self) -> list[tuple[int, fx.Node, fx.Node]]:
        """Pairs of a producer and its reader, or of two readers of one tensor; the best last."""
        found: list[tuple[int, fx.Node, fx.Node]] = []
        for node in self._group:
            if kind(node) == "generator":
                continue
            size = self._bytes(node)
            found += [(2 * size, node, reader) for reader in self._readers[node] if reader in self._group]
        for node in self._readers:
            if isinstance(node.meta.get("val"), Tensor) and kind(node) != "generator":
                inside = [reader for reader in self._readers[node] if reader in self._group]
                found += [(self._bytes(node), a, b) for a, b in pairwise(inside)]
        return sorted(found, key=lambda item: (item[0], -self._place[item[1]], -self._place[item[2]]))

    def _bytes(self, node: fx.Node) -> int:
        return self.sizes.hints(self.sizes.shape(node)) * result_dtype(node).itemsize

    def _try(self, one: Group, other: Group) -> Group | None:
        """The two as one group; None where that is no kernel or would make a circle."""
        if (one.anchor and other.anchor) or len(one.nodes) + len(other.nodes) > REACH:
            return None
        merged = Group(sorted([*one.nodes, *other.nodes], key=self._place.__getitem__))
        try:
            self.emit(merged)
        except CannotFuse:
            return None
        return None if self._circular(one, other) else merged

    def _circular(self, one: Group, other: Group) -> bool:
        """Whether a path leads from one to the other through something else."""
        for start, end in ((one, other), (other, one)):
            for after in self._graph.successors(start):
                if after is not end and nx.has_path(self._graph, after, end):
                    return True
        return False

    def _contract(self, one: Group, other: Group, merged: Group) -> None:
        before = {item for group in (one, other) for item in self._graph.predecessors(group)} - {one, other}
        after = {item for group in (one, other) for item in self._graph.successors(group)} - {one, other}
        self._graph.remove_nodes_from([one, other])
        self._graph.add_node(merged)
        self._graph.add_edges_from((item, merged) for item in before)
        self._graph.add_edges_from((merged, item) for item in after)

    # --- code ---------------------------------------------------------------------------------------------------

    def emit(
        self, group: Group, strides: Callable[[fx.Node], tuple[sympy.Expr, ...] | None] = lambda node: None
    ) -> tuple[Emitter, list[fx.Node]]:
        """The body of a group's kernel, stores included, and the nodes that it stores, as `out0`, `out1`, ...

        Raises:
            CannotFuse: the group is no kernel.
        """
        inside = set(group.nodes)
        stored = [
            node
            for node in group.nodes
            if any(not self._within(node, reader, inside) for reader in self._readers[node])
        ]
        frame = self.frame(group, stored)
        known = {}
        if group.anchor is not None:
            whole = result_dtype(group.anchor) in (torch.int32, torch.int64)
            known[group.anchor] = Value("acc", torch.int32 if whole else torch.float32, True)
            check_product(group.anchor)
            self._check_operands(group.anchor, inside)
        emitter = Emitter(self.sizes, lambda node: lowering(node, inside), frame, strides, known)
        for number, node in enumerate(stored):
            shape = self.sizes.shape(node)
            index = self._store_index(frame, shape)
            value = emitter.value(node, index)
            emitter.store(f"out{number}", value, frame.offset(index, contiguous(shape)), result_dtype(node))
        if not stored:
            raise CannotFuse("nothing reads it")
        return emitter, stored

    def _within(self, node: fx.Node, reader: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether a reader computes on a node in the same kernel; a matrix product reads memory."""
        return reader in inside and not (kind(reader) == "product" and node is not reader)

    def _check_operands(self, anchor: fx.Node, inside: set[fx.Node]) -> None:
        """
        Raises:
            CannotFuse: if a product multiplies what the same kernel computes.
        """
        for operand in product_of(anchor).operands:
            while kind(operand) == "view":
                operand = source_of_view(operand)
            if operand in inside:
                raise CannotFuse(f"{anchor.name} multiplies {operand.name}, which must be in memory before")

    def emit_bias(
        self, node: fx.Node, strides: Callable[[fx.Node], tuple[sympy.Expr, ...] | None]
    ) -> tuple[Emitter, Value]:
        """The lines within an attention's kernel that compute its bias for a tile of scores, and the bias."""
        given = arguments(node)
        query, key = self.sizes.shape(given["query"]), self.sizes.shape(given["key"])
        shape = (query[0], query[1], query[2], key[2])
        frame = Frame(shape, (3,), names=("at_batch", "at_head", "at_i", "at_j"))
        chain = self.inlined[node]
        emitter = Emitter(self.sizes, lambda item: lowering(item, chain), frame, strides)
        return emitter, emitter.value(given["bias"], emitter.broadcast(given["bias"], frame.index))

    def frame(self, group: Group, stored: Sequence[fx.Node]) -> Frame:
        """What a group's kernel runs over."""
        if group.anchor is not None:
            shape = self.sizes.shape(group.anchor)
            return Frame(shape, (len(shape) - 1,), batched=product_of(group.anchor).batched)
        for node in group.nodes:
            if node.target in REDUCED:
                source, axes = reduced_axes(node)
                shape = self.sizes.shape(source)
                bound = self.sizes.bound(product([shape[axis] for axis in axes]), self.program.signature.ranges)
                return Frame(shape, tuple(axes), True, bound is None or bound > ONE_TILE)
        shapes = [self.sizes.shape(node) for node in stored]
        shape = max(shapes, key=lambda item: (self.sizes.hints(item), len(item)), default=())
        return Frame(shape, (len(shape) - 1,) if shape else ())

    def _store_index(self, frame: Frame, shape: tuple[sympy.Expr, ...]) -> Index:
        """Where each element of a result is in the frame."""
        if shape == frame.shape:
            return frame.index
        if frame.reduces:
            kept = frame.rows
            if shape == tuple(frame.shape[axis] for axis in kept):
                return tuple(frame.index[axis] for axis in kept)
            if shape == tuple(1 if axis in frame.columns else size for axis, size in enumerate(frame.shape)):
                return tuple(
                    sympy.Integer(0) if axis in frame.columns else place for axis, place in enumerate(frame.index)
                )
        if sympy.expand(product(shape) - product(frame.shape)) == 0:
            return reshaped(frame.index, frame.shape, shape)
        raise CannotFuse("its results have different shapes")


def lowering(node: fx.Node, inside: set[fx.Node]) -> Callable[[Emitter, fx.Node, Index], Value] | None:
    """How a node is computed within a kernel that computes the nodes `inside`; None: it is read from memory."""
    what = kind(node)
    if what == "generator":
        return VALUES[node.target]
    if what == "view":
        root = node
        while kind(root) == "view":
            root = source_of_view(root)
        if root in inside or kind(root) == "generator":
            return _view
        return None
    if node not in inside:
        return None
    return lower_pointwise if node.target in POINTWISE else VALUES[node.target]


def _view(emitter: Emitter, node: fx.Node, index: Index) -> Value:
    return emitter.value(source_of_view(node), VIEWS[node.target](emitter, node, index))


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a node's elements, through views: in the order of the graph, each once."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        if kind(user) == "view":
            found.update(dict.fromkeys(readers(user)))
        else:
            found[user] = None
    return list(found)
