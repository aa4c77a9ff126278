"""Factors of channels that the linear layer behind an attention's values applies, where its weights are integers.

Attention is linear in its values: what multiplies a channel of its result may as well multiply that channel of the
values, which are an integer product times a scale for each channel. So SmoothQuant's factors of the layer that reads
attention cost nothing, though no norm stands before it that they could be folded into (Xiao et al., 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import Program, arguments, shape
from ..ops.attention import attention
from ..ops.quantize import int8_linear

aten = torch.ops.aten


def absorb(program: Program) -> int:
    """Let int8 linears apply the factors that an attention's result is multiplied with. How many.

    What is read by others too stays, and so do values that several query heads share: each has factors of its own.

    before:  %v = fxpress.int8_linear(%q, %s, %z, @w, @scale, @b);  %y = fxpress.attention(..., heads(%v))
             %m = aten.mul(joined(%y), @factors)
    after:   %v = fxpress.int8_linear(%q, %s, %z, @w, @scale * @factors, @b * @factors)
             %m = joined(fxpress.attention(..., heads(%v)))
    """
    count = 0
    for node in program.calls(aten.mul.Tensor):
        linear = _behind(node)
        if linear is None:
            continue
        given = arguments(linear)
        factors: Any = node.args[1]
        values = program.tensor(factors).detach()
        scale = program.tensor(given["weight_scale"]).detach() * values[:, None]
        new = {"weight_scale": program.add_weight(f"{factors.target}_scale", scale, trainable=False)}
        if given["bias"] is not None:
            bias = program.tensor(given["bias"])
            name = f"{factors.target}_bias"
            new["bias"] = program.add_weight(name, bias.detach() * values, trainable=bias.requires_grad)
        program.replace(linear, program.call_again(linear, **new))
        program.replace(node, node.args[0])  # type: ignore[arg-type]
        count += 1
    program.clean()
    return count


def _behind(node: fx.Node) -> fx.Node | None:
    """The linear whose channels are those that a multiplication scales, if it is that of an attention's values."""
    factors = node.args[1]
    if not isinstance(factors, fx.Node) or factors.op != "get_attr" or shape(factors) != shape(node)[-1:]:
        return None
    joined = _alone(node.args[0], aten.reshape.default)
    tokens = _alone(joined and joined.args[0], aten.transpose.int)  # [B, N, H, E]
    attended = _alone(tokens and tokens.args[0], attention)
    if joined is None or tokens is None or attended is None or not _is_joined(tokens, joined):
        return None
    heads = _alone(arguments(attended)["value"], aten.transpose.int)
    tokens = _alone(heads and heads.args[0], aten.reshape.default)
    linear = _alone(tokens and tokens.args[0], int8_linear)
    if heads is None or tokens is None or linear is None or not _is_joined(tokens, linear):
        return None
    if not (_turns(joined.args[0]) and _turns(heads)) or shape(heads)[1] != shape(attended)[1]:
        return None
    given = arguments(linear)
    stored = [item for item in (given["weight_scale"], given["bias"]) if item is not None]
    return linear if all(item.op == "get_attr" for item in stored) and shape(stored[0])[-1] == 1 else None


def _alone(node: Any, target: Any) -> fx.Node | None:
    """A node, if it calls a target and is one argument of one reader; sizes may be read by others."""
    if not isinstance(node, fx.Node) or node.target is not target:
        return None
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    return node if len(readers) == 1 and [*arguments(readers[0]).values()].count(node) == 1 else None


def _is_joined(tokens: fx.Node, joined: fx.Node) -> bool:
    """Whether a tensor's last axis is the last two of [B, N, H, E]."""
    *_, heads, size = shape(tokens)
    return bool(shape(joined)[-1] == heads * size)


def _turns(node: Any) -> bool:
    """Whether a transpose exchanges tokens and heads."""
    return len(shape(node)) == 4 and {axis % 4 for axis in node.args[1:3]} == {1, 2}
