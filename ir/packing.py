"""Which calls compute the tokens of a batch each by itself, so that padding can be left out of all of them.

From the keys of attention with a key mask on, in both directions, along the axes that calls carry (`axes`): what is
reached holds, or makes, one vector a token. Attention among the same tokens is part of it, as its mask keeps padding
from all others.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .axes import carried
from .graph import Program, arguments, same_sizes, shape, source_of
from .masks import expression as e
from .masks.reader import Reader as MaskReader
from .masks.values import is_one
from .masks.without import worth_without
from .ops.attention import attention
from .ops.quantize import dynamic_quantize
from .ops.table import OPERATORS, taking
from .printer import target_name

aten = torch.ops.aten
Place = tuple[int, int]  # the axes of a value that are batch and length
_HEADS_SECOND: Place = (0, 2)
_OF_SIZES = (
    aten.sym_size.int, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
)  # fmt: skip


@dataclass
class Region:
    """The calls on tokens of one key mask.

    Attributes:
        key_mask: [B, N], True: a token.
        places: the axes that are B and N of each call's result, or of each of its results.
        attention: those of the calls that are attention, of any kind.
        at_padding: numbers that results are at padding in the model, whatever is computed there; else it is of no use.
    """

    key_mask: fx.Node
    places: dict[fx.Node, Place] = field(default_factory=dict)
    attention: list[fx.Node] = field(default_factory=list)
    at_padding: dict[fx.Node, float] = field(default_factory=dict)

    def reads_masked(self, node: fx.Node) -> bool:
        """Whether a call is attention that this key mask keeps padding from."""
        return _key_mask(node) is self.key_mask


def key_masks(program: Program) -> list[fx.Node]:
    """The padding masks that attention of any kind reads, [B, M], True at real tokens, in graph order."""
    found = [arguments(node).get("key_mask") for node in program.calls(*OPERATORS)]
    return [node for node in dict.fromkeys(found) if node is not None]


def regions(program: Program) -> list[Region]:
    """The regions of all key masks, without those that have no attention."""
    found = [region_of(program, mask) for mask in key_masks(program)]
    return [region for region in found if region.attention]


class Padding:
    """Which key mask says where the tokens of a value are padding.

    It is the mask by whose attention the value is reached along the tokens. Where calls in between do not say how they
    treat tokens, it is one of the same sizes, if the length may vary: a decoder's has a name of its own then, even in a
    batch in which it equals the encoder's.
    """

    def __init__(self, program: Program) -> None:
        self._regions = [region_of(program, mask) for mask in key_masks(program)]

    def mask(self, node: fx.Node, place: Place) -> fx.Node | None:
        """The key mask [B, N] of a value whose axes at a place are B and N; None: nothing masks its tokens."""
        for region in self._regions:
            if region.places.get(node) == place:
                return region.key_mask
        for region in self._regions:
            sizes = shape(region.key_mask)
            if not isinstance(sizes[1], int) and _holds(node, place, sizes):
                return region.key_mask
        return None


@dataclass(frozen=True)
class Reader:
    """A call outside of a region to which padding counts, and the call of the region that it reads, if by others."""

    node: fx.Node
    source: fx.Node

    @property
    def reason(self) -> str:
        """What it does."""
        return f"{target_name(self.node)} reads tokens that are padding{source_of(self.node)}"


def trim(program: Program, region: Region) -> Reader | None:
    """Take out of a region what calls read to which padding counts; a reader of what is made by attention, if any.

    What is left depends on nothing that would be zero at padding but was not. Where the padding of what is read is
    the same number always, as in a product with the mask, that is noted.
    """
    while reader := _reader_of_padding(region):
        number = _at_padding(program, region, reader.source)
        if number is not None:
            region.at_padding[reader.source] = number
            continue
        out = behind(reader.source) & set(region.places)
        if out.intersection(region.attention):
            return reader
        for node in out:
            del region.places[node]
    return None


def _reader_of_padding(region: Region) -> Reader | None:
    """Outputs, single tokens, and attention under the same mask may read tokens; padding is nothing to the latter."""
    waiting = [(node, node, place) for node, place in region.places.items() if node not in region.at_padding]
    seen = set(region.places)
    while waiting:
        node, source, place = waiting.pop()
        for user in node.users:
            if user in seen or _takes_single_tokens(user, node, place):
                continue
            if region.reads_masked(user) or _asks_alone(user, node):
                if arguments(user)["query"] is node:
                    seen.add(user)
                    waiting.append((user, source, _HEADS_SECOND))
                continue
            axes = carried(user).get(node, [])
            found = tuple(axes[axis] for axis in place) if axes else (None,)
            if None in found:
                return Reader(user, source)
            seen.add(user)
            waiting.append((user, source, found))  # type: ignore[arg-type]
    return None


def _asks_alone(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call is attention of these tokens, each by itself, to others."""
    if user.target is not attention:
        return False
    given = arguments(user)
    return given["query"] is node and node not in (given["key"], given["value"], given["bias"])


def _at_padding(program: Program, region: Region, node: fx.Node) -> float | None:
    """The one number that a result of a region is at padding, as far as the graph of masks tells."""
    place = region.places[node]
    sizes = shape(node) if isinstance(node.meta["val"], Tensor) else ()
    others = [axis for axis in range(len(sizes)) if axis not in place]
    if not sizes or len(others) > 2:
        return None
    axes = dict(zip([*place, *others], (0, 3, 1, 2), strict=False))  # as batch, key, head and query
    extents: list[Any] = [1] * 4
    for axis, name in axes.items():
        extents[name] = sizes[axis]
    reader = MaskReader(program, extents)
    indices = tuple(e.whole(0) if is_one(sizes[axis]) else e.index(axes[axis]) for axis in range(len(sizes)))
    mask = tuple(
        e.whole(0) if is_one(size) else e.index(name) for size, name in zip(shape(region.key_mask), (0, 3), strict=True)
    )
    return worth_without(reader.read(node, indices), reader.read(region.key_mask, mask))


def _takes_single_tokens(user: fx.Node, node: fx.Node, place: Place) -> bool:
    """Whether a reader gives tokens as they are: an output, one place of each sample, or nothing but their number."""
    if user.op == "output" or user.target in _OF_SIZES:
        return True
    if user.target is operator.getitem and is_fixed(node, user.meta["val"]):
        return True
    if user.target is aten.select.int:
        return int(arguments(user)["dim"]) % len(shape(node)) == place[1]
    if user.target is not aten.index.Tensor:
        return False
    indices: Any = arguments(user)["indices"]
    named = [axis for axis, index in enumerate(indices) if index is not None]
    return named == sorted(place) and all(len(shape(indices[axis])) == 1 for axis in named)


def _key_mask(node: fx.Node) -> Any:
    return arguments(node)["key_mask"] if node.target in taking("query", "key", "value", "key_mask") else None


def region_of(program: Program, mask: fx.Node) -> Region:
    """All that is reached from the keys of attention under a mask."""
    region = Region(mask)
    fixed = behind(mask)
    reached: dict[fx.Node, Place] = {}  # the region, and what it reads
    waiting: list[fx.Node] = []

    def reach(node: Any, place: Place) -> None:
        if node in region.places or node in fixed or not _holds(node, place, shape(mask)):
            return
        among = _among_tokens(node, region, reached)
        if region.reads_masked(node) and not among:
            return  # its queries may be other tokens, as many as the keys by chance
        if among or any(place[0] in axes and place[1] in axes for axes in carried(node).values()):
            region.places[node] = place
        elif node in reached:
            return
        reached[node] = place
        waiting.append(node)

    for node in program.graph.nodes:
        if region.reads_masked(node):
            reach(arguments(node)["key"], _HEADS_SECOND)
            reach(arguments(node)["value"], _HEADS_SECOND)
    while waiting:
        node = waiting.pop()
        batch, length = reached[node]
        for used, axes in carried(node).items() if node in region.places else ():
            if batch in axes and length in axes:
                reach(used, (axes.index(batch), axes.index(length)))
        for user in node.users:
            if region.reads_masked(user):
                reach(user, _HEADS_SECOND)
            axes = carried(user).get(node, [])
            if axes and None not in (axes[batch], axes[length]):
                reach(user, (axes[batch], axes[length]))  # type: ignore[arg-type]
    order = [node for node in program.graph.nodes if node in region.places]
    region.places = {node: region.places[node] for node in order}
    region.attention = [node for node in order if region.reads_masked(node)]
    return region


def _among_tokens(node: fx.Node, region: Region, reached: dict[fx.Node, Place]) -> bool:
    """Whether a call is attention whose queries are of the same tokens as its keys."""
    if not region.reads_masked(node):
        return False
    given = arguments(node)
    return all(reached.get(given[name]) == _HEADS_SECOND for name in ("query", "key", "value"))


def _holds(node: Any, place: Place, sizes: tuple[Any, ...]) -> bool:
    """Whether a value has these sizes at a place."""
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return bool(values) and all(
        isinstance(item, Tensor) and (is_fixed(node, item) or same_sizes([item.shape[axis] for axis in place], sizes))
        for item in values
    )


def is_fixed(node: fx.Node, result: Tensor) -> bool:
    """Whether one of several results is the same whatever the tokens are: the zero point of ranges by token."""
    return node.target is dynamic_quantize and result.dim() == 0


def behind(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return seen
