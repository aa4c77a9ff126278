"""Attention by blocks of a table, and the operators that make tables: limits, invariances, and an independent truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from build import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.block_attention import block_attention, dynamic_blocks, expander_blocks, random_blocks

HEADS, GROUPS, SIZE = 4, 2, 8
Options = dict[str, Any]


def operands(batch: int, length: int, groups: int = GROUPS, seed: int = 0) -> list[Tensor]:
    return [normal(batch, heads, length, SIZE, seed=seed + i) for i, heads in enumerate((HEADS, groups, groups))]


def padding(batch: int, length: int) -> Tensor:
    """Sample b has about 1 / (b + 1) of its tokens."""
    real = torch.tensor([math.ceil(length / (index + 1)) for index in range(batch)])
    return torch.arange(length) < real[:, None]


def all_blocks(length: int, rows: int, block: int) -> Tensor:
    return torch.arange(math.ceil(length / block)).expand(1, 1, math.ceil(length / rows), -1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- attention -------------------------------------------------------------------------------------------------------


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, full: Tensor, mask: Tensor, rows: int, block: int,
    causal: bool,
) -> Tensor:  # fmt: skip
    """The definition, one query at a time."""
    batch, heads, length, size = query.shape
    result = torch.zeros(batch, heads, length, value.shape[3])
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // key.shape[1])
            for i in range(length):
                named = table[b % table.shape[0], h % table.shape[1], i // rows].tolist()
                everything = i // rows in full[b % full.shape[0]].tolist()
                seen = [
                    j
                    for j in range(length)
                    if (everything or j // block in named) and mask[b, j] and (j <= i or not causal)
                ]
                if seen:
                    weights = torch.softmax(key[b, group, seen] @ query[b, h, i] / math.sqrt(size), 0)
                    result[b, h, i] = weights @ value[b, group, seen]
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "block"), [(4, 4), (3, 5), (1, 2)])
def test_is_what_its_definition_says(rows: int, block: int, causal: bool) -> None:
    """Numbers that are no block's and repeated ones included; tables of one head and of each."""
    query, key, value = operands(2, 13)
    value = torch.cat((value, value[..., :1]), -1)  # wider than the keys
    mask = normal(2, 13, seed=9) > -0.5
    full = torch.tensor([[1, -1, 99]])
    for heads in (1, HEADS):
        sizes = (2, heads, math.ceil(13 / rows) + 1, 3)
        table = torch.randint(-2, 6, sizes, generator=torch.Generator().manual_seed(rows))
        found = block_attention(query, key, value, table, full, mask, rows, block, causal)
        close(found, by_loops(query, key, value, table, full, mask, rows, block, causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 16, 21])
@pytest.mark.parametrize("by_rows", [False, True])
def test_with_all_blocks_it_is_attention(length: int, causal: bool, by_rows: bool) -> None:
    query, key, value = operands(2, length)
    mask, table = padding(2, length), all_blocks(length, 4, 3)
    full = torch.arange(math.ceil(length / 4))[None] if by_rows else None
    found = block_attention(query, key, value, table - 99 if by_rows else table, full, mask, 4, 3, causal, 0.3)
    close(found, attention(query, key, value, key_mask=mask, right=0 if causal else None, scale=0.3))


def test_rows_without_keys_are_zeros() -> None:
    query, key, value = operands(1, 8)
    table = torch.tensor([0, -1])[None, None, :, None]
    found = block_attention(query, key, value, table, rows=4, block=4)
    assert found[:, :, :4].all() and not found[:, :, 4:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    half = [item.to(dtype) for item in operands(1, 8)]
    table = all_blocks(8, 4, 4)
    wide = block_attention(*(item.float() for item in half), table, rows=4, block=4)
    assert torch.equal(block_attention(*half, table, rows=4, block=4), wide.to(dtype))


def test_gradient() -> None:
    wide = [item.double()[..., :2].requires_grad_() for item in operands(1, 5)]
    table = torch.tensor([[0, 1], [1, 1], [0, -1]])[None, None]
    mask = torch.tensor([[True, True, True, False, True]])
    full = torch.tensor([[1]])
    assert torch.autograd.gradcheck(lambda q, k, v: block_attention(q, k, v, table, full, mask, 2, 3, True), wide)


@given(
    length=st.integers(1, 20),
    rows=st.integers(1, 9),
    block=st.integers(1, 9),
    width=st.integers(1, 4),
    causal=st.booleans(),
)
def test_a_table_is_a_set(length: int, rows: int, block: int, width: int, causal: bool) -> None:
    """Neither the order of a row nor repetitions nor rows beyond the last block matter; sizes are any."""
    query, key, value = operands(1, length)
    sizes = (1, 1, math.ceil(length / rows), width)
    table = torch.randint(-1, math.ceil(length / block), sizes, generator=torch.Generator().manual_seed(length))
    again = torch.nn.functional.pad(torch.cat((table, table), -1).flip(-1), (0, 0, 0, 1))
    options: Options = {"rows": rows, "block": block, "causal": causal}
    close(block_attention(query, key, value, again, **options), block_attention(query, key, value, table, **options))


def test_bigbird_of_transformers_gives_the_same_for_its_own_blocks() -> None:
    """Whole blocks, no padding, random blocks as transformers draws them while it trains.

    Elsewhere transformers differs, and ours is the set of the paper: in evaluation it takes block 0 for every random
    block, and at the lengths 1024, 3072 and 4096 it may draw a block of the window, each of which then counts several
    times in the softmax; padding it hides by -10000 instead of -inf; other lengths it pads to whole blocks.
    """
    block, blocks, seed = 4, 12, 7
    config = BigBirdConfig(
        hidden_size=HEADS * SIZE, num_attention_heads=HEADS, block_size=block, num_random_blocks=3, use_bias=True
    )
    torch.manual_seed(0)
    truth = BigBirdBlockSparseAttention(config, seed=seed).train()
    hidden = normal(2, blocks * block, HEADS * SIZE)
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(2, blocks * block), block
    )
    with torch.no_grad():
        expected, _ = truth(hidden, band, from_mask, to_mask, blocked, blocked)
        query, key, value = (
            getattr(truth, name)(hidden).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
    numpy.random.seed(seed)
    plan = truth._get_rand_attn_plan(blocks * block, block, 3)
    drawn = truth._bigbird_block_rand_mask_with_head(blocks * block, blocks * block, block, block, HEADS, *plan)

    row = torch.arange(1, blocks - 1)[:, None]
    near = torch.cat((row - 1, row, row + 1, 0 * row, 0 * row + blocks - 1), 1)
    inner = torch.stack([torch.cat((near, torch.tensor(chosen)), 1) for chosen in drawn])
    table = torch.nn.functional.pad(inner, (0, 0, 1, 1), value=-1)[None]
    assert all(len(set(chosen.tolist())) == 3 for chosen in inner[:, :, 5:].flatten(0, 1))
    found = block_attention(query, key, value, table, torch.tensor([[0, blocks - 1]]), rows=block, block=block)
    close(found.transpose(1, 2).flatten(2), expected)


# --- tables ----------------------------------------------------------------------------------------------------------

Table = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, "Tensor | None", Options]]


def made_by_random(**options: Any) -> Table:
    def make(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Options]:
        table, full = random_blocks(query, mask, block=4, **options)
        return table, full, {"rows": 4, "block": 4, "causal": options.get("causal", False)}

    return make


def made_by_content(**options: Any) -> Table:
    def make(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Options]:
        sizes = {"rows": 4, "block": 4, **options}
        table = dynamic_blocks(query, key, mask, **sizes)
        return table, None, {name: sizes.get(name, False) for name in ("rows", "block", "causal")}

    return make


def made_by_expander(**options: Any) -> Table:
    def make(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Options]:
        table, full = expander_blocks(query, mask, **options)
        return table, full, {"rows": options["block"], "block": options["block"]}

    return make


def attend(make: Table, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    table, full, options = make(query, key, mask)
    result: Tensor = block_attention(query, key, value, table, full, mask, **options)
    return result


CAUSAL = {
    "random": made_by_random(causal=True),
    "top_k": made_by_content(top_k=1, causal=True),
    "mass": made_by_content(mass=0.3, causal=True),
    "alike": made_by_content(mass=0.3, similarity=0.2, causal=True),
    "each query": made_by_content(top_k=1, rows=1, causal=True),
    "long rows": made_by_content(top_k=1, rows=7, causal=True),
}
TABLES = CAUSAL | {
    "random of all": made_by_random(random=2, seed=3),
    "top_k of all": made_by_content(top_k=2),
    "mass of all": made_by_content(mass=0.4, rows=6),
    "alike of all": made_by_content(top_k=1, similarity=0.3),
    "expander": made_by_expander(block=4, degree=4),
    "expander of tokens": made_by_expander(block=1, degree=6, hubs=2),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("length", [1, 30, 44])
def test_padding_changes_nothing(name: str, length: int) -> None:
    alone = operands(1, length)
    padded = [torch.cat((item, normal(1, item.shape[1], 200, SIZE, seed=9)), 2) for item in alone]
    mask = torch.arange(length + 200)[None] < length
    close(attend(TABLES[name], *padded, mask)[:, :, :length], attend(TABLES[name], *alone))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("changed", [1, 18, 22, 39])
def test_later_tokens_change_nothing(name: str, changed: int) -> None:
    before = operands(2, 40)
    after = [item.clone() for item in before]
    for item in after:
        item[:, :, changed:] += 3 * normal(*item[:, :, changed:].shape, seed=5)
    first, second = (attend(CAUSAL[name], *given) for given in (before, after))
    close(first[:, :, :changed], second[:, :, :changed])
    assert not torch.equal(first[:, :, changed:], second[:, :, changed:])


def rows_of(table: Tensor) -> list[list[int]]:
    """The real entries of each row of the first sample and head."""
    return [[entry for entry in row if entry >= 0] for row in table[0, 0].tolist()]


@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_are_those_that_nothing_else_names(causal: bool) -> None:
    window, ends, blocks = 3, 2, 20
    table, full = random_blocks(torch.empty(1, 1, blocks * 4, 1), None, 4, window, ends, 5, causal=causal)
    assert full[0].tolist() == ([] if causal else [0, 1, 19, 18])
    for row, found in enumerate(rows_of(table)[:blocks]):
        around = range(row - 2, row + 1) if causal else range(row - 1, row + 2)
        outer = range(ends) if causal else [*range(ends), *range(blocks - ends, blocks)]
        fixed = {block for block in (*around, *outer) if 0 <= block < blocks}
        chosen = table[0, 0, row, -5:][table[0, 0, row, -5:] >= 0].tolist()
        others = set(range(row if causal else blocks)) - fixed
        assert fixed | set(chosen) == set(found)
        assert len(set(chosen)) == len(chosen) == min(5, len(others)) and set(chosen) <= others


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: random_blocks(torch.empty(1, 1, 800, 1), block=8, seed=seed)[0],
        lambda seed: expander_blocks(torch.empty(1, 1, 800, 1), block=8, seed=seed)[0],
    ],
)
def test_the_seed_is_all_that_chance_depends_on(make: Callable[[int], Tensor]) -> None:
    assert torch.equal(make(5), make(5))
    assert len({str(make(seed).tolist()) for seed in range(20)}) == 20


def test_random_blocks_are_spread_evenly() -> None:
    """Each block is drawn about as often: the chi-square of 98 of them stays below twice their number."""
    drawn = torch.cat(
        [random_blocks(torch.empty(1, 1, 800, 1), block=8, seed=seed)[0][0, 0, 2:98, -3:] for seed in range(50)]
    )
    counts = drawn.flatten().bincount(minlength=100)[1:99].double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 196


def test_an_expander_is_regular_and_connects_far_blocks_in_few_steps() -> None:
    blocks = 500
    table, full = expander_blocks(torch.empty(1, 1, blocks, 1), block=1, degree=8, hubs=0)
    assert full.shape == (1, 0)
    adjacent = torch.zeros(blocks, blocks).scatter(1, table[0, 0, :blocks], 1.0)
    assert torch.equal(adjacent, adjacent.T) and len(adjacent.sum(1).unique()) == 1
    reached, steps = torch.eye(blocks), 0
    while not reached.all():
        reached, steps = (reached @ adjacent).clamp(max=1), steps + 1
    assert steps <= 12  # in a ring of as many neighbours: 500 / 8


def test_hubs_see_and_are_seen_by_all() -> None:
    table, full = expander_blocks(torch.empty(1, 1, 90, 1), block=10, degree=2, hubs=2)
    assert full.tolist() == [[0, 1]] and all({0, 1} <= set(row) for row in rows_of(table)[:9])


def test_dynamic_blocks_find_the_block_that_a_query_looks_for() -> None:
    """Queries of row block 3 point at the keys of block 5, hidden among noise."""
    query, key, _ = operands(1, 40, groups=HEADS)
    query, key = query * 0.1, key * 0.1
    query[:, :, 12:16, 0] += 5
    key[:, :, 20:24, 0] += 5
    for options in ({"top_k": 1}, {"mass": 0.9}):
        assert rows_of(dynamic_blocks(query, key, rows=4, block=4, **options))[3] == [0, 3, 5]


def test_blocks_of_unlike_tokens_are_kept_and_see_all() -> None:
    query, key, _ = operands(1, 16, groups=HEADS)
    query[:], key[:] = 1.0, 1.0
    key[:, :, 8:10] *= -1  # half of block 2: their mean is zero
    query[:, :, 4:6] *= -1
    table = rows_of(dynamic_blocks(query, key, rows=4, block=4, top_k=1, similarity=0.5))
    assert table == [[0, 2], [0, 1, 2, 3], [0, 2], [0, 2, 3], []]
    assert rows_of(dynamic_blocks(query, key, rows=4, block=4, top_k=1))[3] == [0, 3]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"top_k": 11}, {"mass": 1.0}])
def test_dynamic_blocks_of_all_mass_are_attention(options: Options, causal: bool) -> None:
    query, key, value = operands(2, 41)
    mask = padding(2, 41)
    found = attend(made_by_content(**options, causal=causal), query, key, value, mask)
    expected = attention(query, key, value, key_mask=mask, right=0 if causal else None)
    close(found[0], expected[0])
    close(found[1, :, :21], expected[1, :, :21])  # what padding sees does not matter


def test_means_are_of_real_tokens_alone() -> None:
    query, key, _ = operands(1, 32)
    mask = normal(1, 32, seed=4) > -0.3
    noise = torch.where(mask[:, None, :, None], 0.0, 100.0)
    for causal in (False, True):
        options: Options = {"rows": 8, "block": 8, "mass": 0.5, "similarity": 0.2, "causal": causal}
        assert torch.equal(
            dynamic_blocks(query + noise, key - noise, mask, **options), dynamic_blocks(query, key, mask, **options)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: dynamic_blocks(q, q), "give a positive top_k or a mass"),
        (lambda q: dynamic_blocks(q, q, top_k=1, mass=0.5), "give a positive top_k or a mass"),
        (lambda q: dynamic_blocks(q, q, mass=1.5), "give a positive top_k or a mass"),
        (lambda q: expander_blocks(q, degree=3), "degree must be even"),
        (lambda q: random_blocks(q, window=0), "window must be positive"),
    ],
)
def test_wrong_numbers_are_refused(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 4, 2))
