"""Matrix products: the kernels of their own kind, and the operands that these take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ....ir.graph import arguments, describe_value
from ....ir.ops.float8 import FLOAT8, float8_linear, float8_products
from ....ir.ops.integer import integer_linear, integer_matmul
from ....ir.ops.quantize import int4_linear, int8_weight_linear
from ....ir.ops.sparse import sparse24_linear
from ..emitter import CannotFuse
from .table import EXTERN

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A product of `left` [..., M, K] and `right`, [..., N, K] or, where it is not `transposed`, [..., K, N].

    Attributes:
        function: of kernels/, which launches it.
        others: what it takes besides, by the names of its parameters, in their order.
    """

    left: fx.Node
    right: fx.Node
    transposed: bool
    function: str = "matmul"
    others: Mapping[str, fx.Node] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """All that is multiplied, which must be in memory before."""
        return (self.left, self.right, *self.others.values())

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
    **dict.fromkeys(
        (int4_linear, int8_weight_linear),
        lambda given: Product(
            given["input"],
            given["weight"],
            True,
            "int4_matmul",
            _given(given, weight_scale="scale", zero_point="zero_point"),
        ),
    ),
    float8_products: lambda given: Product(given["input"], given["weight"], True),
    float8_linear: lambda given: Product(
        given["input"], given["weight"], True, "float8_matmul", _given(given, weight_scale="scale")
    ),
    sparse24_linear: lambda given: Product(
        given["input"],
        given["values"],
        True,
        "sparse24_matmul",
        _given(given, positions="positions", dense="dense"),
    ),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# By function: what it takes as `left` and as `right`, and whether these must be of one dtype.
DTYPES: dict[str, tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...], bool]] = {
    "matmul": ((*FLOATS, torch.int8, FLOAT8), (*FLOATS, torch.int8, FLOAT8), True),
    "float8_matmul": (FLOATS, (FLOAT8,), False),
    "int4_matmul": (FLOATS, (torch.uint8, torch.int8), False),
    "sparse24_matmul": (FLOATS[1:], FLOATS[1:], True),
}
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
    product = product_of(node)
    left, right = product.left.meta["val"], product.right.meta["val"]
    lefts, rights, alike = DTYPES[product.function]
    for found, allowed, least in ((left, lefts, 2 if product.function == "matmul" else 1), (right, rights, 2)):
        if found.dtype not in allowed or (alike and found.dtype != left.dtype) or found.dim() < least:
            raise CannotFuse(f"{node.name} multiplies {describe_value(found)}")


def product_of(node: fx.Node) -> Product:
    """The operands of a node of `PRODUCTS`."""
    return PRODUCTS[node.target](arguments(node))


def _given(given: Mapping[str, Any], **names: str) -> dict[str, fx.Node]:
    """The arguments of these names that are given, by what the function calls them."""
    return {name: given[argument] for argument, name in names.items() if given[argument] is not None}
