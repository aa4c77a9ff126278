"""ATen operators that torch's exporter does not translate, or not well, in others that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.graph import arguments
from .lowerings.torch_attention import is_plain, torchs_attention

aten = torch.ops.aten


def respelled(node: fx.Node) -> Any:
    """What to call in place of a node's operator, with the same arguments: a function, or the operator itself."""
    return next((function for function, applies in _FUNCTIONS.get(node.target, ()) if applies(node)), node.target)


def _always(node: fx.Node) -> bool:
    return True


def _less(number: float, tensor: Tensor, alpha: float = 1) -> Tensor:
    """The exporter's decompositions know no number less a tensor."""
    return -tensor * alpha + number if alpha != 1 else -tensor + number


def _chunk(tensor: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """Its translation is a sequence, on which the folding of constants fails."""
    size = (tensor.shape[dim] + chunks - 1) // chunks
    return [tensor.narrow(dim, index * size, size) for index in range(chunks - 1)] + [
        tensor.narrow(dim, (chunks - 1) * size, tensor.shape[dim] - (chunks - 1) * size)
    ]


def _searchsorted(
    sorted_sequence: Tensor, self: Tensor, *, out_int32: bool = False, right: bool = False, side: str | None = None
) -> Tensor:
    """How many numbers of a sorted row are smaller, or, on the right, not larger, by comparing all; NaN is last."""
    rows = sorted_sequence if sorted_sequence.dim() == 1 else sorted_sequence.unsqueeze(-2)
    values = self.unsqueeze(-1)
    behind = rows <= values if right or side == "right" else rows < values
    if self.is_floating_point():
        behind = behind | values.isnan()
    return behind.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _bucketize(self: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return _searchsorted(boundaries, self, out_int32=out_int32, right=right)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2, compute_mode: int | None = None) -> Tensor:
    """Distances of all rows to all others, from their differences: no cancellation, and as much memory as these."""
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)
    return distances


def _of_floats(operator: Any) -> Callable[..., Tensor]:
    """An operator for integers and a number computed from sizes, to which the exporter cannot promote them."""

    def call(self: Tensor, other: Any, **options: Any) -> Tensor:
        found: Tensor = operator(self.to(torch.get_default_dtype()), other, **options)
        return found

    return call


def _is_promoted(node: fx.Node) -> bool:
    given = (arguments(node)[name] for name in ("self", "other"))
    tensor, number = (item.meta.get("val") if isinstance(item, fx.Node) else item for item in given)
    integers = isinstance(tensor, Tensor) and not tensor.is_floating_point() and not tensor.is_complex()
    return integers and isinstance(number, torch.SymFloat)


_PROMOTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_FUNCTIONS: dict[Any, list[tuple[Any, Callable[[fx.Node], bool]]]] = {
    **{operator: [(_of_floats(operator), _is_promoted)] for operator in _PROMOTING},
    aten.chunk.default: [(_chunk, lambda node: len(node.meta["val"]) == node.args[1])],
    aten.scaled_dot_product_attention.default: [(torchs_attention, is_plain)],
    aten.searchsorted.Tensor: [(_searchsorted, lambda node: node.kwargs.get("sorter") is None)],
    aten.bucketize.Tensor: [(_bucketize, _always)],
    aten.cdist.default: [(_cdist, _always)],
}
_FUNCTIONS[aten.sub.Tensor].append((_less, lambda node: not isinstance(node.args[0], fx.Node)))
