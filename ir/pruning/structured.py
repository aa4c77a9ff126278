"""Thinning what makes and reads heads and neurons: the units that stay make up for those that go.

Layers are visited in order, with the model as it was and as it is to be side by side. A layer that adds to a residual
stream is fitted so that the sum is as it was: it makes up for what the layers before it changed as well. One that makes
units is fitted to what it gave. So errors do not add up from layer to layer (He et al., 2017, "Channel Pruning", for
networks of several branches).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..graph import Program, arguments, same_value
from ..rewrite import Track
from .leastsquares import Batch, by_length, fitted, off
from .masks import is_masked, put, stored, value
from .sensitivity import Reach
from .units import Family
from .weights import output_sqnr_db

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A layer that makes or reads units, as it is to be.

    Attributes:
        weight: [N, K], zero in the columns that go.
        bias: [N].
        keep: [K], the columns that stay.
        sqnr_db: of what it is fitted to, each token in units of its length; without a fit, of its outputs by the same
            inputs; None: there are no data.
    """

    weight: Tensor
    bias: Tensor | None
    keep: Tensor
    sqnr_db: float | None = None


def thinned(
    program: Program,
    families: Sequence[Family],
    keeps: Sequence[Tensor],
    refit: bool,
    batches: Sequence[Sequence[Tensor]],
    track: Track,
    reaches: Mapping[fx.Node, Reach] | None = None,
) -> dict[fx.Node, Layer]:
    """The layers that read units without those that go, in graph order: each behind the thinned ones before it.

    Args:
        refit: whether what stays is fitted to what there was, in the layers that make the units, too.
        reaches: of layers, what their tokens count in the fit; those of others count by the length of what is fitted.
    """
    wanted = _kept_columns(families, keeps)
    if refit and batches:
        every = wanted | _makers(program, families, wanted)
        tokens = {node: item.tokens for node, item in (reaches or {}).items() if node in wanted}
        return _Fit(program, every, _kept_rows(families, keeps), batches, track, tokens).run()
    found: dict[fx.Node, Layer] = {}
    if not batches:
        return {node: _masked(program, node, keep) for node, keep in wanted.items()}
    lockstep = Lockstep(program, batches, track, "thinning layers")

    def visit(node: fx.Node) -> list[Tensor] | None:
        if node not in wanted:
            return None
        inputs = arguments(node)["input"]
        found[node] = _masked(program, node, wanted[node], lockstep.rows(inputs))
        new = (F.linear(item, found[node].weight, found[node].bias) for item in lockstep.values(inputs))
        return [lockstep.hold(item) for item in new]

    lockstep.run(visit)
    return found


def _kept_columns(families: Sequence[Family], keeps: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    wanted: dict[fx.Node, Tensor] = {}
    for family, keep in zip(families, keeps, strict=True):
        for axis in family.columns:
            units = family.units(axis)
            mine = (units < 0) | keep[units.clamp(min=0)]
            wanted[axis.reader] = wanted[axis.reader] & mine if axis.reader in wanted else mine
    return wanted


def _kept_rows(families: Sequence[Family], keeps: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """The rows that stay of layers that make what attention alone reads."""
    wanted: dict[fx.Node, Tensor] = {}
    for family, keep in zip(families, keeps, strict=True):
        for axis in () if family.columns else family.rows:
            units = family.units(axis)
            wanted[axis.reader] = (units < 0) | keep[units.clamp(min=0)]
    return wanted


def _makers(program: Program, families: Sequence[Family], readers: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """The linear layers that make units and read none; those with masks stay as they are."""
    nodes = dict.fromkeys(axis.reader for family in families for axis in family.rows)
    linears = [node for node in nodes if node.target is aten.linear.default and node not in readers]
    free = [node for node in linears if not is_masked(arguments(node)["weight"])]
    return {node: torch.ones_like(_numbers(program, node)[0][0], dtype=torch.bool) for node in free}


def _numbers(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer."""
    given = arguments(node)
    weight, bias = stored(given["weight"]), stored(given["bias"])
    assert weight is not None
    return value(program, weight), None if bias is None else value(program, bias)


def _masked(program: Program, node: fx.Node, keep: Tensor, rows: Sequence[Tensor] | None = None) -> Layer:
    old, level = _numbers(program, node)
    new = torch.where(keep, old, 0)
    return Layer(new, level, keep, None if rows is None else output_sqnr_db(rows, new, old))


class _Fit:
    """The walk. Each batch is there twice: as the model was and, behind all of those, as it is to be."""

    def __init__(
        self,
        program: Program,
        wanted: Mapping[fx.Node, Tensor],
        rows: Mapping[fx.Node, Tensor],
        batches: Sequence[Sequence[Tensor]],
        track: Track,
        tokens: Mapping[fx.Node, Sequence[Tensor]],
    ) -> None:
        self.program, self.wanted, self.rows, self.tokens = program, wanted, rows, tokens
        self.count = len(batches)
        self.lockstep = Lockstep(program, [*batches, *batches], track, "fitting layers")
        self.found: dict[fx.Node, Layer] = {}

    def run(self) -> dict[fx.Node, Layer]:
        self.lockstep.run(self._visit)
        return self.found

    def _visit(self, node: fx.Node) -> list[Tensor] | None:
        if node not in self.wanted:
            return None
        inputs = self.lockstep.values(arguments(node)["input"])
        stream = [self.lockstep.values(item) for item in _beside(node)]
        (weight, bias), keep = _numbers(self.program, node), self.wanted[node]
        hold = self.lockstep.hold
        was = [hold(F.linear(item, weight, bias)) for item in inputs[: self.count]]
        stays = node not in self.rows or bool(self.rows[node].all())
        if stays and bool(keep.all()) and all(map(self._same, [inputs, *stream])):
            self.found[node] = Layer(weight, bias, keep, math.inf)
            return was + was
        batches = partial(self._batches, node, inputs, was, stream)
        weight, bias = fitted(batches(self.tokens.get(node)), weight, bias, keep)
        if not stays:
            weight = weight * self.rows[node].unsqueeze(1)
            bias = None if bias is None else bias * self.rows[node]
        self.found[node] = Layer(weight, bias, keep, -10 * math.log10(max(off(batches(None), weight, bias), 1e-30)))
        return was + [hold(F.linear(item, weight, bias)) for item in inputs[self.count :]]

    def _same(self, values: Sequence[Tensor]) -> bool:
        """Whether a value is as it was."""
        return all(map(torch.equal, values[: self.count], values[self.count :]))

    def _batches(
        self,
        node: fx.Node,
        inputs: Sequence[Tensor],
        was: Sequence[Tensor],
        stream: Sequence[Sequence[Tensor]],
        tokens: Sequence[Tensor] | None,
    ) -> Iterator[Batch]:
        """What a layer is to be fitted to, without padding; tokens count by their lengths, or as they are said to."""
        for index, total in enumerate(was):
            lack = total
            for values in stream:
                total = total + values[index]
                lack = lack + (values[index] - values[index + self.count])
            rows = [self.lockstep.unpadded(node, item, index) for item in (inputs[index + self.count], lack, total)]
            yield Batch(rows[0], rows[1], by_length(rows[2]) if tokens is None else tokens[index])


def _beside(node: fx.Node) -> list[fx.Node]:
    """What is added to what a layer gives and is there before it: a residual stream, and branches beside its own."""
    found: list[fx.Node] = []
    total = node
    while len(total.users) == 1 and next(iter(total.users)).target is aten.add.Tensor:
        user = next(iter(total.users))
        given = arguments(user)
        other = given["other"] if given["self"] is total else given["self"]
        alike = isinstance(other, fx.Node) and same_value(other.meta["val"], node.meta["val"])
        if not alike or not other < node or given["alpha"] != 1:
            break
        found.append(other)
        total = user
    return found


def write(program: Program, layers: Mapping[fx.Node, Layer]) -> None:
    """Give the layers their weights and biases."""
    for node, layer in layers.items():
        given = arguments(node)
        for name, new in (("weight", layer.weight), ("bias", layer.bias)):
            own = stored(given[name])
            if own is not None and new is not None:
                program.set_weight(own, new)


def put_masks(program: Program, family: Family, keep: Tensor) -> None:
    """Mask the rows and columns of the units that go, and what else belongs to them."""
    for axis in (*family.columns, *family.rows):
        units = family.units(axis)
        stays = (units < 0) | keep[units.clamp(min=0)]
        sizes = program.tensor(axis.weight).shape
        place = axis.axis % len(sizes)
        put(program, axis.weight, stays.reshape([-1 if index == place else 1 for index in range(len(sizes))]))
