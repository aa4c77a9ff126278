"""Attention in integers: which attentions can be, their ranges on calibration data, and the rewrite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..graph import Program, arguments, module_path
from ..layers import fits
from ..ops.attention import attention
from ..ops.int8_attention import int8_attention
from ..pattern import Refusal
from ..rewrite import Track

_LEAST = 1e-12  # of a scale: what is always zero has none of its own
_OPERANDS = ("query", "key", "value")


def name_of(node: fx.Node) -> str:
    """The module that an attention is in."""
    return module_path(node) or node.name


def attentions(program: Program, skip: Sequence[str]) -> tuple[list[fx.Node], list[Refusal]]:
    """The attentions that can multiply integers, in graph order."""
    found, refusals = [], []
    for node in program.calls(attention):
        reason = f"{name_of(node)} is to be skipped" if fits(name_of(node), skip) else None
        if arguments(node)["sinks"] is not None:
            reason = "it has sinks, whose probability no integer stands for"
        if reason is None:
            found.append(node)
        else:
            refusals.append(Refusal(reason, "attention", node.name))
    return found, refusals


def ranges(
    program: Program, nodes: Sequence[fx.Node], batches: Sequence[Sequence[Tensor]], track: Track
) -> dict[fx.Node, Tensor]:
    """The scales of query, key and value of each attention, fp32 [3]: 1/127 of the largest magnitude without padding.

    Raises:
        ValueError: a magnitude is NaN or infinite.
    """
    lockstep = Lockstep(program, batches, track, "ranges of attention")
    wanted, found = set(nodes), {}

    def visit(node: fx.Node) -> None:
        if node in wanted:
            tops = [_top(lockstep, arguments(node)[name]) for name in _OPERANDS]
            if not all(map(torch.isfinite, tops)):
                raise ValueError(f"query, key or value of {node.name} holds NaN or infinity")
            found[node] = (torch.stack(tops) / 127).clamp(min=_LEAST)

    lockstep.run(visit)
    return found


def _top(lockstep: Lockstep, node: fx.Node) -> Tensor:
    """The largest magnitude of [B, H, N, D] over all batches."""
    tops = []
    for index, value in enumerate(lockstep.values(node)):
        tokens = value.float().transpose(1, 2)
        mask = lockstep.mask(node, index, axis=2)
        kept = tokens if mask is None else tokens[mask]
        if kept.numel():
            tops.append(kept.abs().amax())
    return torch.stack(tops).amax() if tops else torch.zeros(())


def in_integers(program: Program, node: fx.Node, scales: Tensor | None) -> None:
    """Let an attention multiply integers, with fixed scales [3] or those of each token.

    before:  %y = attention(%q, %k, %v, key_mask=%mask)
    after:   %y = int8_attention(%q, %k, %v, key_mask=%mask, ranges=@ranges)
    """
    given = arguments(node)
    del given["sinks"]
    if scales is not None:
        given["ranges"] = program.add_weight(f"{node.name}_ranges", scales)
    positional = [given.pop(name) for name in _OPERANDS]
    defaults = {item.name: item.default_value for item in int8_attention._schema.arguments}
    options = {name: value for name, value in given.items() if value is not None and value != defaults[name]}
    program.replace(node, program.call(int8_attention, *positional, before=node, **options))
