"""Dimensions inside the heads of an attention, turned so that few of them do most of the work.

Attention reads queries and keys only in their products, so a head may have any basis: x T for its queries and x T^-T
for its keys. In the same way the output projection undoes a basis of the values, V T and T^-1 W_o. That changes
nothing; but with T from the singular values of what a head gives, seen by what depends on it, the last dimensions
matter least, and can go in all heads alike (Lin et al., 2024, "MoDeGPT"; weighed by how far errors reach the outputs,
as in Hsu et al., 2022, "FWSVD"). The scale of the scores stays that of the original size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..graph import Program, arguments, source_of
from ..ops.attention import attention
from ..pattern import spell
from ..rewrite import Track
from .channels import NONE, VIEWS, Axis, Channels, evaluated, not_own, small_sizes, viewed
from .cut import cut, fits
from .masks import is_masked, stored, value
from .sensitivity import Reach
from .units import ROUND, Family, name_of_layers
from .weights import gram

aten = torch.ops.aten
_DAMP = 1e-4  # of the mean square: bases stay well conditioned where some directions are hardly used


@dataclass(frozen=True)
class Side:
    """Where the dimensions of heads are in a linear layer.

    Attributes:
        axis: 0 for rows of its weight and numbers of its bias, 1 for columns of its weight.
        places: [heads, D], indices of that axis.
    """

    layer: fx.Node
    axis: int
    places: Tensor


@dataclass(frozen=True)
class HeadDims:
    """The dimensions of an attention's queries and keys, or of its values.

    Attributes:
        turned: queries, or values, which get another basis.
        undone: keys, or the layer that reads what attention gives, which undo it.
        family: the dimensions as units; each is in all heads.
        channels: for `cut`; its numbers are those of the family.
    """

    attention: fx.Node
    turned: Side
    undone: Side
    family: Family
    channels: Channels

    @property
    def judge(self) -> Side:
        """Whose errors count: of the queries, or of what the output projection reads."""
        return self.undone if self.undone.axis == 1 else self.turned


@dataclass
class Found:
    """The dimensions of a program's heads, in graph order, and for others why they cannot go."""

    dims: list[HeadDims] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class _No(Exception):
    """Why dimensions cannot go."""


def find(program: Program) -> Found:
    """The dimensions of heads that have nothing but views between attention and linear layers of their own."""
    found, sizes, start = Found(), small_sizes(program), 0
    for node in program.calls(attention):
        given = arguments(node)
        for parts in (("query", "key"), ("value",)):
            try:
                item = _dims(program, node, [given[part] for part in parts], sizes, start)
            except _No as reason:
                found.refused[f"{' and '.join(parts)} of {node.name}"] = str(reason)
                continue
            start += len(item.family.channels)
            found.dims.append(item)
    return found


def _dims(program: Program, node: fx.Node, parts: Sequence[fx.Node], sizes: dict[object, int], start: int) -> HeadDims:
    ways = [_made(node, part) for part in parts]
    if len(parts) == 1:
        ways.append(_read(node))
    elif ways[0][0] is ways[1][0]:
        raise _No(f"queries and keys of {spell(node)} are the same{source_of(node)}")
    channels = Channels()
    sides, axes = [], []
    for way in ways:
        side, indices = _side(program, way, sizes)
        sides.append(side)
        if side.places.shape[1] != sides[0].places.shape[1]:
            raise _No(f"{spell(node)} has heads of two sizes{source_of(node)}")
        numbers = torch.arange(start, start + side.places.shape[1])
        size = program.tensor(stored(arguments(side.layer)["weight"])).shape[side.axis]  # type: ignore[arg-type]
        labels = torch.full((size,), NONE)
        labels[side.places] = numbers.expand_as(side.places)
        channels.values.update({item: labels[index] for item, index in indices.items()})
        for name in ("weight", "bias"):
            own = stored(arguments(side.layer)[name])
            if own is not None and not (side.axis == 1 and name == "bias"):
                axes.append(Axis(own, side.axis, labels, side.layer))
    channels._parents = torch.arange(start + len(numbers))
    channels.rows = [axis for axis in axes if axis.axis == 0]
    channels.columns = [axis for axis in axes if axis.axis == 1]
    if not fits(program, channels, [start]):
        raise _No(f"{spell(node)} reads heads that are not laid out dimension by dimension{source_of(node)}")
    rows, columns = tuple(channels.rows), tuple(channels.columns)
    name = name_of_layers([side.layer for side in sides])
    return HeadDims(node, sides[0], sides[1], Family("dims", name, numbers, columns, rows, node), channels)


def _made(node: fx.Node, part: fx.Node) -> list[fx.Node]:
    """From the linear layer that makes what an attention reads to the last view before it."""
    way = [part]
    while way[0].target is not aten.linear.default:
        first = way[0]
        if first.target not in VIEWS or "self" not in arguments(first):
            raise _No(f"{spell(first)} stands between {spell(node)} and a linear layer{source_of(first)}")
        way.insert(0, arguments(first)["self"])
    for item, reader in pairwise([*way, node]):
        for user in item.users:
            if user is not reader:
                raise _No(f"{spell(item)} is also read by {user.name}{source_of(item)}")
    return way


def _read(node: fx.Node) -> list[fx.Node]:
    """From an attention to the linear layer that reads what it gives."""
    way = [node]
    while len(way) == 1 or way[-1].target is not aten.linear.default:
        users = list(way[-1].users)
        if len(users) != 1:
            raise _No(f"{spell(way[-1])} is read in {len(users)} places{source_of(way[-1])}")
        user = users[0]
        reads = "input" if user.target is aten.linear.default else "self"
        views = user.target in VIEWS or user.target is aten.linear.default
        if not views or arguments(user).get(reads) is not way[-1]:
            raise _No(f"{spell(user)} stands between {spell(node)} and a linear layer{source_of(user)}")
        way.append(user)
    return way


def _side(program: Program, way: list[fx.Node], sizes: dict[object, int]) -> tuple[Side, dict[fx.Node, Tensor]]:
    """Where the dimensions are in the layer at one end; of each value on the way, the index of each element there."""

    def shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(evaluated(size, sizes) for size in node.meta["val"].shape)

    axis = 0 if way[0].target is aten.linear.default else 1
    layer = way[-1] if axis else way[0]
    given = arguments(layer)
    for part in [given["weight"]] + ([] if axis else [given["bias"]]):
        if part is not None and (reason := not_own(layer, stored(part))):
            raise _No(reason)
        if is_masked(part):
            raise _No(f"weights of {spell(layer)} have masks, which another basis would mix{source_of(layer)}")
    if axis:
        heads, size = shape(way[0])[1], shape(way[0])[3]
        start = torch.arange(heads * size).view(1, heads, 1, size)
        way = way[:-1]
    else:
        start = torch.arange(shape(layer)[-1])
    found = {way[0]: start.expand(shape(way[0]))}
    for item in way[1:]:
        found[item] = viewed(item, found, sizes)
    last = found[way[-1]]
    if axis:
        rows = last.flatten(0, -2)
        if rows.shape[1] != start.numel() or not bool((rows == rows[:1]).all()):
            raise _No(f"{spell(layer)} does not read all heads at once{source_of(layer)}")
        order = torch.argsort(rows[0])
        return Side(layer, 1, order.view(heads, size)), {item: order[index] for item, index in found.items()}
    if not bool((last == last[:1, :, :1]).all()):
        raise _No(f"{spell(layer)} makes heads that differ from token to token{source_of(layer)}")
    return Side(layer, 0, last[0, :, 0]), found


# --- another basis ---------------------------------------------------------------------------------------------------


def turn(
    program: Program,
    found: Sequence[HeadDims],
    batches: Sequence[Sequence[Tensor]],
    track: Track,
    reaches: Mapping[fx.Node, Reach],
) -> list[Tensor]:
    """Give heads bases in which the last dimensions matter least. [D] for each: what the outputs lose without them.

    Args:
        reaches: of the layers of `HeadDims.judge`, on these batches.
    """
    moments = _moments(program, found, batches, track, reaches)
    worths = []
    for item in found:
        side, groups = item.judge, min(len(item.turned.places), len(item.undone.places))
        channels = reaches[side.layer].channels.double()
        channels = channels / channels.trace().clamp(min=1e-30)
        if side.axis == 1:
            weight = _number(program, side, "weight").double()
            channels = weight.T @ channels @ weight
        bases, worth = [], torch.zeros(side.places.shape[1], dtype=torch.double)
        for heads in side.places.tensor_split(groups):
            used = sum(moments[side.layer][index][:, index] for index in heads)
            matters = sum(channels[index][:, index] for index in heads)
            basis, values = _basis(torch.as_tensor(used), torch.as_tensor(matters))
            bases.append(basis)
            worth += values.square()
        _apply(program, item, bases)
        worths.append(worth)
    return worths


def _moments(
    program: Program,
    found: Sequence[HeadDims],
    batches: Sequence[Sequence[Tensor]],
    track: Track,
    reaches: Mapping[fx.Node, Reach],
) -> dict[fx.Node, Tensor]:
    """By judge's layer, sum of x^T x of what it gives (queries) or reads (values), each token weighed by its reach."""
    judges = {item.judge.layer: item.judge for item in found}
    moments: dict[fx.Node, Tensor] = {}
    lockstep = Lockstep(program, batches, track, "turning heads")

    def visit(node: fx.Node) -> None:
        if node in judges:
            side = judges[node]
            rows = lockstep.rows(arguments(node)["input"])
            if side.axis == 0:
                bias = arguments(node)["bias"]
                weight = _number(program, side, "weight")
                rows = [
                    F.linear(item, weight, None if bias is None else _number(program, side, "bias")) for item in rows
                ]
            weighed = zip(rows, reaches[node].tokens, strict=True)
            moments[node] = gram([item * tokens.sqrt().unsqueeze(1) for item, tokens in weighed]).double()

    lockstep.run(visit)
    return moments


def _number(program: Program, side: Side, name: str) -> Tensor:
    own = stored(arguments(side.layer)[name])
    assert own is not None
    return value(program, own)


def _basis(used: Tensor, matters: Tensor) -> tuple[Tensor, Tensor]:
    """T, [D, D], and singular values, [D], the largest first.

    Without the last columns of x T, the error of x is as small as it can be for its rank.

    Args:
        used: [D, D], sum of x^T x.
        matters: [D, D], how errors of two dimensions count together.
    """
    roots = []
    for square in (used, matters):
        mean = square.diagonal().mean().clamp(min=1e-30)
        values, vectors = torch.linalg.eigh(square + _DAMP * mean * torch.eye(len(square), dtype=square.dtype))
        roots.append(vectors * values.clamp(min=_DAMP * mean / 2).sqrt())
    left, values, _ = torch.linalg.svd(roots[0].T @ roots[1])
    return torch.linalg.inv(roots[0]).T @ left, values


def _apply(program: Program, item: HeadDims, bases: Sequence[Tensor]) -> None:
    """Write both sides in other bases, of each dimension as long on one side as on the other."""
    lengths = []
    for side, undo in ((item.turned, False), (item.undone, True)):
        weight = _number(program, side, "weight").double().movedim(side.axis, 0)
        parts = [
            (torch.linalg.inv(basis) if undo else basis.T) @ weight[index]
            for basis, heads in zip(bases, side.places.tensor_split(len(bases)), strict=True)
            for index in heads
        ]
        squares = torch.stack(parts).square().sum(2).unflatten(0, (len(bases), -1)).mean(1)
        lengths.append(squares.sqrt().clamp(min=1e-12))
    scales = (lengths[1] / lengths[0]).sqrt()  # [groups, D]
    even = [basis * scale for basis, scale in zip(bases, scales, strict=True)]
    for side, undo in ((item.turned, False), (item.undone, True)):
        for name in ("weight", "bias"):
            own = stored(arguments(side.layer)[name])
            if own is None or (side.axis == 1 and name == "bias"):
                continue
            old = program.tensor(own).detach()
            new = old.double().movedim(side.axis, 0).clone()
            for basis, heads in zip(even, side.places.tensor_split(len(even)), strict=True):
                change = torch.linalg.inv(basis) if undo else basis.T
                for index in heads:
                    new[index] = change @ new[index]
            program.set_weight(own, new.movedim(0, side.axis).to(old.dtype).contiguous())


# --- cutting ---------------------------------------------------------------------------------------------------------


def cut_unread(program: Program) -> dict[str, int]:
    """Cut the dimensions that have no part in anything, because one side of all heads is zero: how many, as "dims"."""
    count = 0
    for item in find(program).dims:  # no two have values or weights' indices in common
        size = len(item.family.channels)
        zero = _zero(program, item.turned) | _zero(program, item.undone)
        stay = max(item.family.least, min(size, -(-int((~zero).sum()) // ROUND) * ROUND))
        gone = item.family.channels[zero.nonzero().flatten()[: size - stay]].tolist()
        if not gone or not fits(program, item.channels, gone):
            continue
        if item.undone.axis == 0 and arguments(item.attention)["scale"] is None:
            _set_scale(item.attention, 1 / math.sqrt(size))
        cut(program, item.channels, gone)
        count += len(gone)
    return {"dims": count} if count else {}


def _set_scale(node: fx.Node, scale: float) -> None:
    place = list(arguments(node)).index("scale")
    if len(node.args) > place:
        node.update_arg(place, scale)
    else:
        node.update_kwarg("scale", scale)


def _zero(program: Program, side: Side) -> Tensor:
    """[D], which dimensions are zero in all heads."""
    weight = _number(program, side, "weight").movedim(side.axis, 0)
    zero = (weight == 0).flatten(1).all(1)
    if side.axis == 0 and arguments(side.layer)["bias"] is not None:
        zero &= _number(program, side, "bias") == 0
    return zero[side.places].all(0)
