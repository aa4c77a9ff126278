"""Channels: which rows and columns of weights stand and fall together, found by following them through the graph.

Every row of a linear layer's weight makes one channel of its output. Where the channels of two values meet, they are
one: the query, key and value rows of a head at its attention, a neuron of the gate and of the up projection at their
product. A channel ends at the weight columns of the linear layers that read it; only then, and if nothing on the way
needs it for something else, can it be cut.

Views are followed by applying them to the numbers of the channels, on small sizes: an element of a value carries the
number of its channel, or none. So every way to lay out heads is understood, and none is spelled out here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program, arguments, source_of
from ..ops.attention import attention
from ..ops.norm import rms_norm
from ..ops.rotary import rotary
from ..pattern import spell
from .masks import is_masked, stored

aten = torch.ops.aten
NONE = -1  # the element belongs to no channel: it always stays

VIEWS = (
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor,
    aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.clone.default, aten.contiguous.default, aten.flatten.using_ints, aten.cat.default, aten.alias.default,
    aten.detach.default,
)  # fmt: skip
_NORMS = (aten.layer_norm.default, rms_norm)


@dataclass(frozen=True)
class Axis:
    """An axis of a weight and the channel, [size], of each of its indices."""

    weight: fx.Node
    axis: int
    channels: Tensor
    reader: fx.Node


@dataclass
class Channels:
    """What `follow` found.

    Attributes:
        values: of each call that has channels, a number for each element, int64, on small sizes; `of` them are the
            channels.
        rows: axes of weights that make channels: rows of linear layers, their biases, scales on the way.
        columns: the axes of linear layers' weights that read channels.
        heads: of each attention, the channel of each group of heads, [G].
        fixed: for a channel that cannot be cut, why.
    """

    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    rows: list[Axis] = field(default_factory=list)
    columns: list[Axis] = field(default_factory=list)
    heads: dict[fx.Node, Tensor] = field(default_factory=dict)
    fixed: dict[int, str] = field(default_factory=dict)
    _parents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def of(self, numbers: Tensor) -> Tensor:
        """The channels of numbers: those that meet are one."""
        return torch.where(numbers < 0, numbers, self._parents[numbers.clamp(min=0)])


def follow(program: Program) -> Channels:
    """Follow the rows of every linear layer to where they are read."""
    following = _Following(program)
    for node in program.graph.nodes:
        following.visit(node)
    return following.finish()


class _Following:
    def __init__(self, program: Program) -> None:
        self.program, self.sizes, self.found = program, small_sizes(program), Channels()
        self._count = 0
        self._pairs: list[Tensor] = []  # channels that are one, two numbers of 32 bits in one
        self._outputs: list[fx.Node] = []
        self._contexts: set[fx.Node] = set()  # what is computed from what attention gives
        self._shared: set[int] = set()  # numbers of keys and values
        self._fixed: list[tuple[Tensor, str]] = []

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._outputs = [value for value in node.all_input_nodes if value in self.found.values]
        elif node.op == "call_function" and node.target is aten.linear.default:
            self._linear(node)
        elif node.op == "call_function" and any(used in self.found.values for used in node.all_input_nodes):
            found = self._call(node)
            if found is not None:
                self.found.values[node] = found
                if node.target is attention or self._contexts.intersection(node.all_input_nodes):
                    self._contexts.add(node)

    def finish(self) -> Channels:
        """Join the channels that meet.

        What the model gives keeps its size, except for keys and values, of which there are as many as heads.
        """
        found, parents = self.found, list(range(self._count))

        def root(item: int) -> int:
            while parents[item] != item:
                parents[item] = parents[parents[item]]
                item = parents[item]
            return item

        for pairs in self._pairs:
            for pair in pairs.tolist():
                a, b = root(pair >> 32), root(pair & 0xFFFFFFFF)
                parents[max(a, b)] = min(a, b)
        found._parents = torch.tensor([root(item) for item in range(self._count)] or [0])
        heads = {root(channel) for channels in found.heads.values() for channel in channels.tolist()}
        for value in self._outputs:
            numbers = torch.unique(found.values[value][found.values[value] >= 0]).tolist()
            if value in self._contexts or not all(root(n) in heads and n in self._shared for n in numbers):
                self._fix(found.values[value], f"{spell(value)} is an output of the model{source_of(value)}")
        for numbers, reason in self._fixed:
            for channel in torch.unique(found.of(numbers)).tolist():
                if channel >= 0:
                    found.fixed.setdefault(channel, reason)
        found.heads = {node: found.of(numbers) for node, numbers in found.heads.items()}
        found.rows = [Axis(item.weight, item.axis, found.of(item.channels), item.reader) for item in found.rows]
        found.columns = [Axis(item.weight, item.axis, found.of(item.channels), item.reader) for item in found.columns]
        return found

    # --- what each kind of call does with channels -----------------------------------------------------------------

    def _call(self, node: fx.Node) -> Tensor | None:
        if node.target is attention:
            return self._attention(node)
        if node.target in VIEWS:
            return self._view(node)
        if node.target is rotary and self._numbers(node.args[0]) is not None:
            return self._mix(node, node.args[0])
        if node.target in _NORMS and self._numbers(node.args[0]) is not None:
            return self._mix(node, node.args[0])
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            return self._pointwise(node)
        if node.target is aten.sym_size.int or node.target is operator.getitem:
            source: Any = node.args[0]
            self._fix(self.found.values[source], f"{spell(node)} depends on its size{source_of(node)}")
            return None
        for used in node.all_input_nodes:
            self._fix(self.found.values.get(used), f"{spell(node)} needs all of {used.name}{source_of(node)}")
        return None

    def _linear(self, node: fx.Node) -> None:
        given = arguments(node)
        weight, bias = given["weight"], given["bias"]
        columns = self._along_last(node, given["input"])
        own = stored(weight)
        reason = not_own(node, own) or (bias is not None and not_own(node, stored(bias))) or None
        if columns is not None:
            if own is None or reason:
                self._fix(columns, str(reason))
            else:
                self.found.columns.append(Axis(own, 1, columns, node))
        if own is None or reason or self.program.tensor(own).dim() != 2:
            return
        rows = self._new(self.program.tensor(own).shape[0])
        self.found.rows.append(Axis(own, 0, rows, node))
        if bias is not None and (stored_bias := stored(bias)) is not None:
            self.found.rows.append(Axis(stored_bias, 0, rows, node))
        self.found.values[node] = rows.expand(self._shape(node))

    def _attention(self, node: fx.Node) -> Tensor | None:
        """A group of heads is one channel; where one group serves all heads, each head is, and the group stays."""
        given = arguments(node)
        query, key, value = (self._numbers(given[name]) for name in ("query", "key", "value"))
        for name in ("bias", "key_mask", "sinks"):
            self._fix(self._numbers(given[name]), f"it is the {name} of {spell(node)}{source_of(node)}")
        if query is None or key is None or value is None:
            for numbers in (query, key, value):
                self._fix(numbers, f"{spell(node)} has heads that no linear layer makes{source_of(node)}")
            return None
        heads, groups = query.shape[1], key.shape[1]
        if groups == 1 and heads > 1:
            for numbers in (key, value):
                self._fix(numbers, f"{spell(node)} reads it with every head{source_of(node)}")
            units, parts = heads, [query]
        else:
            units, parts = groups, [query, key, value]
        channels = self._new(units)
        for numbers in parts:
            per_unit = numbers.movedim(1, 0).reshape(units, -1)
            self._join(per_unit, channels.unsqueeze(1).expand_as(per_unit))
        self.found.heads[node] = channels
        for numbers in (key, value):
            self._shared.update(torch.unique(numbers).tolist())
        return channels.repeat_interleave(heads // units)[None, :, None, None].expand(self._shape(node))

    def _view(self, node: fx.Node) -> Tensor | None:
        """The view of the numbers."""

        given = arguments(node)
        source = self._numbers(given.get("self"))
        if node.target is aten.slice.Tensor and given["step"] != 1 and source is not None:
            self._fix(source, f"{spell(node)} takes every {given['step']}th of it{source_of(node)}")
        return viewed(node, self.found.values, self.sizes)

    def _mix(self, node: fx.Node, source: Any) -> Tensor:
        """What mixes the elements of the last axis makes one channel of them."""
        numbers = self.found.values[source]
        wide = node.target is aten.layer_norm.default and len(arguments(node)["normalized_shape"]) > 1
        if wide or numbers.dim() < 2 or bool((numbers == numbers.flatten(0, -2)[0]).all()):
            self._fix(numbers, f"{spell(node)} needs all of {source.name}{source_of(node)}")
        first = numbers[..., :1].expand_as(numbers)
        self._join(numbers, first)
        for used in node.all_input_nodes:
            if used is not source:
                self._fix(self.found.values.get(used), f"{spell(node)} needs all of {used.name}{source_of(node)}")
                shape = self._shape(used)
                axes = range(max(0, numbers.dim() - len(shape)), numbers.dim() - 1)
                if any(shape[axis - numbers.dim()] > 1 and _varies(numbers, axis) for axis in axes):
                    self._fix(numbers, f"{spell(node)} joins it with {used.name}, whose size stays{source_of(node)}")
        return numbers

    def _pointwise(self, node: fx.Node) -> Tensor:
        """Elements that meet are one channel; an operand that does not know of channels may only be broadcast."""
        shape = self._shape(node)
        operands = [self.found.values[used] for used in node.all_input_nodes if used in self.found.values]
        result = operands[0].expand(shape)
        for numbers in operands[1:]:
            wide = numbers.expand(shape)
            self._join(wide, result)
            result = torch.where(result < 0, wide, result)
        for used in node.all_input_nodes:
            if used not in self.found.values and isinstance(used.meta["val"], Tensor):
                self._meets(node, used, result)
        return result

    def _meets(self, node: fx.Node, other: fx.Node, numbers: Tensor) -> None:
        """An operand without channels: constant over them, or a weight that has an index for each."""
        shape = self._shape(other)
        aligned = (1,) * (numbers.dim() - len(shape)) + shape
        broad = [axis for axis, size in enumerate(aligned) if size > 1 and _varies(numbers, axis)]
        if not broad:
            return
        own = stored(other)
        if own is not None and len(broad) == 1 and not not_own(node, own):
            axis = broad[0]
            along = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)
            if bool((along == along[:, :1]).all()):
                self.found.rows.append(Axis(own, axis - (numbers.dim() - len(shape)), along[:, 0], node))
                return
        self._fix(numbers, f"{spell(node)} joins it with {other.name}, which keeps its size{source_of(node)}")

    def _along_last(self, node: fx.Node, source: fx.Node) -> Tensor | None:
        """The channels of the last axis, [K], where the numbers vary along no other."""
        numbers = self.found.values.get(source)
        if numbers is None:
            return None
        flat = numbers.reshape(-1, numbers.shape[-1])
        if bool((flat == flat[:1]).all()):
            return flat[0]
        self._fix(numbers, f"{spell(node)} is applied to each part of {source.name}{source_of(node)}")
        return None

    # --- numbers -------------------------------------------------------------------------------------------------

    def _numbers(self, value: Any) -> Tensor | None:
        return self.found.values.get(value) if isinstance(value, fx.Node) else None

    def _new(self, count: int) -> Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def _join(self, first: Tensor, second: Tensor) -> None:
        both = (first >= 0) & (second >= 0) & (first != second)
        if bool(both.any()):
            self._pairs.append(torch.unique(first[both] << 32 | second[both]))
        lonely = (first >= 0) != (second >= 0)
        if bool(lonely.any()):
            self._fix(torch.where(lonely, torch.maximum(first, second), NONE), "it meets what keeps its size")

    def _fix(self, numbers: Tensor | None, reason: str) -> None:
        if numbers is not None:
            self._fixed.append((torch.unique(numbers), reason))

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._size(size) for size in node.meta["val"].shape)

    def _size(self, size: Any) -> Any:
        return evaluated(size, self.sizes)


def viewed(node: fx.Node, values: Mapping[fx.Node, Tensor], sizes: dict[Any, int]) -> Tensor:
    """What a view makes of numbers, on small sizes; what has none is `NONE`."""

    def small(used: fx.Node) -> Any:
        if used in values:
            return values[used]
        value = used.meta["val"]
        if not isinstance(value, Tensor):
            return evaluated(value, sizes)
        return torch.full(tuple(evaluated(size, sizes) for size in value.shape), NONE)

    assert callable(node.target)
    result: Tensor = node.target(*fx.node.map_arg(node.args, small), **fx.node.map_arg(node.kwargs, small))
    return result


def not_own(node: fx.Node, weight: fx.Node | None) -> str | None:
    """Why a weight cannot be cut for one reader."""
    if weight is None:
        return f"{spell(node)} has a weight that is computed{source_of(node)}"
    readers = {reader for user in weight.users for reader in (user.users if is_masked(user) else (user,))}
    others = [user for user in readers if user is not node]
    if others:
        return f"its weight {weight.target} is also read by {others[0].name}{source_of(others[0])}"
    return None


def _varies(numbers: Tensor, axis: int) -> bool:
    return bool((numbers != numbers.narrow(axis, 0, 1)).any())


def small_sizes(program: Program) -> dict[Any, int]:
    """A small size for each of torch's symbols, no two alike, that the program is valid for."""
    ranges = program.signature.ranges
    symbols: dict[Any, int] = {}
    for node in program.graph.nodes:
        for size in _sizes(node.meta.get("val")):
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    name = program.symbols.get(str(symbol), str(symbol))
                    low = ranges[name][0] if name in ranges else 2
                    small = max(low, 2)
                    while symbol not in symbols and small in symbols.values():
                        small += 1
                    symbols.setdefault(symbol, small)
    return symbols


def _sizes(value: Any) -> Iterable[Any]:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, tuple | list):
        return [size for item in value for size in _sizes(item)]
    return [value]


def evaluated(size: Any, sizes: dict[Any, int]) -> Any:
    """A size that may be symbolic as a number; anything else as it is."""
    return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else size
