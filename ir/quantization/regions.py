"""Which parts of a program can run in integers alone: from float values that come in to those that leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from ..graph import Program, arguments, same_sizes, shape
from ..ops.attention import attention
from ..ops.linear import gated_linear, linear_act, mlp, split_linear
from ..ops.norm import add_layer_norm, add_rms_norm
from ..pattern import Refusal
from ..printer import target_name

aten = torch.ops.aten
RULE = "integer_only"
FUSED = (mlp, linear_act, gated_linear, split_linear, add_layer_norm, add_rms_norm)
VIEWS = (
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.expand.default,
)  # fmt: skip
_WIDEST = 2**16  # columns of a weight: 2^16 products of 8 bits take 30 bits, and a bias is left as many
_LARGEST_EPS = 1e-3


Region = tuple[fx.Node, ...]
"""Operators that can run in integers, in graph order."""


def operands(node: fx.Node) -> list[fx.Node]:
    """The activations that an operator of a region computes on."""
    given = arguments(node)
    if node.target is attention:
        return [given["query"], given["key"], given["value"]]
    if node.target is aten.add.Tensor:
        return [given["self"], given["other"]]
    return [node.args[0]]  # type: ignore[list-item]


def find_regions(program: Program) -> tuple[list[Region], list[Refusal]]:
    """The regions that hold an attention, and why each operator next to them is in none."""
    fused = program.calls(*FUSED)
    if fused:
        why = f"{target_name(fused[0])} is the work of fuse; put integer_only before fuse"
        return [], [Refusal(why, RULE, fused[0].name)]
    taken: dict[fx.Node, None] = {}
    refused: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or _is_size(node):
            continue
        reason = _reason(node, taken)
        if reason is None:
            taken[node] = None
        elif reason:
            refused[node] = reason
    links = networkx.Graph()
    links.add_nodes_from(taken)
    links.add_edges_from((used, node) for node in taken for used in operands(node) if used in taken)
    regions: list[Region] = []
    kept: set[fx.Node] = set()
    order = {node: place for place, node in enumerate(taken)}
    for part in networkx.connected_components(links):
        nodes = tuple(sorted(part, key=order.__getitem__))
        if any(node.target is attention for node in nodes):
            regions.append(nodes)
            kept |= part
    refusals = [
        Refusal(reason, RULE, node.name)
        for node, reason in refused.items()
        if node.target is attention or any(used in kept for used in node.all_input_nodes)
    ]
    return sorted(regions, key=lambda region: order[region[0]]), refusals


def _is_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def _reason(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    """Why an operator stays float; None if it need not; empty where nobody would expect it to be taken."""
    check = _CHECKS.get(node.target)
    reads = any(used in taken for used in node.all_input_nodes)
    if check is None:
        return f"{target_name(node)} has no integer form" if reads else ""
    if node.meta["val"].dtype is not torch.float32:
        name = str(node.meta["val"].dtype).removeprefix("torch.")
        floating = node.meta["val"].is_floating_point()
        return f"it computes in {name}; integer_only takes models in float32" if floating else ""
    return check(node, taken)


def _is_weight(node: Any, rank: int) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(shape(node)) == rank


def _linear(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    given = arguments(node)
    if not _is_weight(given["weight"], 2) or not (given["bias"] is None or _is_weight(given["bias"], 1)):
        return "its weight or bias is computed"
    columns = shape(given["weight"])[1]
    return f"its weight has {columns} columns, at most {_WIDEST} fit" if columns > _WIDEST else None


def _layer_norm(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        return f"the norm is over {len(given['normalized_shape'])} axes"
    if not all(given[name] is None or _is_weight(given[name], 1) for name in ("weight", "bias")):
        return "its weight or bias is computed"
    if not isinstance(shape(node)[-1], int):
        return "the length of the normalised axis varies"
    return f"its eps is {given['eps']:g}, at most {_LARGEST_EPS:g} fits" if given["eps"] > _LARGEST_EPS else None


def _attention(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    given = arguments(node)
    for name in ("query", "key", "value"):
        if given[name] not in taken:
            return f"its {name} is computed by {target_name(given[name])}, which stays float"
    if given["bias"] is not None and given["bias"].meta["val"].dtype is not torch.bool:
        return "a bias of floats is added to its scores"
    if given["softcap"]:
        return "its scores have a soft cap"
    if given["sinks"] is not None:
        return "its softmax has sinks"
    if given["scale"] is not None and not given["scale"] > 0:
        return f"its scale is {given['scale']:g}"
    if given["scale"] is None and not isinstance(shape(given["query"])[-1], int):
        return "the size of its heads varies"
    if given["empty"] == "nan":
        return "rows without keys give NaN, for which there is no integer"
    if not same_sizes(shape(given["query"])[1:2], shape(given["key"])[1:2]):
        return "its key heads are grouped"
    return None


def _add(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    given = arguments(node)
    both = (given["self"], given["other"])
    if not any(isinstance(item, fx.Node) and item in taken for item in both):
        return ""
    if not all(isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor) for item in both):
        return "a number is added"
    if given["alpha"] != 1:
        return f"alpha is {given['alpha']}, expected 1"
    wide = [item.meta["val"].dtype is torch.float32 and len(shape(item)) for item in both]
    return None if all(wide) else "what is added is no float32 tensor"


def _activation(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    return None if node.args[0] in taken else ""


def _view(node: fx.Node, taken: dict[fx.Node, None]) -> str | None:
    return None if node.args[0] in taken or _leads(node) else ""


def _leads(node: fx.Node) -> bool:
    """Whether all that reads a view is where a region begins: what it views is quantized rather than the view."""
    return bool(node.users) and all(
        user.target in _STARTS or (user.target in VIEWS and _leads(user)) for user in node.users
    )


_STARTS = (aten.linear.default, aten.layer_norm.default)
_CHECKS: dict[Any, Callable[[fx.Node, dict[fx.Node, None]], str | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    attention: _attention,
    aten.add.Tensor: _add,
    aten.gelu.default: _activation,
    aten.relu.default: _activation,
    **dict.fromkeys(VIEWS, _view),
}
