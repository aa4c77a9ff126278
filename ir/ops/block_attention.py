"""Attention to the key blocks of a table, and the operators that make such tables.

A table holds for each row block of queries the numbers of the key blocks it sees; -1 stands for none. Three operators
make tables: at random (BigBird), by the content of queries and keys, and of an expander graph. What they give a row
block depends on the real tokens of its own sample alone, never on how much padding follows: a sample has
ceil(count / block) real blocks, where count is 1 + the place of the last key that its mask lets be seen. Tables have a
row, and where they are chosen by content a column, more than there are blocks: their sizes are then never 1, as which
torch would otherwise fix them where the example is short.

Random numbers are exact hashes of integers: the same in every backend and at every length, and no weight is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention, like_attention
from .table import operator

NONE = 2**62  # of a hash: greater than all
PLACES = 2**22  # more blocks than any sequence has
PRIME = 2**31 - 1


# --- attention -------------------------------------------------------------------------------------------------------


def _like_block_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return like_attention(query, value)


@operator(
    "block_attention(Tensor query, Tensor key, Tensor value, Tensor table, Tensor? full=None, Tensor? key_mask=None, "
    "int rows=64, int block=64, bool causal=False, float? scale=None) -> Tensor",
    meaning="attention of each block of queries to the key blocks that a table names",
    shape=_like_block_attention,
)
def block_attention(
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
    """Block-sparse attention (as in BigBird, Zaheer et al., 2020); queries and keys are of one sequence.

    Shapes: query [B, H, N, D]; key [B, G, N, D]; value [B, G, N, E], where G divides H (head h reads group
    h // (H / G)); result [B, H, N, E]. `key_mask` [B, N], boolean, True: may be attended.

    Queries are cut into blocks of `rows` tokens, keys into blocks of `block`; the last ones may be short. `table`
    [B or 1, H or 1, ceil(N / rows) or more, K] holds for each row block the key blocks it sees; what is no block's
    number means none, and a block named twice counts once. `full` [B or 1, F] holds row blocks that see every key.
    `causal`: query i sees of these only the keys j <= i. `scale` defaults to D ** -0.5.

    A row with no key allowed gives zeros. Half precision is computed in fp32 and rounded once at the end.
    """
    length = query.shape[2]
    row_blocks, blocks = _count(length, rows), _count(length, block)
    named = table[:, :, :row_blocks]
    seen = named.new_zeros((*named.shape[:3], blocks + 1), dtype=torch.bool)
    seen = seen.scatter(-1, torch.where((named >= 0) & (named < blocks), named, blocks), True)
    seen = seen[..., :blocks]
    if full is not None:
        every = full.new_zeros((full.shape[0], row_blocks + 1), dtype=torch.bool)
        every = every.scatter(-1, torch.where((full >= 0) & (full < row_blocks), full, row_blocks), True)
        seen = seen | every[:, None, :row_blocks, None]
    token = torch.arange(length, device=query.device)
    allowed = seen[:, :, token // rows][..., token // block]
    result: Tensor = attention(query, key, value, allowed, key_mask=key_mask, right=0 if causal else None, scale=scale)
    return result


# --- tables ----------------------------------------------------------------------------------------------------------


def hashed(seed: int, *numbers: Tensor) -> Tensor:
    """A number below 2^31 - 1 for each tuple of integers: fifth powers, which permute the numbers modulo this prime."""
    value = (torch.zeros_like(numbers[0]) + mixed_seed(seed)) % PRIME
    for number in numbers:
        value = (value + number) % PRIME
        square = value * value % PRIME
        value = square * square % PRIME * value % PRIME
        value = (value * 1103515245 + 12345) % PRIME
    return value


def mixed_seed(seed: int) -> int:
    """Seeds that follow each other, far apart."""
    return pow((seed + 1) * 48271 % PRIME, 5, PRIME)


def _random_shapes(
    query: Tensor, key_mask: Tensor | None = None, block: int = 64, window: int = 3, globals: int = 1,
    random: int = 3, seed: int = 0, causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sides = 1 if causal else 2
    sizes = (query.shape[0], 1, table_rows(query.shape[2], block), window + sides * globals + random)
    full = query.new_empty((query.shape[0], 0 if causal else 2 * globals), dtype=torch.int64)
    return query.new_empty(sizes, dtype=torch.int64), full


@operator(
    "random_blocks(Tensor query, Tensor? key_mask=None, int block=64, int window=3, int globals=1, int random=3, "
    "int seed=0, bool causal=False) -> (Tensor, Tensor)",
    meaning="a table of BigBird's blocks: a window, the first and last, and random ones; and the rows that see all",
    shape=_random_shapes,
)
def random_blocks(
    query: Tensor,
    key_mask: Tensor | None = None,
    block: int = 64,
    window: int = 3,
    globals: int = 1,
    random: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """BigBird's blocks (Zaheer et al., 2020) for `block_attention` with rows = block.

    A row block sees the `window` blocks around its own (causal: up to its own), the `globals` first and the `globals`
    last real ones (causal: the first alone), and `random` others of the real ones (causal: of those before it), or all
    where there are fewer. The global blocks see every key (causal: no row does).

    Shapes: query [B, H, N, D], of which only the sizes are read; key_mask [B, N]; results
    [B, 1, ceil(N / block) + 1, K] and [B, F], int64. The random blocks are those of the smallest hashes of (seed, row,
    column).

    Raises:
        ValueError: a number is negative, or `window` is 0.
    """
    if window < 1 or globals < 0 or random < 0:
        raise ValueError(
            f"window must be positive, globals and random not negative, found {window}, {globals}, {random}"
        )
    real = _real_blocks(query, key_mask, block)[:, None, None]  # [B, 1, 1]
    row = torch.arange(table_rows(query.shape[2], block), device=query.device)[:, None]  # [blocks, 1]
    nothing = torch.full_like(row, -1)
    around = row - (window - 1 if causal else window // 2) + torch.arange(window, device=query.device)
    first = torch.arange(globals, device=query.device)
    ends = first[None, None] if causal else torch.cat((first.expand(real.shape[0], 1, -1), real - 1 - first), -1)
    column = torch.arange(query.shape[2] // block + 1 + random, device=query.device)  # never fewer than are wanted
    other = (column >= globals) & (column < (row - window + 1 if causal else real - globals))
    if not causal:
        other = other & ((column < around[:, :1]) | (column > around[:, -1:]))
    order = torch.where(other, hashed(seed, row, column) * PLACES + column, NONE)
    chosen = order.topk(random, -1, largest=False).values
    chosen = torch.where(chosen < NONE, chosen % PLACES, -1)
    batch = real.shape[0]
    table = torch.cat([part.expand(batch, row.shape[0], -1) for part in (around, ends, chosen)], -1)
    table = torch.where((table >= 0) & (table < real) & (row < real), table, nothing)
    full = first.new_empty((batch, 0)) if causal else torch.where(ends[:, 0] < real[:, 0], ends[:, 0], -1)
    return table[:, None], full


def _expander_shapes(
    query: Tensor, key_mask: Tensor | None = None, block: int = 64, degree: int = 8, hubs: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    sizes = (query.shape[0], 1, table_rows(query.shape[2], block), 1 + degree + hubs)
    return query.new_empty(sizes, dtype=torch.int64), query.new_empty((query.shape[0], hubs), dtype=torch.int64)


@operator(
    "expander_blocks(Tensor query, Tensor? key_mask=None, int block=64, int degree=8, int hubs=1, int seed=0) "
    "-> (Tensor, Tensor)",
    meaning="a table of a random circulant graph on the blocks, with hubs; and the hubs, which see all",
    shape=_expander_shapes,
)
def expander_blocks(
    query: Tensor, key_mask: Tensor | None = None, block: int = 64, degree: int = 8, hubs: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The neighbours of each block in a random graph, for `block_attention` with rows = block.

    Block i of the n real ones sees itself, i + a and i - a (modulo n) for degree / 2 random generators a, and the
    `hubs` first blocks, which see every key. Random Cayley graphs are expanders, where few steps lead from any block to
    any other, once their degree is some multiple of log n (Alon and Roichman, 1994); as a pattern of attention:
    Exphormer (Shirzad et al., 2023). block=1 is a graph of tokens.

    Shapes: query [B, H, N, D], of which only the sizes are read; key_mask [B, N]; results
    [B, 1, ceil(N / block) + 1, 1 + degree + hubs] and [B, hubs], int64.

    Raises:
        ValueError: `degree` is no even number, or a number is negative.
    """
    if degree % 2 or degree < 0 or hubs < 0:
        raise ValueError(f"degree must be even and not negative, hubs not negative, found {degree} and {hubs}")
    real = _real_blocks(query, key_mask, block)[:, None, None]  # [B, 1, 1]
    row = torch.arange(table_rows(query.shape[2], block), device=query.device)[:, None]  # [blocks, 1]
    steps = generator_hashes(seed, degree).to(query.device) * (real - 1).clamp(min=0) // PRIME + 1
    first = torch.arange(hubs, device=query.device)
    hub = first.expand(real.shape[0], row.shape[0], -1)
    near = [row.expand(real.shape[0], -1, -1), (row + steps) % real, (row - steps + real) % real]
    table = torch.cat([*near, hub], -1)
    table = torch.where((table < real) & (row < real), table, -1)
    return table[:, None], torch.where(first < real[:, 0], first, -1)


def generator_hashes(seed: int, degree: int) -> Tensor:
    """A number below 2^31 - 1 for each generator: [degree / 2]."""
    return hashed(seed, torch.arange(degree // 2))


def _dynamic_shapes(
    query: Tensor, key: Tensor, key_mask: Tensor | None = None, rows: int = 64, block: int = 64, *_: Any, **__: Any
) -> Tensor:
    batch, heads, length, _size = query.shape
    return query.new_empty((batch, heads, table_rows(length, rows), table_rows(length, block)), dtype=torch.int64)


@operator(
    "dynamic_blocks(Tensor query, Tensor key, Tensor? key_mask=None, int rows=64, int block=64, int top_k=0, "
    "float mass=0.0, float similarity=-1.0, bool causal=False, float? scale=None) -> Tensor",
    meaning="a table of the key blocks whose means score highest with the mean of each block of queries",
    shape=_dynamic_shapes,
)
def dynamic_blocks(
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
    """Blocks chosen by content (as SpargeAttn, Zhang et al., 2025, chooses them), for `block_attention`.

    The weight of a key block in a row block is the softmax of the scores of their means over real tokens. Kept are
    either the `top_k` blocks of largest weight, or the fewest whose weights add up to `mass`; besides always block 0,
    the blocks of the row block's own tokens, and those whose keys are less alike than `similarity` (the mean cosine of
    their pairs), as a mean says little about them. Row blocks whose queries are less alike see every block.

    `causal`: no row depends on later tokens. So a row block's mean is that of the `rows` queries up to its first one,
    and only blocks wholly before it have a weight; rows=1 chooses for each query by itself.

    Shapes: query [B, H, N, D]; key [B, G, N, D]; key_mask [B, N]; result
    [B, H, ceil(N / rows) + 1, ceil(N / block) + 1], int64: the kept blocks ascending, then -1. `scale` defaults to
    D ** -0.5. Half precision is computed in fp32.

    Raises:
        ValueError: not exactly one of `top_k` and `mass` is given, or `mass` is no fraction.
    """
    if (top_k > 0) == (mass > 0) or top_k < 0 or not 0 <= mass <= 1:
        raise ValueError(f"give a positive top_k or a mass of at most 1, found top_k={top_k} and mass={mass}")
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    length, device = query.shape[2], query.device
    real = torch.ones((query.shape[0], length), dtype=torch.bool, device=device) if key_mask is None else key_mask
    before = rows - 1 if causal else 0
    row_mean, row_alike = _means(query, real, rows, before)
    key_mean, key_alike = _means(key, real, block)
    groups = query.shape[1] // key.shape[1]
    key_mean, key_alike = key_mean.repeat_interleave(groups, 1), key_alike.repeat_interleave(groups, 1)

    start = torch.arange(table_rows(length, rows), device=device)[:, None] * rows  # of row blocks, [row blocks, 1]
    first = torch.arange(table_rows(length, block), device=device) * block  # of key blocks
    own = (first < start + rows) & (first + block > start)
    some = _cut(real, rows).any(-1)[:, None, :, None] & _cut(real, block).any(-1)[:, None, None]
    allowed, weighed = (some & (first < start + rows), some & (first + block <= start)) if causal else (some, some)
    scores = row_mean @ key_mean.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~weighed, -1e30), -1) * weighed
    ordered, order = weights.sort(stable=True, dim=-1, descending=True)
    if top_k:
        within = (torch.arange(ordered.shape[-1], device=device) < top_k).expand(ordered.shape)
    else:
        within = ordered.cumsum(-1) - ordered < (mass if mass < 1 else 2)
    kept = torch.zeros_like(within).scatter(-1, order, within) & weighed
    kept = kept | own | (first == 0) | (key_alike < similarity)[:, :, None] | (row_alike < similarity)[..., None]
    number = torch.arange(first.shape[0], device=device)
    table = torch.where(kept & allowed, number, first.shape[0]).sort(-1).values
    return torch.where(table < first.shape[0], table, -1)


# --- parts -----------------------------------------------------------------------------------------------------------


def _count(length: int, size: int) -> int:
    """The blocks of a sequence; the last may be short."""
    return (length + size - 1) // size


def table_rows(length: int, size: int) -> int:
    """The blocks of a sequence and one more."""
    return (length + 2 * size - 1) // size


def _real_blocks(query: Tensor, key_mask: Tensor | None, block: int) -> Tensor:
    """The real blocks of each sample, [B]: up to the last key that may be seen, and at least one."""
    batch, _, length, _ = query.shape
    if key_mask is None:
        return torch.full((batch,), _count(length, block), device=query.device)
    place = torch.arange(1, length + 1, device=query.device)
    count = torch.where(key_mask, place, 1).amax(1)
    return (count + block - 1) // block


def _cut(x: Tensor, size: int, before: int = 0) -> Tensor:
    """`before` zeros, then [B, N, ...], then zeros: [B, blocks + 1, size, ...]."""
    blocks = table_rows(x.shape[1], size)
    after = blocks * size - before - x.shape[1]
    filled = F.pad(x, [*[0] * (2 * x.dim() - 4), before, after])
    return filled.reshape(x.shape[0], blocks, size, *x.shape[2:])


def _means(x: Tensor, real: Tensor, size: int, before: int = 0) -> tuple[Tensor, Tensor]:
    """The mean of each block's real tokens, [B, H, blocks + 1, D], and the mean cosine of their pairs, without D.

    The latter is the squared length of the mean of the tokens scaled to length 1. `before`: how many tokens earlier
    the blocks begin.
    """
    mask = _cut(real, size, before)[..., None, None]
    blocks = _cut(x.transpose(1, 2), size, before) * mask  # [B, blocks, size, H, D]
    count = mask.sum(2).clamp(min=1)
    directions = blocks / blocks.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    alike = (directions.sum(2) / count).square().sum(-1)
    return (blocks.sum(2) / count).transpose(1, 2), alike.transpose(1, 2)
