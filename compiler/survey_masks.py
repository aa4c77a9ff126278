"""What became of the masks of a surveyed model: read or not, checked at every index; what stays a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.graph import Program, arguments, shape
from ..ir.masks import expression as e
from ..ir.masks.evaluate import wrong_masks
from ..ir.masks.meaning import KEY, QUERY, read
from ..ir.masks.reader import Reader
from ..ir.ops.attention import attention
from ..ir.pattern import Refusal
from ..ir.rewrite import Context
from ..passes import Canonicalize


@dataclass(frozen=True)
class Masks:
    """The masks of a program's attentions."""

    found: int  # attentions
    read: int  # that have no mask, or one whose expression says of every query and key what is visible
    unread: tuple[str, ...] = ()  # where the reading of the others ends, without repetition
    tensors: tuple[str, ...] = ()  # what is read but has no argument, and so stays a tensor
    wrong: tuple[str, ...] = ()  # expressions that differ from the graph's tensor anywhere


def masks(traced: Program, compiled: Program, batches: Sequence[Sequence[Tensor]]) -> Masks:
    """Read every mask of a traced program, compare it at every index with what the graph computes on some inputs.

    Args:
        compiled: the same program after the passes, to see which masks stay tensors.
    """
    plain = traced.copy()
    Canonicalize(masks=False).apply(plain, Context())
    wrong = {e.spell(found): None for tensors in batches for _, found in wrong_masks(plain, tensors)}
    biases = [(node, expression) for node, expression in _biases(plain)]
    holes = [next(_unread(expression), None) for _, expression in biases]
    nodes = plain.calls(attention)
    return Masks(
        found=len(nodes),
        read=len(nodes) - sum(hole is not None for hole in holes),
        unread=tuple(dict.fromkeys(_origin(hole) for hole in holes if hole is not None)),
        tensors=tuple(dict.fromkeys(text for _, expression in _biases(compiled) for text in _hiding(expression))),
        wrong=tuple(wrong),
    )


def _biases(program: Program) -> Iterator[tuple[fx.Node, e.Expression]]:
    for node in program.calls(attention):
        given = arguments(node)
        if given["bias"] is not None:
            extents = (*shape(given["query"])[:3], shape(given["key"])[2])
            yield node, Reader(program, extents).mask(given["bias"])


def _unread(value: e.Expression) -> Iterator[fx.Node]:
    """Tensors over queries and keys at which reading ends, but for learned biases and masks that the user gives."""
    if isinstance(value, e.Element) and {QUERY, KEY} <= value.axes and not _is_given(value.node):
        yield value.node
    for part in e.parts(value):
        yield from _unread(part)


def _is_given(node: fx.Node) -> bool:
    """Whether a tensor is an input or weight, or is computed from learned or real numbers: then it is what it is."""
    seen, waiting = set(), [node]
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        value = item.meta.get("val") if item.op in ("get_attr", "placeholder") else None
        if isinstance(value, Tensor) and (item is node or (value.is_floating_point() and value.numel() > 1)):
            return True
        waiting += item.all_input_nodes
    return False


def _origin(node: fx.Node) -> str:
    name = getattr(node.target, "_opname", str(node.target))
    return f"{str(node.meta['val'].dtype).removeprefix('torch.')} of {name}"


def _hiding(expression: e.Expression) -> Iterator[str]:
    """A mask that stays a tensor, as text; nothing for a bias that hides no key."""
    meaning = read(expression)
    if isinstance(meaning, Refusal):
        yield meaning.reason
    elif meaning.rest or meaning.left or meaning.right or meaning.key_mask is not None:
        yield e.spell(e.both(*meaning.rest)) if meaning.rest else str(meaning)
    elif isinstance(expression, e.Element) and expression.node.meta["val"].dtype is torch.bool:
        yield e.spell(expression)
