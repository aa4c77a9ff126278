"""Attention to the key blocks of a table: time grows with the blocks kept, not with N^2.

    table -> sorted, each block once, cut to the longest row
    row blocks of all batches and heads, a few at a time (Scan):
        gathered blocks of keys and values -> scores + hidden -> softmax -> values
    rows that see every key: one head at a time (Scan), scattered into the result

Sequences too short to gain run in one attention with a mask. A step takes as many row blocks as let its gathered
keys, values and scores stay in the cache, so memory beyond the operands is the result and the table. Blocks are cut in
ONNX, not in torch: traced, their number in a short example would become a constant.
"""

from __future__ import annotations

import torch
from onnxscript import graph, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor
from torch.onnx.ops import symbolic

from .functions import DOMAIN
from .lowering import Lowering, scaled

LEAST = 512  # up to which length one mask is faster
STEP = 2**19  # numbers that one step may hold

_FXPRESS = Opset(DOMAIN, 1)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def SequenceBlocks(x, size: int):  # type: ignore[no-untyped-def]
    """[B, H, N, D] -> [B * H * blocks, size, D], the last block filled with zeros."""
    one = op.Constant(value_ints=[1])
    length = op.Shape(x, start=2, end=3)
    width = op.Shape(x, start=3)
    missing = op.Mod(op.Neg(length), size)
    if op.Squeeze(missing > 0):
        whole = op.Pad(x, op.Concat(op.Constant(value_ints=[0]), missing, axis=0), None, op.Constant(value_ints=[2]))
    else:
        whole = op.Identity(x)
    return op.Reshape(whole, op.Concat(op.Constant(value_ints=[-1]), size * one, width, axis=0))


@script(_FXPRESS, default_opset=op)
def KeptOnce(table, blocks):  # type: ignore[no-untyped-def]
    """Each row's blocks once and in ascending order, then `blocks`, which stands for none; and the number of each row.

    table [..., K] -> [..., longest row], [...]
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    every = op.And(table >= zero, table < blocks)
    column = op.Range(op.Squeeze(one), op.Squeeze(op.Shape(table, start=3) + one), op.Squeeze(one))
    width = op.Reshape(op.ReduceMax(op.Where(every, column, one), keepdims=0), one)  # beyond it there is none
    known = op.Slice(op.Where(every, table, blocks), zero, width, last)
    ascending, _ = op.TopK(known, width, largest=0)
    before = op.Pad(op.Slice(ascending, zero, last, last), op.Constant(value_ints=[1, 0]), last, last)
    once, _ = op.TopK(op.Where(ascending == before, blocks, ascending), width, largest=0)
    counts = op.ReduceSum(op.Cast(once < blocks, to=7), last, keepdims=0)
    longest = op.Max(op.Reshape(op.ReduceMax(counts, keepdims=0), one), one)
    return op.Slice(once, zero, longest, last), counts


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def AttendTo(query, key, value, places, own, scale: float, causal: int):  # type: ignore[no-untyped-def]
    """query [C, R, D], key [C, L, D], value [C, L, E], places [C, 1, L] (of hidden keys 2^30), own [C, R, 1]."""
    raw = op.MatMul(query * op.CastLike(scale, query), op.Transpose(key, perm=[0, 2, 1]))
    low = op.CastLike(op.Constant(value_float=-1e30), query)
    if op.Cast(causal, to=9):
        scores = op.Where(places <= own, raw, low)
        some = op.ReduceMin(places, [2]) <= own
    else:
        hidden = places == op.Cast(op.Constant(value_int=2**30), to=6)
        scores = raw + op.Where(hidden, low, op.CastLike(op.Constant(value_float=0.0), query))
        some = op.ReduceMin(places, [2]) < op.Cast(op.Constant(value_int=2**30), to=6)
    return op.MatMul(op.Softmax(scores), value) * op.CastLike(some, query)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def KeyPlaces(key_mask, size: int):  # type: ignore[no-untyped-def]
    """The place of each key in its sequence, 2^30 where it is hidden; the first row is a block without keys.

    key_mask [B, N] -> int32 [1 + B * blocks, size]
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    length = op.Shape(key_mask, start=1, end=2)
    hidden = op.Cast(op.Constant(value_int=2**30), to=6)
    tokens = op.Cast(op.Range(op.Squeeze(zero), op.Squeeze(length), op.Squeeze(one)), to=6)
    places = op.Where(key_mask, tokens, hidden)
    missing = op.Mod(op.Neg(length), size)
    whole = op.Pad(places, op.Concat(zero, missing, axis=0), hidden, one)
    rows = op.Reshape(whole, op.Concat(op.Constant(value_ints=[-1]), size * one, axis=0))
    return op.Pad(rows, op.Constant(value_ints=[1, 0]), hidden, zero)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def SparseRows(  # type: ignore[no-untyped-def]
    queries, keys, values, places, table, batch, heads, groups, step, rows: int, block: int, scale: float, causal: int
):
    """Every row block over the key blocks of its table, [steps * row blocks a step, rows, E]: at least one is extra.

    queries [B * H * row blocks, rows, D], keys [B * G * blocks, block, D], values [B * G * blocks, block, E],
    places [1 + B * blocks, block], table [B or 1, H or 1, row blocks, K].
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    first = op.Squeeze(zero)
    blocks = op.Shape(keys, start=0, end=1) / (batch * groups)
    per_head = op.Shape(table, start=2, end=3)
    once, counts = KeptOnce(table, blocks)
    width = op.Shape(once, start=3)
    # The row blocks of all batches and heads in one row, and from which key blocks on each of them reads.
    both = op.Concat(batch, heads, per_head, axis=0)
    flat = op.Reshape(op.Expand(once, op.Concat(both, width, axis=0)), op.Concat(last, width, axis=0))
    number = op.Reshape(op.Expand(counts, both), last)
    every = op.Shape(number)
    row = op.Range(first, op.Squeeze(every), op.Squeeze(one))
    head = row / per_head
    from_key = op.Unsqueeze(head / (heads / groups) * blocks, one)
    from_place = op.Unsqueeze(head / heads * blocks + one, one)
    seen = flat < blocks
    # Steps of equal size, and room for one row block more.
    most = op.Max(step / (width * block), one)
    steps = (every + most) / most
    size = (every + steps) / steps
    extra = op.Concat(zero, steps * size - every, axis=0)
    cut = op.Concat(steps, size, width, axis=0)
    key_block = op.Reshape(op.Pad(op.Where(seen, flat + from_key, zero), extra, None, zero), cut)
    place_block = op.Reshape(op.Pad(op.Where(seen, flat + from_place, zero), extra, None, zero), cut)
    numbers = op.Reshape(op.Pad(number, extra), op.Concat(steps, size, axis=0))
    row_block = op.Reshape(op.Pad(row, extra), op.Concat(steps, size, axis=0))
    inside = op.Cast(op.Range(first, rows, op.Squeeze(one)), to=6)

    @graph()
    def Step(step_keys, step_places, step_numbers, step_rows):  # type: ignore[no-untyped-def]
        used = op.Max(op.ReduceMax(step_numbers), one)
        kept = op.Slice(step_keys, zero, used, one)
        shape = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(keys, start=2), axis=0)
        value_shape = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(values, start=2), axis=0)
        visible = op.Gather(places, op.Slice(step_places, zero, used, one))
        start = op.Cast(op.Mod(step_rows, per_head) * rows, to=6)
        return AttendTo(
            op.Gather(queries, step_rows),
            op.Reshape(op.Gather(keys, kept), shape),
            op.Reshape(op.Gather(values, kept), value_shape),
            op.Reshape(visible, op.Constant(value_ints=[0, 1, -1])),
            op.Unsqueeze(op.Unsqueeze(start, one) + inside, op.Constant(value_ints=[2])),
            scale,
            causal,
        )

    found = op.Scan(key_block, place_block, numbers, row_block, body=Step, num_scan_inputs=4)
    return op.Reshape(found, op.Concat(last, op.Shape(found, start=2), axis=0))


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def FullRows(  # type: ignore[no-untyped-def]
    sparse, queries, keys, values, places, full, batch, heads, groups, rows: int, scale: float, causal: int
):
    """`sparse` with the row blocks of `full` [B or 1, F] over every key; its last row block takes those that are none.

    One head a step.
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    first = op.Squeeze(zero)
    pairs = batch * heads
    per_head = op.Shape(queries, start=0, end=1) / pairs
    number = op.Shape(full, start=1)
    known = op.And(full >= zero, full < per_head)
    shape = op.Concat(batch, heads, number, axis=0)
    wanted = op.Reshape(
        op.Expand(op.Unsqueeze(op.Where(known, full, last), one), shape), op.Concat(pairs, number, axis=0)
    )
    pair = op.Range(first, op.Squeeze(pairs), op.Squeeze(one))
    row_block = op.Max(wanted, zero) + op.Unsqueeze(pair * per_head, one)
    head_keys = op.Reshape(keys, op.Concat(batch * groups, last, op.Shape(keys, start=2), axis=0))
    head_values = op.Reshape(values, op.Concat(batch * groups, last, op.Shape(values, start=2), axis=0))
    visible = op.Reshape(
        op.Slice(places, one, op.Shape(places, start=0, end=1), zero), op.Concat(batch, one, last, axis=0)
    )
    inside = op.Cast(op.Range(first, rows, op.Squeeze(one)), to=6)
    own = op.Unsqueeze(op.Cast(wanted * rows, to=6), op.Constant(value_ints=[2])) + inside

    @graph()
    def Head(step_rows, step_own, step_pair):  # type: ignore[no-untyped-def]
        group = op.Unsqueeze(step_pair / op.Squeeze(heads / groups), zero)
        sample = op.Unsqueeze(step_pair / op.Squeeze(heads), zero)
        flat = op.Concat(one, last, op.Shape(queries, start=2), axis=0)
        return AttendTo(
            op.Reshape(op.Gather(queries, step_rows), flat),
            op.Gather(head_keys, group),
            op.Gather(head_values, group),
            op.Gather(visible, sample),
            op.Reshape(step_own, op.Constant(value_ints=[1, -1, 1])),
            scale,
            causal,
        )

    found = op.Scan(row_block, own, pair, body=Head, num_scan_inputs=3)
    whole = op.Reshape(found, op.Concat(last, op.Shape(sparse, start=1), axis=0))
    spare = op.Shape(sparse, start=0, end=1) - one
    places_of = op.Where(wanted < zero, spare, row_block)
    return op.ScatterND(sparse, op.Reshape(places_of, op.Constant(value_ints=[-1, 1])), whole)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def InOneMask(  # type: ignore[no-untyped-def]
    query, key, value, table, full, key_mask, rows: int, block: int, scale: float, causal: int
):
    """Short sequences: one attention whose mask [B, H or 1, N, N] is the table; its rows without keys are zeros."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    no = op.Cast(zero, to=9)
    yes = op.Cast(one, to=9)
    length = op.Shape(query, start=2, end=3)
    blocks = (length + block - one) / block
    per_head = (length + rows - one) / rows
    named = op.Slice(table, zero, per_head, op.Constant(value_ints=[2]))
    known = op.Where(op.And(named >= zero, named < blocks), named, blocks)
    none = op.Expand(no, op.Concat(op.Shape(known, start=0, end=3), blocks + one, axis=0))
    seen = op.ScatterElements(none, known, op.Expand(yes, op.Shape(known)), axis=3)
    known_rows = op.Where(op.And(full >= zero, full < per_head), full, per_head)
    none_full = op.Expand(no, op.Concat(op.Shape(full, start=0, end=1), per_head + one, axis=0))
    every = op.ScatterElements(none_full, known_rows, op.Expand(yes, op.Shape(full)), axis=1)
    token = op.Range(op.Squeeze(zero), op.Squeeze(length), op.Squeeze(one))
    by_row = op.Or(
        op.Gather(seen, token / rows, axis=2),
        op.Unsqueeze(op.Gather(every, token / rows, axis=1), op.Constant(value_ints=[1, 3])),
    )
    visible = op.And(op.Gather(by_row, token / block, axis=3), op.Unsqueeze(key_mask, op.Constant(value_ints=[1, 2])))
    future = op.Not(op.Cast(causal, to=9))
    mask = op.And(visible, op.Or(token <= op.Unsqueeze(token, one), future))
    return op.Attention(query, key, value, mask, scale=scale)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def RowsInSteps(  # type: ignore[no-untyped-def]
    query, key, value, table, full, key_mask, rows: int, block: int, step: int, scale: float, causal: int
):
    """Long sequences: the blocks of the table alone."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    two = op.Constant(value_ints=[2])
    length = op.Shape(query, start=2, end=3)
    batch, heads = op.Shape(query, start=0, end=1), op.Shape(query, start=1, end=2)
    groups = op.Shape(key, start=1, end=2)
    queries = SequenceBlocks(query, rows)
    keys = SequenceBlocks(key, block)
    values = SequenceBlocks(value, block)
    places = KeyPlaces(key_mask, block)
    per_head = (length + rows - one) / rows
    own = op.Slice(table, zero, per_head, two)
    # What a row block adds for each key: its scores twice, the key and the value.
    number = op.Shape(query, start=3) + op.Shape(value, start=3) + rows * two
    most = step / number
    sparse = SparseRows(queries, keys, values, places, own, batch, heads, groups, most, rows, block, scale, causal)
    if op.Squeeze(op.Shape(full, start=1) > zero):
        every = FullRows(sparse, queries, keys, values, places, full, batch, heads, groups, rows, scale, causal)
    else:
        every = op.Identity(sparse)
    count = op.Shape(queries, start=0, end=1)
    shape = op.Concat(batch, heads, op.Constant(value_ints=[-1]), op.Shape(value, start=3), axis=0)
    if op.Squeeze(op.Mod(length, rows) > zero):
        found = op.Slice(op.Reshape(op.Slice(every, zero, count, zero), shape), zero, length, two)
    else:  # one copy less
        found = op.Reshape(op.Slice(every, zero, count, zero), shape)
    return found


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def BlockAttention(  # type: ignore[no-untyped-def]
    query, key, value, table, full, key_mask, rows: int, block: int, least: int, step: int, scale: float, causal: int
):
    """All operands as the operator has them; `full` may have no column."""
    if op.Squeeze(op.Shape(query, start=2, end=3) > least):
        result = RowsInSteps(query, key, value, table, full, key_mask, rows, block, step, scale, causal)
    else:
        result = InOneMask(query, key, value, table, full, key_mask, rows, block, scale, causal)
    return result


FUNCTIONS = (
    SequenceBlocks,
    KeptOnce,
    AttendTo,
    KeyPlaces,
    SparseRows,
    FullRows,
    InOneMask,
    RowsInSteps,
    BlockAttention,
)


def _block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    full: Tensor | None = None,
    key_mask: Tensor | None = None,
    rows: int = 64,
    block: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    kind = query.dtype
    batch, heads, length, _ = query.shape
    query, scale = scaled(query, scale)
    if full is None:
        full = torch.zeros((1, 0), dtype=torch.int64)
    if key_mask is None:
        key_mask = torch.ones((batch, length), dtype=torch.bool)
    operands = [
        torch.ops.aten._to_copy.default(item, dtype=torch.float32) if kind == torch.float16 else item
        for item in (query, key, value)
    ]
    result = symbolic(
        f"{DOMAIN}::{BlockAttention.name}",
        (*operands, table, full, key_mask),
        {
            "rows": rows,
            "block": block,
            "least": LEAST,
            "step": STEP,
            "scale": scale,
            "causal": int(causal),
        },
        dtype=operands[0].dtype,
        shape=(batch, heads, length, value.shape[3]),
        version=1,
    )
    return torch.ops.aten._to_copy.default(result, dtype=kind) if kind == torch.float16 else result


BLOCK_ATTENTION = (Lowering("Attention to blocks of a table", _block_attention, standard=False),)
