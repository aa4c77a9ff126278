"""Attention within a window with global tokens, in blocks: those of `banded`, whose keys begin with the global ones.

A block holds queries of one residue of the dilation: those at r, r + dilation, r + 2 dilation, ...
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor
from torch.onnx.ops import symbolic

from .banded import block_size
from .functions import DOMAIN
from .lowering import Lowering, scaled

_FXPRESS = Opset(DOMAIN, 1)


def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    globals: int = 0,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """fxpress::WindowAttention on [B, N, H * D]."""
    batch, heads, length, _ = query.shape
    query, scale = scaled(query, scale)
    size, span = block_size(left + right), left + right
    rows, columns = torch.arange(size), torch.arange(size + span) - left
    distance = columns[None, :] - rows[:, None]
    keys = torch.ones((batch, length), dtype=torch.bool) if key_mask is None else key_mask
    tokens = [item.transpose(1, 2).reshape(*item.shape[::2], -1) for item in (query, key, value)]
    result = symbolic(
        f"{DOMAIN}::{WindowAttention.name}",
        (*tokens, keys, rows, columns, (distance >= -left) & (distance <= right), torch.arange(globals),
         torch.tensor([dilation]), torch.tensor(causal)),
        {
            "left": left, "right": right, "least": 2 * dilation * (size + span),
            "q_num_heads": heads, "kv_num_heads": key.shape[1],
            "scale": scale, "softcap": softcap,
        },
        dtype=query.dtype,
        shape=(batch, length, heads * value.shape[3]),
        version=1,
    )  # fmt: skip
    return result.reshape(batch, length, heads, value.shape[3]).transpose(1, 2)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def WindowAttention(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, rows, columns, band, ranks, dilation, causal,
    left: int, right: int, least: int, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float,
):  # fmt: skip
    """rows [size], columns [width] (from -left on) and band [size, width] describe one block; ranks are 0, 1, ... of
    the global tokens."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    length = op.Shape(query, start=1, end=2)
    first = op.ArgMax(op.Cast(key_mask, to=6), axis=1)  # [B, 1], of the tokens that may be seen
    count = op.Shape(ranks)
    wanted = first + op.Unsqueeze(ranks, zero)  # [B, globals]
    globals = op.Min(wanted, length - one)
    index = op.Unsqueeze(globals, last)
    seen = op.And(wanted < length, op.GatherND(key_mask, index, batch_dims=1))
    every = op.Unsqueeze(op.Range(op.Squeeze(zero), op.Squeeze(length), op.Squeeze(one)), zero)
    is_global = op.And(every >= first, every < first + count)  # [B, N]
    if op.Squeeze(length > op.Constant(value_int=least)):
        size = op.Shape(rows)
        step = size * dilation
        turns = (length + step - one) / step
        number = op.Unsqueeze(op.Range(op.Squeeze(zero), op.Squeeze(turns * dilation), op.Squeeze(one)), one)
        starts = (number / dilation) * step + op.Mod(number, dilation)  # [blocks, 1]
        places = starts + columns * dilation
        inside = op.And(places >= zero, places < length)
        places = op.Max(op.Min(places, length - one), zero)
        own = starts + rows * dilation
        blocks = op.Gather(query, op.Min(own, length - one), axis=1)
        ordinary = op.And(key_mask, op.Not(is_global))
        visible = op.And(op.Gather(ordinary, places, axis=1), inside)
        local = op.And(op.Unsqueeze(visible, [2]), band)  # [B, blocks, size, width]
        late = op.And(causal, op.Unsqueeze(globals, [1, 2]) > op.Unsqueeze(own, [0, 3]))  # [B, blocks, size, globals]
        heads = op.And(op.Unsqueeze(seen, [1, 2]), op.Not(late))
        mask = op.Concat(heads, local, axis=3)
        many = op.Concat(one, op.Shape(places, start=0, end=1), one, one, axis=0)
        keys = op.Concat(op.Expand(op.Unsqueeze(op.GatherND(key, index, batch_dims=1), one), many),
                         op.Gather(key, places, axis=1), axis=2)  # fmt: skip
        values = op.Concat(op.Expand(op.Unsqueeze(op.GatherND(value, index, batch_dims=1), one), many),
                           op.Gather(value, places, axis=1), axis=2)  # fmt: skip
        found = op.Attention(
            op.Reshape(blocks, op.Concat(last, op.Shape(blocks, start=2), axis=0)),
            op.Reshape(keys, op.Concat(last, op.Shape(keys, start=2), axis=0)),
            op.Reshape(values, op.Concat(last, op.Shape(values, start=2), axis=0)),
            op.Reshape(mask, op.Concat(last, one, op.Shape(mask, start=2), axis=0)),
            q_num_heads=q_num_heads,
            kv_num_heads=kv_num_heads,
            scale=scale,
            softcap=softcap,
        )
        joined = op.Concat(op.Shape(query, start=0, end=1), last, op.Shape(found, start=2), axis=0)
        inner = op.Squeeze(every, zero) / dilation
        turn = inner / size
        place = (turn * dilation + op.Mod(op.Squeeze(every, zero), dilation)) * size + op.Mod(inner, size)
        local_rows = op.Gather(op.Reshape(found, joined), place, axis=1)
        if op.Or(op.Squeeze(count == zero), causal):  # the rows of global tokens are like the others
            result = op.Identity(local_rows)
        else:
            shown = op.Unsqueeze(op.Unsqueeze(key_mask, one), one)  # [B, 1, 1, N]
            grid = op.Concat(one, one, count, one, axis=0)
            full = op.Attention(
                op.GatherND(query, index, batch_dims=1),
                key,
                value,
                op.Expand(shown, grid),
                q_num_heads=q_num_heads,
                kv_num_heads=kv_num_heads,
                scale=scale,
                softcap=softcap,
            )
            spots = op.Expand(index, op.Shape(full))
            result = op.ScatterElements(local_rows, spots, full, axis=1)
    else:
        distance = every - op.Transpose(every, perm=[1, 0])  # j - i, [N, N]
        steps = distance / dilation
        reached = op.And(steps >= op.Neg(op.Constant(value_int=left)), steps <= op.Constant(value_int=right))
        banded = op.And(op.Mod(distance, dilation) == zero, reached)
        joint = op.Or(op.Unsqueeze(is_global, one), op.Unsqueeze(is_global, last))
        allowed = op.And(op.Or(banded, joint), op.Unsqueeze(key_mask, one))
        full_mask = op.Unsqueeze(op.And(allowed, op.Not(op.And(causal, distance > zero))), one)
        result = op.Attention(
            query, key, value, full_mask, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale,
            softcap=softcap,
        )  # fmt: skip
    return result


WINDOW_ATTENTION = (Lowering("Attention by blocks with global tokens", _window_attention, standard=False),)
FUNCTIONS = (WindowAttention,)
