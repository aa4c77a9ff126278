"""Tables of key blocks for attention by blocks, in exact integers as `ir.ops.block_attention` defines them.

They are written in ONNX, not in torch: traced, the number of blocks of a short example would become a constant.
"""

from __future__ import annotations

import math

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor
from torch.onnx.ops import symbolic

from ....ir.ops.block_attention import generator_hashes, mixed_seed, table_rows
from .functions import DOMAIN
from .lowering import Lowering

_FXPRESS = Opset(DOMAIN, 1)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def RealBlocks(key_mask, block: int):  # type: ignore[no-untyped-def]
    """key_mask [B, N] -> the blocks up to each sample's last key, at least one, [B, 1, 1]."""
    one = op.Constant(value_ints=[1])
    length = op.Shape(key_mask, start=1, end=2)
    place = op.Range(op.Squeeze(one), op.Squeeze(length + one), op.Squeeze(one))
    last = op.ReduceMax(op.Where(key_mask, place, one), one)
    return op.Unsqueeze((last + block - one) / block, one)


@script(_FXPRESS, default_opset=op)
def HashedWith(value, number):  # type: ignore[no-untyped-def]
    """One more number taken into a hash."""
    prime = op.Constant(value_int=2147483647)
    mixed = op.Mod(value + number, prime)
    square = op.Mod(mixed * mixed, prime)
    fifth = op.Mod(op.Mod(square * square, prime) * mixed, prime)
    return op.Mod(fifth * op.Constant(value_int=1103515245) + op.Constant(value_int=12345), prime)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def RandomBlocks(  # type: ignore[no-untyped-def]
    key_mask, block: int, window: int, before: int, outer: int, random: int, start: int, causal: int
):
    """`before` blocks of the window stand before the row's own; `outer` are the first and last ones that all see."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    none = op.Constant(value_ints=[-1])
    step = op.Squeeze(one)
    begin = op.Squeeze(zero)
    real = RealBlocks(key_mask, block)
    batch, length = op.Shape(key_mask, start=0, end=1), op.Shape(key_mask, start=1, end=2)
    blocks = (length + block - one) / block + one
    row = op.Unsqueeze(op.Range(begin, op.Squeeze(blocks), step), one)
    around = row - before + op.Range(begin, window, step)
    first = op.Range(begin, outer, step)
    column = op.Range(begin, op.Squeeze(blocks) + random, step)
    far = column >= outer
    low = row - before
    if op.Cast(causal, to=9):
        ends = op.Expand(first, op.Concat(batch, one, one, axis=0))
        other = op.And(far, op.And(column < low, real > zero))
        full = op.Expand(op.Cast(none, to=7), op.Concat(batch, zero, axis=0))
    else:
        ends = op.Concat(op.Expand(first, op.Concat(batch, one, one, axis=0)), real - one - first, axis=2)
        other = op.And(op.And(far, column < real - outer), op.Or(column < low, column >= low + window))
        full = op.Squeeze(op.Where(ends < real, ends, none), one)
    places = op.Constant(value_int=4194304)
    most = op.Constant(value_int=4611686018427387904)
    order = op.Where(other, HashedWith(HashedWith(start, row), column) * places + column, most)
    least, _ = op.TopK(order, random * one, largest=0)
    chosen = op.Where(least < most, op.Mod(least, places), none)
    table = op.Concat(
        op.Expand(around, op.Concat(batch, one, one, axis=0)),
        op.Expand(ends, op.Concat(one, blocks, one, axis=0)),
        op.Expand(chosen, op.Concat(batch, one, one, axis=0)),
        axis=2,
    )
    known = op.And(op.And(table >= zero, table < real), row < real)
    return op.Unsqueeze(op.Where(known, table, none), one), full


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def ExpanderBlocks(key_mask, hashes, block: int, hubs: int):  # type: ignore[no-untyped-def]
    """`hashes` [degree / 2] choose the steps from a block to its neighbours."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    none = op.Constant(value_ints=[-1])
    real = RealBlocks(key_mask, block)
    batch, length = op.Shape(key_mask, start=0, end=1), op.Shape(key_mask, start=1, end=2)
    blocks = (length + block - one) / block + one
    row = op.Unsqueeze(op.Range(op.Squeeze(zero), op.Squeeze(blocks), op.Squeeze(one)), one)
    first = op.Range(op.Squeeze(zero), hubs, op.Squeeze(one))
    steps = hashes * (real - one) / op.Constant(value_int=2147483647) + one
    table = op.Concat(
        op.Expand(row, op.Concat(batch, one, one, axis=0)),
        op.Mod(row + steps, real),
        op.Mod(row - steps + real, real),
        op.Expand(first, op.Concat(batch, blocks, one, axis=0)),
        axis=2,
    )
    known = op.And(table < real, row < real)
    full = op.Where(first < op.Squeeze(real, one), first, none)
    return op.Unsqueeze(op.Where(known, table, none), one), full


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def CutBlocks(x, size: int, before: int):  # type: ignore[no-untyped-def]
    """`before` zeros, then the tokens of [B, H, N, D], then zeros: [B, H, blocks + 1, size, D]."""
    one = op.Constant(value_ints=[1])
    length = op.Shape(x, start=2, end=3)
    blocks = (length + size - one) / size + one
    after = blocks * size - length - before
    whole = op.Pad(x, op.Concat(one * before, after, axis=0), None, op.Constant(value_ints=[2]))
    cut = op.Concat(op.Shape(x, start=0, end=2), blocks, one * size, op.Shape(x, start=3), axis=0)
    return op.Reshape(whole, cut)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def BlockMeans(x, real, size: int, before: int, similarity: float):  # type: ignore[no-untyped-def]
    """Of the real tokens of each block: mean [B, H, blocks, D], and whether they are less alike than `similarity`.

    x [B, H, N, D], real [B, 1, N, 1] of numbers 0 and 1. `before`: how many tokens earlier the blocks begin.
    """
    axis = op.Constant(value_ints=[3])
    last = op.Constant(value_ints=[-1])
    mask = CutBlocks(real, size, before)
    blocks = CutBlocks(x, size, before) * mask
    count = op.Max(op.ReduceSum(mask, axis, keepdims=0), op.CastLike(op.Constant(value_float=1.0), x))
    mean = op.ReduceSum(blocks, axis, keepdims=0) / count
    if similarity > op.Constant(value_float=0.0):
        sizes = op.Max(op.ReduceL2(blocks, last), op.CastLike(op.Constant(value_float=1e-12), x))
        direction = op.ReduceSum(blocks / sizes, axis, keepdims=0) / count
        unlike = op.ReduceSumSquare(direction, last, keepdims=0) < op.CastLike(similarity, x)
    else:  # a square is not less
        unlike = op.Expand(op.Cast(op.Constant(value_int=0), to=9), op.Shape(mean, start=0, end=3))
    return mean, unlike


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def AnyReal(real, size: int):  # type: ignore[no-untyped-def]
    """real [B, 1, N, 1] -> whether each block has a real token, [B, 1, blocks]."""
    return op.Cast(op.ReduceMax(CutBlocks(real, size, 0), op.Constant(value_ints=[3, 4]), keepdims=0), to=9)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def DynamicBlocks(  # type: ignore[no-untyped-def]
    query,
    key,
    key_mask,
    rows: int,
    block: int,
    before: int,
    top_k: int,
    mass: float,
    similarity: float,
    causal: int,
    scale: float,
):
    """Either `top_k` or `mass` is above 0; row blocks are chosen for by the tokens from `before` earlier on."""
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    middle = op.Constant(value_ints=[1, 3])
    length = op.Shape(query, start=2, end=3)
    real = op.CastLike(op.Unsqueeze(key_mask, middle), query)
    begin = op.Squeeze(zero)
    start = op.Unsqueeze(op.Range(begin, op.Squeeze(length + rows), rows), one)
    first = op.Range(begin, op.Squeeze(length + block), block)
    some = op.And(
        op.Unsqueeze(AnyReal(real, rows), op.Constant(value_ints=[3])), op.Unsqueeze(AnyReal(real, block), two)
    )
    if op.Cast(causal, to=9):
        allowed = op.And(some, first < start + rows)
        weighed = op.And(some, first + block <= start)
    else:
        allowed = op.Identity(some)
        weighed = op.Identity(some)
    row_mean, row_unlike = BlockMeans(query, real, rows, before, similarity)
    key_mean, key_unlike = BlockMeans(key, real, block, 0, similarity)
    # The heads of a group beside each other: [B, G, H / G, row blocks, D] over [B, G, 1, blocks, D].
    cut = op.Concat(op.Shape(key, start=0, end=2), last, op.Shape(row_mean, start=2), axis=0)
    raw = op.MatMul(op.Reshape(row_mean, cut), op.Transpose(op.Unsqueeze(key_mean, two), perm=[0, 1, 2, 4, 3]))
    shape = op.Concat(op.Shape(query, start=0, end=2), op.Shape(raw, start=3), axis=0)
    low = op.CastLike(op.Constant(value_float=-1e30), query)
    scores = op.Where(weighed, op.Reshape(raw, shape) * op.CastLike(scale, query), low)
    weights = op.Softmax(scores) * op.CastLike(weighed, query)
    blocks = op.Shape(first)
    if top_k > 0:
        ordered, order = op.TopK(weights, op.Min(blocks, one * top_k))
        within = ordered >= op.CastLike(op.Constant(value_float=0.0), query)
    else:
        ordered, order = op.TopK(weights, blocks)
        within = op.CumSum(ordered, last, exclusive=1) < op.CastLike(mass, query)
    none = op.Expand(op.Cast(zero, to=2), shape)
    chosen = op.ScatterElements(none, order, op.Cast(within, to=2), axis=3)
    by_key = op.Expand(
        op.Unsqueeze(key_unlike, two), op.Concat(op.Shape(key, start=0, end=2), one, op.Shape(first), axis=0)
    )
    groups = op.Shape(key, start=1, end=2)
    per_group = op.Shape(query, start=1, end=2) / groups
    pairs = op.Concat(op.Shape(key, start=0, end=2), per_group, op.Shape(first), axis=0)
    key_heads = op.Reshape(
        op.Expand(by_key, pairs), op.Concat(op.Shape(query, start=0, end=2), one, op.Shape(first), axis=0)
    )
    own = op.Or(op.And(first < start + rows, first + block > start), first == zero)
    alike = op.Or(key_heads, op.Unsqueeze(row_unlike, op.Constant(value_ints=[3])))
    kept = op.And(op.Or(op.Or(op.And(op.Cast(chosen, to=9), weighed), own), alike), allowed)
    # Each to the place that its number among the kept has; what is not kept to the last one, which is always free.
    number = op.Range(begin, op.Squeeze(blocks), op.Squeeze(one))
    place = op.Where(kept, op.CumSum(op.Cast(kept, to=7), last, exclusive=1), blocks - one)
    return op.ScatterElements(op.Expand(last, shape), place, op.Where(kept, number, last), axis=3)


FUNCTIONS = (RealBlocks, HashedWith, RandomBlocks, ExpanderBlocks, CutBlocks, BlockMeans, AnyReal, DynamicBlocks)


def _mask(query: Tensor, key_mask: Tensor | None) -> Tensor:
    """The key mask, which also tells the sizes of batch and sequence."""
    return torch.ones((query.shape[0], query.shape[2]), dtype=torch.bool) if key_mask is None else key_mask


def _random_blocks(
    query: Tensor,
    key_mask: Tensor | None = None,
    block: int = 64,
    window: int = 3,
    globals: int = 1,
    random: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    sides = 1 if causal else 2
    width = window + sides * globals + random
    table, full = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{RandomBlocks.name}",
        (_mask(query, key_mask),),
        {
            "block": block,
            "window": window,
            "before": window - 1 if causal else window // 2,
            "outer": globals,
            "random": random,
            "start": mixed_seed(seed),
            "causal": int(causal),
        },
        dtypes=(torch.int64, torch.int64),
        shapes=(
            (query.shape[0], 1, table_rows(query.shape[2], block), width),
            (query.shape[0], 0 if causal else 2 * globals),
        ),
        version=1,
    )
    return table, full


def _expander_blocks(
    query: Tensor, key_mask: Tensor | None = None, block: int = 64, degree: int = 8, hubs: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    table, full = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{ExpanderBlocks.name}",
        (_mask(query, key_mask), generator_hashes(seed, degree)),
        {"block": block, "hubs": hubs},
        dtypes=(torch.int64, torch.int64),
        shapes=((query.shape[0], 1, table_rows(query.shape[2], block), 1 + degree + hubs), (query.shape[0], hubs)),
        version=1,
    )
    return table, full


def _dynamic_blocks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None = None,
    rows: int = 64,
    block: int = 64,
    top_k: int = 0,
    mass: float = 0.0,
    similarity: float = -1.0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    batch, heads, length, size = query.shape
    wide = [
        torch.ops.aten._to_copy.default(item, dtype=torch.float32) if item.dtype == torch.float16 else item
        for item in (query, key)
    ]
    return symbolic(
        f"{DOMAIN}::{DynamicBlocks.name}",
        (*wide, _mask(query, key_mask)),
        {
            "rows": rows,
            "block": block,
            "before": rows - 1 if causal else 0,
            "top_k": top_k,
            "mass": mass if mass < 1 else 2.0,
            "similarity": similarity,
            "causal": int(causal),
            "scale": 1 / math.sqrt(size) if scale is None else scale,
        },
        dtype=torch.int64,
        shape=(batch, heads, table_rows(length, rows), table_rows(length, block)),
        version=1,
    )


RANDOM_BLOCKS = (Lowering("Random blocks by hashes", _random_blocks, standard=False),)
EXPANDER_BLOCKS = (Lowering("Blocks of an expander graph", _expander_blocks, standard=False),)
DYNAMIC_BLOCKS = (Lowering("Blocks by their means", _dynamic_blocks, standard=False),)
