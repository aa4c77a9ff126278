"""Attention to keys of the same hash bucket (Reformer): time and memory grow with N log N, not with N^2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import ABSORBING, cast, like_attention, wide
from .table import operator

OWN = -1e5  # the score of a token's own key where queries are keys: it counts only where there is no other


def random_rotations(heads: int, size: int, rounds: int, columns: int, seed: int = 0) -> Tensor:
    """Rotations [heads, size, rounds, columns] for `lsh_attention`, the same for the same seed.

    Columns beyond ceil(N / chunk) are never used: 2 * columns is the largest number of buckets.
    """
    return torch.randn(heads, size, rounds, columns, generator=torch.Generator().manual_seed(seed))


def _shape(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    return like_attention(query, value)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `gathered_attention` gives, not rounded."""
    query, key, value = (cast(tensor, wide(tensor.dtype)) for tensor in (query, key, value))
    if key.shape[1] != query.shape[1]:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)

    def pick(tensor: Tensor, positions: Tensor) -> Tensor:
        batch, heads = (torch.arange(size, device=tensor.device) for size in tensor.shape[:2])
        picked: Tensor = tensor[batch[:, None, None, None, None], heads[:, None, None, None], positions]
        return picked

    scores = pick(query, rows) @ pick(key, columns).transpose(-1, -2) * scale
    if shared:
        scores = scores.masked_fill(rows[..., :, None] == columns[..., None, :], OWN)
    column = torch.arange(columns.shape[-1], device=query.device)
    visible = (column >= first[..., None]) & (column < end[..., None])
    scores = scores.masked_fill(~visible, ABSORBING)
    return torch.logsumexp(scores, -1), torch.softmax(scores, -1) @ pick(value, columns)


@operator(
    "lsh_attention(Tensor query, Tensor key, Tensor value, Tensor rotations, Tensor? key_mask=None, int chunk=64, "
    "bool shared=False, bool causal=False, float? scale=None) -> Tensor",
    meaning="attention to keys that hash as the query does: a window of them sorted by bucket, in several rounds",
    shape=_shape,
)
def lsh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: Tensor,
    key_mask: Tensor | None = None,
    chunk: int = 64,
    shared: bool = False,
    causal: bool = False,
    scale: float | None = None,
    attend: Attend = _gathered,
) -> Tensor:
    """Locality-sensitive hashing attention (Reformer, Kitaev et al., 2020).

    Shapes: query [B, H, N, D]; key [B, G, N, D]; value [B, G, N, E], where G divides H (head h reads group
    h // (H / G)); rotations [H or 1, D, rounds, R]; key_mask [B, N], boolean, True: a token, False: padding, which is
    no key and gives zeros; result [B, H, N, E]. `scale` defaults to D ** -0.5.

    Buckets: of x it is the argmax of [x R; -x R] over the first ceil(n / chunk) columns of R (at most all), n being the
    tokens of the sample without padding; all tokens share one where n <= chunk, and the result is exact attention.
    Tokens are sorted by bucket, then position. Nothing depends on N, so padding changes nothing.

    In each round a query sees, always of the real tokens alone:

    - `shared` (queries are keys, as in Reformer; the bucket of a key is that of its query): the chunk of the sorted
      order that it is in and the one before, whatever their buckets, as Reformer's implementations do. Before the
      first chunk stands the end of the round before (of the last, for the first), without what the chunk has already.
      Its own key, which would outweigh all others, counts only where it sees no other.
    - separate queries and keys (a pretrained model, of which this is an approximation): a window of 2 * chunk sorted
      keys, whatever their buckets (without those of others the result is farther from exact attention). The window
      of a chunk of sorted queries is centred where its first and last query would be among the keys, each as far
      into the keys of its bucket as it is into the queries of its bucket. Its own key is always seen, once.
    - `causal`: of the keys of its bucket at positions up to its own, the last `chunk`; what is seen is then decided by
      the past alone (where chunks begin depends on later tokens; Reformer's causal form lets that show).
      Its own key as above.

    Rounds are weighted by the sums of their exponentials. Buckets are constants to the gradient. Half precision is
    computed in fp32 and rounded once at the end.

    `attend` is no argument of the operator: a backend with a kernel of `gathered_attention` traces through that.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, found {chunk}")
    dtype = query.dtype
    given = query, key, value
    query, key, value = (cast(tensor, wide(dtype)) for tensor in given)
    batch, heads, length, size = query.shape
    if key.shape[1] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[1], 1) for tensor in (key, value))
    real = query.new_ones((batch, length), dtype=torch.bool) if key_mask is None else key_mask
    with torch.no_grad():
        rotations = rotations.to(query.dtype)
        queries = _sorted(_buckets(query, rotations, real, chunk), length)
        keys = queries if shared else _sorted(_buckets(key, rotations, real, chunk), length)
        count = real.sum(1)[:, None, None, None]
        if causal:
            seen = _past(queries, keys, chunk, length)
        elif shared:
            seen = _two_chunks(queries, count, chunk, length)
        else:
            seen = _windows(queries, keys, count, chunk, length)
    scale = size**-0.5 if scale is None else scale
    parts = attend(*given, seen.rows, seen.columns, seen.first, seen.end, scale, shared)
    totals, results = (cast(part, query.dtype).flatten(3, 4) for part in parts)
    totals = totals.gather(-1, seen.found)
    results = results.gather(3, seen.found[..., None].expand(*seen.found.shape, value.shape[-1]))
    own = (query * key).sum(-1)[:, :, None] * scale
    extra = torch.where(seen.own | shared, ABSORBING, own)
    weights = torch.softmax(torch.cat((totals, extra), 2), 2)[..., None]
    rounds = totals.shape[2]
    result = (weights[:, :, :rounds] * results).sum(2) + weights[:, :, rounds:].sum(2) * value
    return cast(result.masked_fill(~real[:, None, :, None], 0.0), dtype)


@dataclass(frozen=True)
class _Sorted:
    """Tokens sorted by bucket, then position, [B, H, rounds, N] each; padding is in a bucket after all others."""

    bucket: Tensor  # of the token at each place
    position: Tensor  # of the token at each place
    place: Tensor  # of the token at each position


@dataclass(frozen=True)
class _Seen:
    """What is computed in each chunk, [B, H, rounds, chunks, ...]: some queries, and a row of keys to see some of."""

    rows: Tensor  # positions of queries, [..., chunk]
    columns: Tensor  # positions of keys, [..., 2 * chunk]
    first: Tensor  # of the columns that each query sees, [..., chunk]
    end: Tensor  # of them
    found: Tensor  # among all rows of a round, that of each position, [B, H, rounds, N]
    own: Tensor  # whether the columns that a position sees hold its own key, [B, H, rounds, N]


def _buckets(vectors: Tensor, rotations: Tensor, real: Tensor, chunk: int) -> Tensor:
    """The bucket of each vector in each round, [B, H, rounds, N]; 2 R for padding."""
    columns = rotations.shape[-1]
    rotations = rotations.expand(vectors.shape[1], -1, -1, -1)
    rotated = torch.einsum("bhnd,hdtr->bhtnr", vectors, rotations)
    count = real.sum(1)
    used = torch.arange(columns, device=real.device) < (count[:, None] + chunk - 1) // chunk
    strength = rotated.abs().masked_fill(~used[:, None, None, None, :], -1.0)
    column = strength.argmax(-1)
    negative = rotated.gather(-1, column[..., None])[..., 0] < 0
    bucket = torch.where(negative, column + columns, column)  # the argmax of [x R; -x R]
    bucket = torch.where((count > chunk)[:, None, None, None], bucket, 0)
    return torch.where(real[:, None, None, :], bucket, 2 * columns)


def _sorted(bucket: Tensor, length: int) -> _Sorted:
    order = (bucket * length + torch.arange(length, device=bucket.device)).argsort(-1)
    return _Sorted(bucket.gather(-1, order), order, order.argsort(-1))


def _bounds(tokens: _Sorted, bucket: Tensor) -> tuple[Tensor, Tensor]:
    """The places where the given buckets begin and end."""
    sorted_buckets = tokens.bucket.contiguous()
    begin = torch.searchsorted(sorted_buckets, bucket.contiguous())
    return begin, torch.searchsorted(sorted_buckets, bucket.contiguous(), right=True)


def _chunks(chunk: int, length: int, device: torch.device) -> Tensor:
    """The place at which each chunk begins, [chunks, 1]."""
    return torch.arange(0, length, chunk, device=device)[:, None]


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """What is at `places` [..., rows, columns], those beyond the ends being the ends; tensor [B, H, rounds, N]."""
    places = places.clamp(0, tensor.shape[-1] - 1).expand(*tensor.shape[:3], *places.shape[-2:])
    found: Tensor = tensor.gather(-1, places.flatten(3)).unflatten(-1, places.shape[-2:])
    return found


def _two_chunks(tokens: _Sorted, count: Tensor, chunk: int, length: int) -> _Seen:
    """Each chunk of the sorted tokens sees itself and the one before."""
    starts = _chunks(chunk, length, count.device)
    inside = torch.arange(chunk, device=count.device)
    rows = _at(tokens.position, starts + inside)
    count = count[..., None]
    last = _at(tokens.position.roll(1, 2), count - chunk + inside)  # of the round before
    before = torch.where(starts == 0, last, _at(tokens.position, starts - chunk + inside))
    first = torch.where(starts == 0, chunk - (count - chunk).clamp(0, chunk), 0)
    end = (count - starts + chunk).clamp(max=2 * chunk)
    shape = rows.shape
    return _Seen(
        rows,
        torch.cat((before, rows), -1),
        first.expand(shape),
        end.expand(shape),
        tokens.place,
        torch.ones_like(tokens.place, dtype=torch.bool),
    )


def _windows(queries: _Sorted, keys: _Sorted, count: Tensor, chunk: int, length: int) -> _Seen:
    """Each chunk of the sorted queries sees a window of sorted keys."""
    starts = _chunks(chunk, length, count.device)
    places = torch.arange(length, device=count.device)
    key_begin, key_end = _bounds(keys, queries.bucket)
    begin, end = _bounds(queries, queries.bucket)
    aim = key_begin + (2 * (places - begin) + 1) * (key_end - key_begin) // (2 * (end - begin))
    count = count[..., None]
    ends = torch.minimum(starts + chunk, count) - 1
    centre = (_at(aim, torch.minimum(starts, count - 1)) + _at(aim, ends) + 1) // 2
    window = torch.minimum(centre - chunk, count - 2 * chunk).clamp(min=0)
    rows = _at(queries.position, starts + torch.arange(chunk, device=count.device))
    own = keys.place - window[..., 0].gather(-1, queries.place // chunk)
    return _Seen(
        rows,
        _at(keys.position, window + torch.arange(2 * chunk, device=count.device)),
        torch.zeros_like(rows),
        (count - window).expand(rows.shape),
        queries.place,
        (own >= 0) & (own < 2 * chunk),
    )


def _bucket_of(tokens: _Sorted) -> Tensor:
    """The bucket of the token at each position."""
    return tokens.bucket.gather(-1, tokens.place)


def _past(queries: _Sorted, keys: _Sorted, chunk: int, length: int) -> _Seen:
    """Queries and keys are merged into one order, a key before the query at its position, and cut into chunks.

    So a chunk has at most `chunk` queries and `chunk` keys, whatever the buckets hold. With the `chunk` keys before,
    its keys are all that its queries see.
    """
    begin, _ = _bounds(keys, queries.bucket)
    merged = torch.searchsorted(
        (keys.bucket * length + keys.position).contiguous(),
        (queries.bucket * length + queries.position).contiguous(),
        right=True,
    )  # how many keys come before each query
    joint = merged + torch.arange(length, device=merged.device)
    starts = _chunks(chunk, 2 * length, merged.device)[:, 0].expand(*joint.shape[:3], -1)
    before = torch.searchsorted(joint, starts.contiguous())  # how many queries come before each chunk
    window = (starts - before - chunk)[..., None]
    each = before[..., None] + torch.arange(chunk, device=merged.device)
    until = _at(merged, each)
    place = queries.place
    of = joint.gather(-1, place) // chunk
    return _Seen(
        _at(queries.position, each),
        _at(keys.position, window + torch.arange(2 * chunk, device=merged.device)),
        torch.maximum(_at(begin, each), until - chunk) - window,
        until - window,
        of * chunk + place - before.gather(-1, of),
        _bucket_of(queries) == _bucket_of(keys),
    )


def _gathered_shape(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    results = query.new_empty((*rows.shape, value.shape[-1]))
    return query.new_empty(rows.shape, dtype=wide(query.dtype)), results


@operator(
    "gathered_attention(Tensor query, Tensor key, Tensor value, Tensor rows, Tensor columns, Tensor first, "
    "Tensor end, float scale, bool shared=False) -> (Tensor, Tensor)",
    meaning="attention of queries at some places to keys at others, and the logarithms of its sums of exponentials",
    shape=_gathered_shape,
)
def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """The chunks of `lsh_attention`: each of them a few queries, which see a row of keys or a part of it.

    Shapes: query [B, H, N, D]; key [B, G, M, D]; value [B, G, M, E], where G divides H; rows [B, H, T, C, R], places
    in 0 .. N - 1; columns [B, H, T, C, W], places in 0 .. M - 1; first and end [B, H, T, C, R]: a query sees columns
    first .. end - 1 of its chunk's W. Results: logarithms of sums of exponentials [B, H, T, C, R], in fp32 for half
    precision, and attention [B, H, T, C, R, E]. With `shared` the key at a query's own place has the score -1e5.

    A query that sees no column gives the mean of all W, and a logarithm so low (-1e30) that nothing is left of the mean
    beside any other.
    """
    totals, results = _gathered(query, key, value, rows, columns, first, end, scale, shared)
    return totals, cast(results, query.dtype)
