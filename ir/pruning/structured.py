"""Thinning the layers that read heads and neurons: the units that stay make up for those that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..graph import Program, arguments
from ..rewrite import Track
from .masks import put, stored, value
from .ranking import DAMP
from .sensitivity import Reach
from .units import Family
from .weights import output_sqnr_db


@dataclass(frozen=True)
class Reader:
    """A layer that reads units, as it is to be.

    Attributes:
        weight: [N, K], zero in the columns that go. bias: [N].
        keep: [K], the columns that stay.
        sqnr_db: of its outputs, by the same inputs; None: there are no data.
    """

    weight: Tensor
    bias: Tensor | None
    keep: Tensor
    sqnr_db: float | None = None


def readers(
    program: Program,
    families: Sequence[Family],
    keeps: Sequence[Tensor],
    refit: bool,
    batches: Sequence[Sequence[Tensor]],
    track: Track,
    reaches: Mapping[fx.Node, Reach] | None = None,
) -> dict[fx.Node, Reader]:
    """The layers that read units without those that go, in graph order: each behind the thinned ones before it.

    Args:
        refit: whether what stays is fitted to what the layer gave.
        reaches: of these layers, what their tokens count in the fit; see `fitted`.
    """
    wanted = _kept_columns(families, keeps)
    if not batches:
        return {node: _thinned(program, node, keep, None, refit, None) for node, keep in wanted.items()}
    found: dict[fx.Node, Reader] = {}
    lockstep = Lockstep(program, batches, track, "thinning layers")

    def visit(node: fx.Node) -> list[Tensor] | None:
        if node not in wanted:
            return None
        inputs = arguments(node)["input"]
        found[node] = _thinned(program, node, wanted[node], lockstep.rows(inputs), refit, (reaches or {}).get(node))
        return [F.linear(item, found[node].weight, found[node].bias) for item in lockstep.values(inputs)]

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


def _thinned(
    program: Program, node: fx.Node, keep: Tensor, rows: Sequence[Tensor] | None, refit: bool, known: Reach | None
) -> Reader:
    given = arguments(node)
    weight, bias = stored(given["weight"]), stored(given["bias"])
    assert weight is not None
    old = value(program, weight)
    level = None if bias is None else value(program, bias)
    if rows is None:
        return Reader(torch.where(keep, old, 0), level, keep)
    if not refit or bool(keep.all()):
        masked = torch.where(keep, old, 0)
        return Reader(masked, level, keep, output_sqnr_db(rows, masked, old))
    weights = None if known is None else torch.cat(known.tokens)
    new, new_level = fitted(torch.cat(list(rows)), old, level, keep, weights)
    return Reader(new, new_level, keep, output_sqnr_db(rows, new, old))


def fitted(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor,
    tokens: Tensor | None = None,
    damp: float = DAMP,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with zeros in the columns that go, the rest fitted by least squares to the outputs as before.

    Args:
        rows: [tokens, K], what the layer reads.
        weight: [N, K].
        bias: [N].
        keep: [K].
        tokens: [tokens], what the squared error of each counts; None: as much as its output is short. The few tokens
            that are a hundred times as long as the others, as many Transformers have them behind feed-forward blocks,
            would else be all that is fitted to.
        damp: what pulls towards the weight as it was, in units of the mean weighed square of what the layer reads.
    """
    x, w = rows.double(), weight.double()
    level = torch.zeros(len(w)).double() if bias is None else bias.double()
    if tokens is None:
        tokens = 1 / (x @ w.T + level).square().sum(1).clamp(min=1e-12)
    share = tokens.double().sqrt().unsqueeze(1)
    x = x * share
    if bias is not None:  # one more input, which is always 1 and stays
        x, w = torch.cat([x, share], 1), torch.cat([w, level.unsqueeze(1)], 1)
        keep = torch.cat([keep, keep.new_ones(1)])
    total = x.T @ x
    pull = damp * total.diagonal()[: weight.shape[1]].mean().clamp(min=1e-12)
    kept = keep.nonzero().flatten()
    inner = total[kept][:, kept]
    inner.diagonal().add_(pull)
    result = torch.zeros_like(w)
    result[:, kept] = torch.linalg.solve(inner, (w @ total[:, kept] + pull * w[:, kept]).T).T
    result = result.to(weight.dtype)
    return (result, None) if bias is None else (result[:, :-1].contiguous(), result[:, -1].contiguous())


def write(program: Program, thinned: Mapping[fx.Node, Reader]) -> None:
    """Give the layers their weights and biases."""
    for node, reader in thinned.items():
        given = arguments(node)
        for name, new in (("weight", reader.weight), ("bias", reader.bias)):
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
