"""Matrix products: the kernels of their own kind, and the operands that these take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....ir.graph import arguments, describe_value
from ....ir.ops.integer import integer_linear, integer_matmul
from ..emitter import CannotFuse
from .table import EXTERN

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A product of `left` [..., M, K] and `right`, [..., N, K] or, where it is not `transposed`, [..., K, N]."""

    left: fx.Node
    right: fx.Node
    transposed: bool

    @property
    def batched(self) -> bool:
        """Whether there is a `right` for each matrix of a batch; else all of `left` are rows of one product."""
        return len(self.right.meta["val"].shape) > 2


PRODUCTS: dict[Any, Callable[[dict[str, Any]], Product]] = {
    aten.linear.default: lambda given: Product(given["input"], given["weight"], True),
    aten.matmul.default: lambda given: Product(given["self"], given["other"], False),
    aten.mm.default: lambda given: Product(given["self"], given["mat2"], False),
    aten.bmm.default: lambda given: Product(given["self"], given["mat2"], False),
    integer_matmul: lambda given: Product(given["input"], given["other"], False),
    integer_linear: lambda given: Product(given["input"], given["weight"], True),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
EXTERN.update(
    dict.fromkeys(
        [
            aten.linear.default,
            aten.matmul.default,
            aten.mm.default,
            aten.bmm.default,
            aten.mv.default,
            aten.dot.default,
        ],
        "a product of vectors or of doubles, for cuBLAS",
    )
)


def check_product(node: fx.Node) -> None:
    """
    Raises:
        CannotFuse: if the kernel of products does not take the operands.
    """
    given = product_of(node)
    for operand in (given.left, given.right):
        found = operand.meta["val"]
        if found.dtype not in DTYPES or found.dtype != given.left.meta["val"].dtype or found.dim() < 2:
            raise CannotFuse(f"{node.name} multiplies {describe_value(found)}")


def product_of(node: fx.Node) -> Product:
    """The operands of a node of `PRODUCTS`."""
    return PRODUCTS[node.target](arguments(node))
