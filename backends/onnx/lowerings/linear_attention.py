"""Linear attention: two matmuls over all keys; in blocks where it is causal or has a window.

A block of queries meets the keys of its own block, or of that and its neighbours, one by one, and those further away as
running sums of key_features^T value over whole blocks. Values have one more column, of ones, whose sum is the
denominator.
"""

from __future__ import annotations

import math

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments
from ....ir.ops.attention import cast
from .functions import DOMAIN
from .lowering import Lowering

_FXPRESS = Opset(DOMAIN, 1)
_SMALLEST_SUM = 1e-20
_BLOCK = 64  # tokens, without a window


def _sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gain: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int = 0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """query_features (key_features^T value); the heads of a group are rows of one matmul."""
    batch, heads, length, _ = query.shape
    groups = key.shape[1]
    if key_mask is not None:
        key_features = key_features * cast(key_mask, key_features.dtype)[:, None, :, None]
    rows = query_features
    if groups != heads:
        rows = rows.reshape(batch, groups, heads // groups * length, rows.shape[3])
    columns = key_features.transpose(-1, -2)
    sums = rows @ columns.sum(-1, keepdim=True)
    result = (rows @ (columns @ value)) / sums.clamp(min=_SMALLEST_SUM)
    return result.reshape(batch, heads, length, value.shape[3])


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gain: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int = 0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """fxpress::WindowedLinearAttention, or fxpress::CausalLinearAttention where there is no window."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups != 1:
        key, value, key_features = (item.repeat_interleave(groups, 1) for item in (key, value, key_features))
    size, reach = (window, 1) if window else (_BLOCK, 0)
    before, after = torch.tensor(-reach), torch.tensor(0 if causal else reach)
    offsets = torch.arange(-reach, 1 if causal else reach + 1)
    distance = torch.arange(len(offsets) * size)[None, :] - reach * size - torch.arange(size)[:, None]
    allowed = distance <= (0 if causal else 2 * size)
    seen = torch.ones((batch, length), dtype=torch.bool) if key_mask is None else key_mask
    shown = cast(seen, value.dtype)[:, None, :, None]
    shared = (query_features, key_features * shown, torch.cat([value * shown, shown.expand(-1, heads, -1, -1)], -1))
    constants = (torch.tensor([size]), before.reshape(1), after.reshape(1), torch.tensor(causal))
    tensors: tuple[Tensor, ...] = (*shared, *constants, cast(allowed, value.dtype))
    if window:
        factor = 1 / math.sqrt(width) if scale is None else scale
        weight = torch.ones(1) if gain is None else torch.exp(gain)
        hidden = torch.where(allowed, torch.zeros((), dtype=value.dtype), -4e30)
        tensors = (*shared, *constants, offsets, hidden, query * factor, key, seen,
                   weight.reshape(1, -1, 1, 1, 1))  # fmt: skip
    function = WindowedLinearAttention if window else CausalLinearAttention
    return symbolic(f"{DOMAIN}::{function.name}", tensors, {}, dtype=value.dtype,
                    shape=(batch, heads, length, value.shape[3]), version=1)  # fmt: skip


@script(_FXPRESS, default_opset=op)
def InBlocks(tensor, size):  # type: ignore[no-untyped-def]
    """[B, H, N, X] as [B, H, blocks, size, X], the last block filled with zeros."""
    zero = op.Constant(value_ints=[0])
    length = op.Shape(tensor, start=2, end=3)
    fill = op.Mod(size - op.Mod(length, size), size)
    padded = op.Pad(tensor, op.Concat(zero, fill, axis=0), None, op.Constant(value_ints=[2]))
    shape = op.Concat(op.Shape(tensor, start=0, end=2), op.Constant(value_ints=[-1]), size,
                      op.Shape(tensor, start=3), axis=0)  # fmt: skip
    return op.Reshape(padded, shape)


@script(_FXPRESS, default_opset=op)
def Neighbours(blocks, offsets):  # type: ignore[no-untyped-def]
    """[B, H, blocks, size, X] as [B, H, blocks, offsets * size, X]: each block's neighbours, zeros beyond the ends."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    count = op.Shape(blocks, start=2, end=3)
    places = op.Unsqueeze(op.Range(op.Squeeze(zero), op.Squeeze(count), op.Squeeze(one)), one) + offsets
    inside = op.CastLike(op.And(places >= zero, places < count), blocks)
    found = op.Gather(blocks, op.Max(op.Min(places, count - one), zero), axis=2)
    found = found * op.Unsqueeze(inside, [2, 3])
    shape = op.Concat(op.Shape(blocks, start=0, end=3), op.Constant(value_ints=[-1]), op.Shape(blocks, start=4), axis=0)
    return op.Reshape(found, shape)


@script(_FXPRESS, default_opset=op)
def FarSums(query_features, key_features, values, before, after, causal):  # type: ignore[no-untyped-def]
    """What blocks see of all blocks more than `before` (negative) and `after` away: [B, H, blocks, size, E + 1]."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    axis = op.Constant(value_int=2)
    states = op.MatMul(op.Transpose(key_features, perm=[0, 1, 2, 4, 3]), values)  # [B, H, blocks, M, E + 1]
    count = op.Shape(states, start=2, end=3)
    block = op.Range(op.Squeeze(zero), op.Squeeze(count), op.Squeeze(one))
    empty = op.Slice(states, zero, one, op.Constant(value_ints=[2])) * 0.0
    earlier = op.Concat(empty, op.CumSum(states, axis), axis=2)  # the t-th: of blocks before t
    known = op.Gather(earlier, op.Max(block + before, zero), axis=2)
    if causal:
        sums = op.MatMul(query_features, known)
    else:
        later = op.Concat(op.CumSum(states, axis, reverse=1), empty, axis=2)  # of blocks from t on
        sums = op.MatMul(query_features, known + op.Gather(later, op.Min(block + after + one, count), axis=2))
    return sums


@script(_FXPRESS, default_opset=op)
def Quotient(sums, like):  # type: ignore[no-untyped-def]
    """[B, H, blocks, size, E + 1] as [B, H, N, E], divided by the last column."""
    last = op.Constant(value_ints=[-1])
    zero = op.Constant(value_ints=[0])
    top = op.Slice(sums, zero, last, last)
    bottom = op.Max(op.Slice(sums, last, op.Constant(value_ints=[2147483647]), last), 1e-20)
    shape = op.Concat(op.Shape(sums, start=0, end=2), last, op.Shape(top, start=4), axis=0)
    return op.Slice(op.Reshape(top / bottom, shape), zero, op.Shape(like, start=2, end=3), op.Constant(value_ints=[2]))


@script(_FXPRESS, default_opset=op)
def CausalLinearAttention(  # type: ignore[no-untyped-def]
    query_features, key_features, values, size, before, after, causal, allowed
):
    """The keys of a block itself one by one, those of earlier blocks as sums."""
    queries = InBlocks(query_features, size)
    keys = InBlocks(key_features, size)
    rows = InBlocks(values, size)
    weights = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 2, 4, 3])) * allowed
    result = Quotient(op.MatMul(weights, rows) + FarSums(queries, keys, rows, before, after, causal), values)
    return result


@script(_FXPRESS, default_opset=op)
def WindowedLinearAttention(  # type: ignore[no-untyped-def]
    query_features, key_features, values, size, before, after, causal, offsets, hidden, query, key, seen, gain
):
    """`hidden` [size, offsets * size] is added to scores: what causality hides of the neighbouring blocks."""
    queries = InBlocks(query_features, size)
    keys = InBlocks(key_features, size)
    rows = InBlocks(values, size)
    shown = InBlocks(op.Unsqueeze(op.Cast(seen, to=1), [1, 3]), size)
    absent = (op.Transpose(Neighbours(shown, offsets), perm=[0, 1, 2, 4, 3]) - 1.0) * 1e30
    exact = Neighbours(InBlocks(key, size), offsets)
    scores = op.MatMul(InBlocks(query, size), op.Transpose(exact, perm=[0, 1, 2, 4, 3])) + (hidden + absent)
    # Where nothing is near, the absent keys win over the hidden ones, and their values, the ones too, are zeros.
    near = op.MatMul(op.Softmax(scores, axis=-1), Neighbours(rows, offsets))
    result = Quotient(near + FarSums(queries, keys, rows, before, after, causal) * gain, values)
    return result


def _refuses_sums(node: fx.Node) -> str | None:
    given = arguments(node)
    return "it is causal or has a window" if given["causal"] or given["window"] else None


def _refuses_blocks(node: fx.Node) -> str | None:
    return None if _refuses_sums(node) else "nothing asks for blocks"


LINEAR_ATTENTION = (
    Lowering("MatMul", _sums, _refuses_sums),
    Lowering("MatMul by blocks", _blocks, _refuses_blocks, standard=False),
)
FUNCTIONS = (InBlocks, Neighbours, FarSums, Quotient, CausalLinearAttention, WindowedLinearAttention)
