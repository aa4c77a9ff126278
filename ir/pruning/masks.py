"""Masks in the graph: a buffer of zeros and ones that is multiplied with a weight, until it is folded into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Program

aten = torch.ops.aten
_MARK = "fxpress_mask"  # in the metadata of products that `put` made


@dataclass(frozen=True)
class Masked:
    """A weight times its mask: `product` = `weight` * `mask`, and what else reads the weight reads the product."""

    product: fx.Node
    weight: fx.Node
    mask: fx.Node


def masked(program: Program) -> list[Masked]:
    """The masked weights, in the order of their products."""
    products = program.calls(aten.mul.Tensor)
    return [Masked(node, *node.args) for node in products if is_masked(node)]  # type: ignore[arg-type]


def is_masked(node: Any) -> bool:
    """Whether a node is a weight times a mask that `put` made, and no product of the model's own."""
    return isinstance(node, fx.Node) and bool(node.meta.get(_MARK))


def stored(node: Any) -> fx.Node | None:
    """The weight that a node reads, itself or masked."""
    if is_masked(node):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "get_attr" else None


def value(program: Program, weight: fx.Node) -> Tensor:
    """The numbers of a weight as its readers see them, masked where it is masked."""
    tensor = program.tensor(weight).detach()
    product = next((user for user in weight.users if is_masked(user)), None)
    return tensor if product is None else tensor * program.tensor(product.args[1])  # type: ignore[arg-type]


def put(program: Program, weight: fx.Node, mask: Tensor) -> None:
    """Mask a weight for all its readers; a mask that is there already is multiplied with the new one.

    before:  %y = aten.linear(%x, @w)
    after:   %w' = aten.mul(@w, @w_mask);  %y = aten.linear(%x, %w')

    Args:
        mask: of zeros and ones, of the weight's shape.
    """
    tensor = program.tensor(weight)
    new = mask.to(tensor.dtype).expand_as(tensor)
    old = next((user for user in weight.users if is_masked(user)), None)
    if old is not None:
        buffer: Any = old.args[1]
        program.set_weight(buffer, program.tensor(buffer) * new)
        return
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    buffer = program.add_weight(f"{weight.target}_mask", new.contiguous(), trainable=False)
    product = program.call(aten.mul.Tensor, weight, buffer, before=first)
    product.meta[_MARK] = True
    weight.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def fold(program: Program) -> int:
    """Multiply weights by their masks for good: masked numbers are exactly 0. How many."""
    found = masked(program)
    for item in found:
        weight, mask = program.tensor(item.weight).detach(), program.tensor(item.mask)
        program.set_weight(item.weight, torch.where(mask == 0, 0, weight))
        item.product.replace_all_uses_with(item.weight)
        program.graph.erase_node(item.product)
    if found:
        program.refresh([item.weight for item in found])
        program.clean()
    return len(found)
