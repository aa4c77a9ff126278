"""Hashed attention: each head sorts its tokens and attends chunk by chunk; time and memory grow with N log N.

A Scan over the heads hashes the tokens (MatMul, ArgMax), sorts them (TopK of bucket * N + position: unique integers)
and finds the positions that each chunk reads, in all rounds. A Scan within it takes some chunks at a time, whose keys,
values and scores stay in the cache: rows gathered by position, two batched products, and the sums of exponentials, by
which the rounds are weighted at the end. It is written in ONNX, not in torch: traced, the number of chunks of a short
example would become a constant.
"""

from __future__ import annotations

import torch
from onnxscript import graph, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, shape
from ....ir.ops.attention import ABSORBING
from ....ir.ops.lsh_attention import OWN
from .functions import DOMAIN
from .lowering import Lowering

_FXPRESS = Opset(DOMAIN, 1)
_MICROSOFT = Opset("com.microsoft", 1)


def _by_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: Tensor,
    key_mask: Tensor | None = None,
    chunk: int = 64,
    shared: bool = False,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    if query.dtype == torch.float16:
        query, key, value, rotations = query.float(), key.float(), value.float(), rotations.float()
        return _by_chunks(query, key, value, rotations, key_mask, chunk, shared, causal, scale).half()
    batch, heads, length, size = query.shape
    if key.shape[1] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[1], 1) for tensor in (key, value))
    real = query.new_ones((batch, length), dtype=torch.int64) if key_mask is None else key_mask.to(torch.int64)
    of_causal = CausalSharedHeads if shared else CausalHeads
    function = of_causal if causal else SharedHeads if shared else SeparateHeads
    inputs = [query, key, value, rotations.expand(heads, -1, -1, -1), real, torch.arange(chunk)]
    inputs += [torch.tensor(size**-0.5 if scale is None else scale, dtype=query.dtype)]
    return symbolic(
        f"{DOMAIN}::{function.name}",
        inputs,
        {},
        dtype=query.dtype,
        shape=(batch, heads, length, value.shape[3]),
        version=1,
    )


def refuses(node: fx.Node) -> str | None:
    """Why a node cannot be computed by chunks."""
    given = arguments(node)
    query, key, value = (shape(given[name]) for name in ("query", "key", "value"))
    sizes = (query[1], query[3], key[1], value[3], *shape(given["rotations"]))
    return None if all(isinstance(size, int) for size in sizes) else "the heads have no fixed number and size"


# --- before the heads ----------------------------------------------------------------------------------------------


@script(_FXPRESS, default_opset=op)
def Rotations(rotations, real, inside):  # type: ignore[no-untyped-def]
    """[H, D, rounds, R] -> [B * H, D, rounds, U]: the columns that any sample uses, zero where a sample does not."""
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    size = op.Shape(inside)
    used = (op.ReduceSum(real, one) + size - one) / size
    columns = op.Max(op.Min(op.ReduceMax(used, keepdims=0), op.Shape(rotations, start=3)), one)
    few = op.Slice(rotations, zero, columns, op.Constant(value_ints=[3]))
    index = op.Range(op.Constant(value_int=0), op.Squeeze(columns), op.Constant(value_int=1))
    keep = op.CastLike(op.Less(index, used), rotations)
    each = op.Unsqueeze(few, zero) * op.Unsqueeze(keep, op.Constant(value_ints=[1, 2, 3]))
    return op.Reshape(each, op.Concat(op.Constant(value_ints=[-1]), op.Shape(few, start=1), axis=0))


@script(_FXPRESS, default_opset=op)
def EachHead(tensor):  # type: ignore[no-untyped-def]
    """[B, H, N, D] -> [B * H, N, D]."""
    return op.Reshape(tensor, op.Concat(op.Constant(value_ints=[-1]), op.Shape(tensor, start=2), axis=0))


@script(_FXPRESS, default_opset=op)
def RealTokens(real, query):  # type: ignore[no-untyped-def]
    """[B, N] -> [B * H, N]."""
    wide = op.Expand(op.Unsqueeze(real, op.Constant(value_ints=[1])), op.Shape(query, start=0, end=3))
    return op.Reshape(wide, op.Concat(op.Constant(value_ints=[-1]), op.Shape(real, start=1), axis=0))


# --- the sorted order of one head ------------------------------------------------------------------------------------


@script(_FXPRESS, default_opset=op)
def Buckets(vectors, rotations, real, inside):  # type: ignore[no-untyped-def]
    """[N, D], [D, rounds, U], [N] -> [rounds, N]; 2 U for padding, 0 for all others where one chunk holds them."""
    zero = op.Constant(value_ints=[0])
    flat = op.Reshape(rotations, op.Concat(op.Shape(rotations, start=0, end=1), op.Constant(value_ints=[-1]), axis=0))
    wide = op.Concat(op.Shape(vectors, start=0, end=1), op.Shape(rotations, start=1), axis=0)
    rotated = op.Reshape(op.MatMul(vectors, flat), wide)
    columns = op.Shape(rotations, start=2)
    column = op.ArgMax(op.Abs(rotated), axis=2, keepdims=1)
    negative = op.Cast(op.GatherElements(rotated, column, axis=2) < op.CastLike(zero, rotated), to=7)
    bucket = op.Transpose(op.Squeeze(column + columns * negative, op.Constant(value_ints=[2])), perm=[1, 0])
    several = op.Cast(op.ReduceSum(real) > op.Shape(inside), to=7)
    return op.Where(op.Cast(real, to=9), bucket * several, columns + columns)


@script(_FXPRESS, default_opset=op)
def Positions(rounds):  # type: ignore[no-untyped-def]
    """The numbers of the columns of a tensor [rounds, N], [N]."""
    length = op.Squeeze(op.Shape(rounds, start=1, end=2))
    return op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))


@script(_FXPRESS, default_opset=op)
def Order(bucket):  # type: ignore[no-untyped-def]
    """The position of the token at each place, [rounds, N]."""
    length = op.Shape(bucket, start=1, end=2)
    unique = bucket * length + Positions(bucket)
    ordered, _ = op.TopK(unique, length, axis=1, largest=0, sorted=1)
    return op.Mod(ordered, length)


@script(_FXPRESS, default_opset=op)
def Places(order):  # type: ignore[no-untyped-def]
    """The place of the token at each position, [rounds, N]."""
    return op.ScatterElements(order, order, op.Expand(Positions(order), op.Shape(order)), axis=1)


@script(_FXPRESS, default_opset=op)
def At(tensor, places):  # type: ignore[no-untyped-def]
    """What a tensor [rounds, N] holds at places [rounds or 1, A, B]; those beyond the ends are the ends."""
    last = op.Shape(tensor, start=1, end=2) - op.Constant(value_ints=[1])
    within = op.Max(op.Min(places, last), op.Constant(value_ints=[0]))
    rounds = op.Shape(tensor, start=0, end=1)
    each = op.Expand(within, op.Concat(rounds, op.Constant(value_ints=[1, 1]), axis=0))
    flat = op.Reshape(each, op.Concat(rounds, op.Constant(value_ints=[-1]), axis=0))
    return op.Reshape(op.GatherElements(tensor, flat, axis=1), op.Shape(each))


@script(_FXPRESS, default_opset=op)
def Starts(length, inside):  # type: ignore[no-untyped-def]
    """The place at which each chunk begins, [chunks, 1]."""
    size = op.Squeeze(op.Shape(inside))
    one = op.Constant(value_int=1)
    starts = op.Range(op.Constant(value_int=0), (op.Squeeze(length) + size - one) / size, one) * size
    return op.Unsqueeze(starts, op.Constant(value_ints=[1]))


# --- attention of chunks ---------------------------------------------------------------------------------------------


@script(_FXPRESS, default_opset=op)
def Batches(chunks, like):  # type: ignore[no-untyped-def]
    """[rounds, chunks, ...] -> [batches, some, ...], filled up by zeros; `like` [rounds, chunks, rows].

    16 chunks at most: of 64 tokens of size 64, their keys, values and scores are 1.5 MB.
    """
    count = op.ReduceProd(op.Shape(like, start=0, end=2), keepdims=1)
    one = op.Constant(value_ints=[1])
    most = op.Constant(value_ints=[16])
    batches = (count + most - one) / most
    some = (count + batches - one) / batches
    flat = op.Reshape(chunks, op.Concat(count, op.Constant(value_ints=[-1]), axis=0))
    more = op.Concat(op.Constant(value_ints=[0, 0]), batches * some - count, op.Constant(value_ints=[0]), axis=0)
    return op.Reshape(op.Pad(flat, more), op.Concat(batches, some, op.Shape(chunks, start=2), axis=0))


@script(_FXPRESS, default_opset=op)
def Sums(scores, values):  # type: ignore[no-untyped-def]
    """The largest score of each row, the sum of exponentials above it, and the sum of values weighted by them."""
    last = op.Constant(value_ints=[-1])
    largest = op.ReduceMax(scores, last)
    powers = op.Exp(scores - largest)
    return largest, op.ReduceSum(powers, last), op.MatMul(powers, values)


@script(_FXPRESS, default_opset=op)
def Flat(rows):  # type: ignore[no-untyped-def]
    """[batches, some, rows, E] -> [all rows, E]."""
    return op.Reshape(rows, op.Concat(op.Constant(value_ints=[-1]), op.Shape(rows, start=3), axis=0))


@script(_FXPRESS, default_opset=op)
def OpenChunks(query, key, value, scale, rows, columns, hidden):  # type: ignore[no-untyped-def]
    """What each row of queries sees: all columns of its chunk, but for what is added to them, [rounds, chunks, 1, 2 L].

    Gives tables [all rows, 1 or E] of the three `Sums`.
    """

    @graph()
    def some(at, reads, added):  # type: ignore[no-untyped-def]
        scores = _MICROSOFT.FusedMatMul(op.Gather(query, at) * scale, op.Gather(key, reads), transB=1) + added
        largest, total, result = Sums(scores, op.Gather(value, reads))
        return largest, total, result

    largest, total, result = op.Scan(
        Batches(rows, rows), Batches(columns, rows), Batches(hidden, rows), body=some, num_scan_inputs=3
    )
    return Flat(largest), Flat(total), Flat(result)


@script(_FXPRESS, default_opset=op)
def MaskedChunks(query, key, value, scale, rows, columns, first, end, own, lowest, unlikely):  # type: ignore[no-untyped-def]
    """Of the columns of its chunk each row sees those from `first` up to `end`, [rounds, chunks, L, 1]."""
    width = op.Squeeze(op.Shape(columns, start=2))
    column = op.Range(op.Constant(value_int=0), width, op.Constant(value_int=1))

    @graph()
    def some(at, reads, begins, ends, itself):  # type: ignore[no-untyped-def]
        scores = _MICROSOFT.FusedMatMul(op.Gather(query, at) * scale, op.Gather(key, reads), transB=1)
        same = op.Equal(op.Unsqueeze(reads, op.Constant(value_ints=[1])), itself)
        seen = op.And(column >= begins, column < ends)
        visible = op.Where(seen, op.Where(same, unlikely, scores), lowest)
        largest, total, result = Sums(visible, op.Gather(value, reads))
        return largest, total, result

    largest, total, result = op.Scan(
        Batches(rows, rows), Batches(columns, rows), Batches(first, rows), Batches(end, rows), Batches(own, rows),
        body=some, num_scan_inputs=5,
    )  # fmt: skip
    return Flat(largest), Flat(total), Flat(result)


@script(_FXPRESS, default_opset=op)
def Together(largest, total, result, found, rows, own, missing, value, real):  # type: ignore[no-untyped-def]
    """The rounds of each position weighted by their sums, and its own key in the rounds that miss it, [N, E].

    found [rounds, N], among the rows of a round, [rounds, chunks, L]; own [N] is the score, missing [N] the rounds.
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    rounds = op.Squeeze(op.Shape(rows, start=0, end=1))
    numbers = op.Range(op.Constant(value_int=0), rounds, op.Constant(value_int=1))
    row = found + op.Unsqueeze(numbers, one) * op.ReduceProd(op.Shape(rows, start=1), keepdims=1)
    height = op.Gather(op.Squeeze(largest, one), row)
    top = op.Max(op.ReduceMax(height, zero, keepdims=0), own)
    power = op.Exp(height - top)
    itself = op.CastLike(missing, own) * op.Exp(own - top)
    kept = op.CastLike(real, own)
    sums = op.ReduceSum(power * op.Gather(op.Squeeze(total, one), row), zero, keepdims=0) + itself
    share = kept / (sums + (op.CastLike(one, own) - kept))
    weighted = op.Gather(result, row) * op.Unsqueeze(power * share, op.Constant(value_ints=[2]))
    flat = op.Reshape(weighted, op.Concat(op.Shape(found, start=0, end=1), op.Constant(value_ints=[-1]), axis=0))
    ones = op.Expand(op.CastLike(one, own), op.Concat(one, op.Shape(found, start=0, end=1), axis=0))
    return op.Reshape(op.MatMul(ones, flat), op.Shape(value)) + value * op.Unsqueeze(itself * share, one)


# --- separate queries and keys ---------------------------------------------------------------------------------------


@script(_FXPRESS, default_opset=op)
def Sizes(bucket, columns):  # type: ignore[no-untyped-def]
    """How many tokens are in each bucket and in all before it, [rounds, 2 U + 1]."""
    two = op.Constant(value_ints=[2])
    wide = op.Concat(op.Shape(bucket, start=0, end=1), columns * two + op.Constant(value_ints=[1]), axis=0)
    none = op.Expand(op.Constant(value_ints=[0]), wide)
    each = op.Expand(op.Constant(value_ints=[1]), op.Shape(bucket))
    count = op.ScatterElements(none, bucket, each, axis=1, reduction="add")
    return count, op.CumSum(count, op.Constant(value_int=1), exclusive=1)


@script(_FXPRESS, default_opset=op)
def SeparateHead(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Each chunk of the sorted queries sees a window of sorted keys."""
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    size = op.Shape(inside)
    queries = Buckets(query, rotations, real, inside)
    keys = Buckets(key, rotations, real, inside)
    query_order = Order(queries)
    key_order = Order(keys)
    count = op.ReduceSum(real)
    starts = Starts(op.Shape(real), inside)
    ends = op.Concat(op.Min(starts, count - one), op.Min(starts + size, count) - one, axis=1)
    at_ends = op.Unsqueeze(ends, op.Constant(value_ints=[0]))
    bucket = At(queries, At(query_order, at_ends))
    columns = op.Shape(rotations, start=2)
    query_count, query_begin = Sizes(queries, columns)
    key_count, key_begin = Sizes(keys, columns)
    ahead = two * (at_ends - At(query_begin, bucket)) + one
    aim = At(key_begin, bucket) + ahead * At(key_count, bucket) / (two * At(query_count, bucket))
    centre = (op.ReduceSum(aim, two) + one) / two
    window = op.Max(op.Min(centre - size, count - two * size), op.Constant(value_ints=[0]))
    width = op.Range(op.Constant(value_int=0), op.Squeeze(two * size), op.Constant(value_int=1))
    places = window + width
    rows = At(query_order, op.Unsqueeze(starts + inside, op.Constant(value_ints=[0])))
    lowest = op.CastLike(op.Constant(value_float=ABSORBING), value)
    hidden = op.Unsqueeze(op.CastLike(places >= count, value) * lowest, two)
    largest, total, result = OpenChunks(query, key, value, scale, rows, At(key_order, places), hidden)
    query_places = Places(query_order)
    offset = Places(key_order) - op.GatherElements(op.Squeeze(window, two), query_places / size, axis=1)
    unseen = op.Or(offset < op.Constant(value_ints=[0]), offset >= two * size)
    missing = op.ReduceSum(op.Cast(unseen, to=7), op.Constant(value_ints=[0]), keepdims=0)
    own = op.ReduceSum(query * key, one, keepdims=0) * scale
    return Together(largest, total, result, query_places, rows, own, missing, value, real)


@script(_FXPRESS, default_opset=op)
def SeparateHeads(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Separate queries and keys, [B, H, N, D or E] and [H, D, rounds, R]; real [B, N], inside [L]."""

    @graph()
    def head(q, k, v, turn, tokens):  # type: ignore[no-untyped-def]
        mixed = SeparateHead(q, k, v, turn, tokens, inside, scale)
        return mixed

    found = op.Scan(
        EachHead(query), EachHead(key), EachHead(value), Rotations(rotations, real, inside), RealTokens(real, query),
        body=head, num_scan_inputs=5,
    )  # fmt: skip
    return op.Reshape(found, op.Concat(op.Shape(query, start=0, end=3), op.Shape(value, start=3), axis=0))


# --- queries that are keys -------------------------------------------------------------------------------------------


@script(_FXPRESS, default_opset=op)
def SharedHead(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Each chunk sees itself and the one before; the first the end of the round before."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    size = op.Shape(inside)
    order = Order(Buckets(query, rotations, real, inside))
    count = op.ReduceSum(real)
    starts = op.Unsqueeze(Starts(op.Shape(real), inside), zero)
    final = op.Constant(value_ints=[-1])
    most = op.Constant(value_ints=[16])
    before = op.Concat(op.Slice(order, final, most, zero), op.Slice(order, zero, final, zero), axis=0)
    rows = At(order, starts + inside)
    last = At(before, op.Unsqueeze(op.Unsqueeze(count - size + inside, zero), zero))
    columns = op.Concat(op.Where(op.Equal(starts, zero), last, At(order, starts - size + inside)), rows, axis=2)
    less = size - op.Max(op.Min(count - size, size), zero)
    each = op.Concat(op.Shape(rows, start=0, end=2), one, one, axis=0)
    first = op.Expand(op.Unsqueeze(op.Where(op.Equal(starts, zero), less, zero), two), each)
    end = op.Expand(op.Unsqueeze(count - starts + size, two), each)
    lowest = op.CastLike(op.Constant(value_float=ABSORBING), value)
    unlikely = op.CastLike(op.Constant(value_float=OWN), value)
    itself = op.Unsqueeze(rows, op.Constant(value_ints=[3]))
    largest, total, result = MaskedChunks(query, key, value, scale, rows, columns, first, end, itself, lowest, unlikely)
    return Together(largest, total, result, Places(order), rows, lowest, zero, value, real)


@script(_FXPRESS, default_opset=op)
def SharedHeads(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Queries that are keys, [B, H, N, D or E] and [H, D, rounds, R]; real [B, N], inside [L]."""

    @graph()
    def head(q, k, v, turn, tokens):  # type: ignore[no-untyped-def]
        mixed = SharedHead(q, k, v, turn, tokens, inside, scale)
        return mixed

    found = op.Scan(
        EachHead(query), EachHead(key), EachHead(value), Rotations(rotations, real, inside), RealTokens(real, query),
        body=head, num_scan_inputs=5,
    )  # fmt: skip
    return op.Reshape(found, op.Concat(op.Shape(query, start=0, end=3), op.Shape(value, start=3), axis=0))


# --- causal ----------------------------------------------------------------------------------------------------------


@script(_FXPRESS, default_opset=op)
def Joint(ordered, chosen, length):  # type: ignore[no-untyped-def]
    """Of queries and keys in one order [rounds, 2 N] those chosen: their places, buckets and positions, [rounds, N]."""
    _, flat = op.Split(op.NonZero(chosen), axis=0, num_outputs=2)
    places = op.Reshape(flat, op.Concat(op.Shape(ordered, start=0, end=1), op.Constant(value_ints=[-1]), axis=0))
    unique = op.GatherElements(ordered, places, axis=1)
    two = op.Constant(value_ints=[2])
    return places, unique / (two * length), op.Mod(unique, two * length) / two


@script(_FXPRESS, default_opset=op)
def CausalHead(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Queries and keys are merged into one order, a key before the query at its position, and cut into chunks."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    three = op.Constant(value_ints=[3])
    size = op.Shape(inside)
    length = op.Shape(real)
    queries = Buckets(query, rotations, real, inside)
    keys = Buckets(key, rotations, real, inside)
    unique = op.Concat(queries * length + Positions(queries), keys * length + Positions(keys), axis=1) * two
    odd = op.Unsqueeze(op.Cast(Positions(unique) < length, to=7), zero)
    ordered, _ = op.TopK(unique + odd, two * length, axis=1, largest=0, sorted=1)
    chosen = op.Mod(ordered, two)
    joint, bucket, query_order = Joint(ordered, chosen, length)
    _, _, key_order = Joint(ordered, one - chosen, length)
    merged = joint - Positions(queries)
    _, key_begin = Sizes(keys, op.Shape(rotations, start=2))
    begin = op.GatherElements(key_begin, bucket, axis=1)
    starts = op.Unsqueeze(Starts(two * length, inside), zero)
    before = At(op.CumSum(chosen, op.Constant(value_int=1), exclusive=1), starts)
    window = starts - before - size
    each = before + inside
    rows = At(query_order, each)
    until = At(merged, each)
    width = op.Range(op.Constant(value_int=0), op.Squeeze(two * size), op.Constant(value_int=1))
    columns = At(key_order, window + width)
    first = op.Unsqueeze(op.Max(At(begin, each), until - size) - window, three)
    end = op.Unsqueeze(until - window, three)
    lowest = op.CastLike(op.Constant(value_float=ABSORBING), value)
    unlikely = op.CastLike(op.Constant(value_float=OWN), value)
    itself = op.Unsqueeze(op.Expand(op.Constant(value_ints=[-1]), op.Shape(rows)), three)  # none is left out
    largest, total, result = MaskedChunks(query, key, value, scale, rows, columns, first, end, itself, lowest, unlikely)
    place = Places(query_order)
    of = op.GatherElements(joint, place, axis=1) / size
    found = of * size + place - op.GatherElements(op.Squeeze(before, two), of, axis=1)
    other = op.Cast(op.Not(op.Equal(queries, keys)), to=7)
    missing = op.ReduceSum(other, zero, keepdims=0)
    own = op.ReduceSum(query * key, one, keepdims=0) * scale
    return Together(largest, total, result, found, rows, own, missing, value, real)


@script(_FXPRESS, default_opset=op)
def CausalHeads(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Separate queries and keys, up to each query's own position."""

    @graph()
    def head(q, k, v, turn, tokens):  # type: ignore[no-untyped-def]
        mixed = CausalHead(q, k, v, turn, tokens, inside, scale)
        return mixed

    found = op.Scan(
        EachHead(query), EachHead(key), EachHead(value), Rotations(rotations, real, inside), RealTokens(real, query),
        body=head, num_scan_inputs=5,
    )  # fmt: skip
    return op.Reshape(found, op.Concat(op.Shape(query, start=0, end=3), op.Shape(value, start=3), axis=0))


@script(_FXPRESS, default_opset=op)
def CausalSharedHead(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Each chunk has itself and the one before, of which a query sees the last places of its bucket up to its own."""
    one = op.Constant(value_ints=[1])
    three = op.Constant(value_ints=[3])
    size = op.Shape(inside)
    bucket = Buckets(query, rotations, real, inside)
    order = Order(bucket)
    _, begin = Sizes(bucket, op.Shape(rotations, start=2))
    starts = op.Unsqueeze(Starts(op.Shape(real), inside), op.Constant(value_ints=[0]))
    until = starts + inside + one
    rows = At(order, until - one)
    window = starts - size
    width = op.Range(op.Constant(value_int=0), op.Squeeze(size + size), op.Constant(value_int=1))
    first = op.Unsqueeze(op.Max(At(begin, At(bucket, rows)), until - size) - window, three)
    end = op.Unsqueeze(op.Expand(until - window, op.Shape(rows)), three)
    lowest = op.CastLike(op.Constant(value_float=ABSORBING), value)
    unlikely = op.CastLike(op.Constant(value_float=OWN), value)
    columns = At(order, window + width)
    itself = op.Unsqueeze(rows, three)
    largest, total, result = MaskedChunks(query, key, value, scale, rows, columns, first, end, itself, lowest, unlikely)
    none = op.Constant(value_ints=[0])
    return Together(largest, total, result, Places(order), rows, lowest, none, value, real)


@script(_FXPRESS, default_opset=op)
def CausalSharedHeads(query, key, value, rotations, real, inside, scale):  # type: ignore[no-untyped-def]
    """Queries that are keys, up to each query's own position."""

    @graph()
    def head(q, k, v, turn, tokens):  # type: ignore[no-untyped-def]
        mixed = CausalSharedHead(q, k, v, turn, tokens, inside, scale)
        return mixed

    found = op.Scan(
        EachHead(query), EachHead(key), EachHead(value), Rotations(rotations, real, inside), RealTokens(real, query),
        body=head, num_scan_inputs=5,
    )  # fmt: skip
    return op.Reshape(found, op.Concat(op.Shape(query, start=0, end=3), op.Shape(value, start=3), axis=0))


LSH_ATTENTION = (Lowering("Hashing by chunks", _by_chunks, refuses, standard=False),)
FUNCTIONS = (
    *(Rotations, EachHead, RealTokens, Buckets, Positions, Order, Places, At, Starts, Batches, Sums, Flat),
    *(OpenChunks, MaskedChunks, Together, Sizes, SeparateHead, SeparateHeads, SharedHead, SharedHeads),
    *(Joint, CausalHead, CausalHeads, CausalSharedHead, CausalSharedHeads),
)
