"""Aligning tokens: rows are copied only where a sample begins with padding."""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor
from torch.onnx.ops import symbolic

from .functions import DOMAIN
from .lowering import Lowering

_FXPRESS = Opset(DOMAIN, 1)


def _align_tokens(input: Tensor, key_mask: Tensor, back: bool = False) -> Tensor:
    """fxpress::AlignTokens on [B, H, N, D], or on [B, N] as [B, 1, N, 1]."""
    rows = input if input.dim() == 4 else input[:, None, :, None]
    found = symbolic(f"{DOMAIN}::{AlignTokens.name}", (rows, key_mask, torch.tensor([-1 if back else 1])), {},
                     dtype=input.dtype, shape=rows.shape, version=1)  # fmt: skip
    return found if input.dim() == 4 else found.reshape(input.shape)


@script(_FXPRESS, default_opset=op)
def AlignTokens(rows, key_mask, sign):  # type: ignore[no-untyped-def]
    """`sign` is 1, or -1 to undo it."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    first = op.ArgMax(op.Cast(key_mask, to=6), axis=1)  # [B, 1]
    if op.Squeeze(op.ReduceMax(first, keepdims=0) > 0):
        length = op.Shape(rows, start=2, end=3)
        heads = op.Shape(rows, start=0, end=1) * op.Shape(rows, start=1, end=2)
        begin = op.Squeeze(zero)
        every = op.Range(begin, op.Squeeze(length), op.Squeeze(one))
        place = op.Mod(every + first * sign + length, length)  # [B, N]
        shape = op.Shape(rows, start=0, end=3)
        wide = op.Reshape(op.Expand(op.Unsqueeze(place, one), shape), op.Concat(last, length, axis=0))
        number = op.Unsqueeze(op.Range(begin, op.Squeeze(heads), op.Squeeze(one)), one)
        flat = op.Reshape(rows, op.Concat(last, op.Shape(rows, start=3), axis=0))
        result = op.Reshape(op.Gather(flat, op.Reshape(wide + number * length, last), axis=0), op.Shape(rows))
    else:
        result = op.Identity(rows)
    return result


ALIGN_TOKENS = (Lowering("Gather where there is padding before", _align_tokens, standard=False),)
FUNCTIONS = (AlignTokens,)
