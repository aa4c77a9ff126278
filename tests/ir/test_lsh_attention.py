"""Hashed attention against loops that follow its definition, exact attention, and Reformer's own module."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.lsh_attention import gathered_attention, lsh_attention, random_rotations

FORMS = list(product([False, True], [False, True]))  # shared, causal
forms = pytest.mark.parametrize(("shared", "causal"), FORMS)
OWN = -1e5


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def inputs(length: int, heads: int = 4, groups: int = 2, batch: int = 2, size: int = 8) -> tuple[Tensor, ...]:
    query = normal(batch, heads, length, size)
    return query, normal(batch, groups, length, size, seed=1), normal(batch, groups, length, 6, seed=2)


def padding(batch: int, length: int) -> Tensor:
    """A key mask with holes, its last sample full."""
    mask = normal(batch, length, seed=3) > -0.7
    mask[-1] = True
    return mask


def buckets(vectors: Tensor, rotations: Tensor, chunk: int) -> list[int]:
    """Of the tokens of one sample [n, D] by one rotation [D, R]."""
    columns = min(-(-len(vectors) // chunk), rotations.shape[1])
    rotated = vectors @ rotations[:, :columns]
    several = len(vectors) > chunk
    return [int(torch.cat((row, -row)).argmax()) if several else 0 for row in rotated]


def seen_by(
    query_buckets: list[list[int]], key_buckets: list[list[int]], turn: int, chunk: int, shared: bool, causal: bool
) -> list[list[int]]:
    """Which of a sample's n tokens each of them sees in a round, without its own key where queries are not keys."""
    bucket, of_key = query_buckets[turn], key_buckets[turn]
    count = len(bucket)

    def ordered(values: list[int]) -> list[int]:
        return sorted(range(count), key=lambda token: (values[token], token))

    order, keys = ordered(bucket), ordered(of_key)
    if causal:
        past = [[key for key in keys if of_key[key] == bucket[token] and key <= token] for token in range(count)]
        return [seen[-chunk:] for seen in past]
    seen: list[list[int]] = [[] for _ in range(count)]
    for start in range(0, count, chunk):
        some = order[start : start + chunk]
        if shared:
            last = ordered(query_buckets[turn - 1])[max(chunk, count - chunk) :]  # of the round before
            window = (order[start - chunk : start] if start else last) + some
        else:
            aims = []
            for token in (some[0], some[-1]):
                queries = [other for other in order if bucket[other] == bucket[token]]
                here = sum(of_key[key] == bucket[token] for key in keys)
                before = sum(of_key[key] < bucket[token] for key in keys)
                aims.append(before + (2 * queries.index(token) + 1) * here // (2 * len(queries)))
            first = max(min((sum(aims) + 1) // 2 - chunk, count - 2 * chunk), 0)
            window = keys[first : first + 2 * chunk]
        for token in some:
            seen[token] = window
    return seen


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, rotations: Tensor, mask: Tensor, chunk: int, shared: bool, causal: bool
) -> Tensor:
    """The definition, a token at a time."""
    batch, heads, length, size = query.shape
    result = torch.zeros(batch, heads, length, value.shape[3])
    for b, h in product(range(batch), range(heads)):
        places = mask[b].nonzero()[:, 0]
        group = h * key.shape[1] // heads
        q, k, v = query[b, h, places], key[b, group, places], value[b, group, places]
        turns = rotations[h % len(rotations)].unbind(1)
        query_buckets = [buckets(q, turn, chunk) for turn in turns]
        key_buckets = query_buckets if shared else [buckets(k, turn, chunk) for turn in turns]
        every: list[list[int]] = [[] for _ in places]
        for turn in range(len(turns)):
            for token, seen in enumerate(seen_by(query_buckets, key_buckets, turn, chunk, shared, causal)):
                every[token] += seen if shared or token in seen else [*seen, token]
        for token, seen in enumerate(every):
            scores = k[seen] @ q[token] * size**-0.5
            if shared:
                scores[torch.tensor(seen) == token] = OWN
            result[b, h, places[token]] = torch.softmax(scores, 0) @ v[seen]
    return result


@forms
@pytest.mark.parametrize("heads", [4, 1])
def test_equals_its_definition(shared: bool, causal: bool, heads: int) -> None:
    q, k, v = inputs(45)
    rotations, mask = random_rotations(heads, 8, 3, 4), padding(2, 45)
    found = lsh_attention(q, k, v, rotations, mask, 4, shared, causal)
    close(found, by_loops(q, k, v, rotations, mask, 4, shared, causal))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    each=st.integers(1, 2),
    length=st.integers(1, 20),
    chunk=st.integers(1, 8),
    rounds=st.integers(1, 3),
    columns=st.integers(1, 5),
    form=st.sampled_from(FORMS),
)
def test_equals_its_definition_at_every_size(
    batch: int, groups: int, each: int, length: int, chunk: int, rounds: int, columns: int, form: tuple[bool, bool]
) -> None:
    q, k, v = inputs(length, groups * each, groups, batch, 5)
    rotations, mask = random_rotations(groups * each, 5, rounds, columns), padding(batch, length)
    close(lsh_attention(q, k, v, rotations, mask, chunk, *form), by_loops(q, k, v, rotations, mask, chunk, *form))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_one_bucket_is_exact_attention(causal: bool, length: int) -> None:
    q, k, v = inputs(length)
    mask = padding(2, length)
    mask[:, 0] = True
    found = lsh_attention(q, k, v, random_rotations(4, 8, 2, 8), mask, 16, causal=causal)
    exact = attention(q, k, v, key_mask=mask, right=0 if causal else None)
    close(found, exact * mask[:, None, :, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_one_bucket_of_queries_that_are_keys_is_attention_to_all_others(causal: bool, length: int) -> None:
    """But for the first token of a causal sequence, or the only one, which has no other."""
    q, k, v = inputs(length)
    found = lsh_attention(q, k, v, random_rotations(4, 8, 2, 8), None, 16, True, causal)
    others = ~torch.eye(length, dtype=torch.bool)
    if causal or length == 1:
        others[0, 0] = True
    close(found, attention(q, k, v, bias=others, right=0 if causal else None))


@forms
def test_padding_changes_nothing(shared: bool, causal: bool) -> None:
    tensors = inputs(45)
    rotations, mask = random_rotations(4, 8, 3, 64), padding(2, 45)
    alone = lsh_attention(*tensors, rotations, mask, 4, shared, causal)
    wide = [F.pad(tensor, (0, 0, 0, 200), value=3.0) for tensor in tensors]
    padded = lsh_attention(*wide, rotations, F.pad(mask, (0, 200)), 4, shared, causal)
    close(padded[:, :, :45], alone)
    assert not padded[:, :, 45:].any()


@pytest.mark.parametrize("shared", [False, True])
def test_no_token_changes_what_comes_before_it(shared: bool) -> None:
    """Not through what earlier queries see, either: a token moves all after it in the sorted order."""
    q, k, v = inputs(60)
    rotations = random_rotations(4, 8, 2, 6)
    before = lsh_attention(q, k, v, rotations, None, 6, shared, causal=True)
    for place in (1, 7, 30, 59):
        changed = [tensor.clone() for tensor in (q, k, v)]
        for tensor in changed:
            tensor[:, :, place] = -2 * tensor[:, :, place]
        after = lsh_attention(*changed, rotations, None, 6, shared, causal=True)
        close(after[:, :, :place], before[:, :, :place])
        assert not torch.allclose(after[:, :, place], before[:, :, place])


@forms
def test_a_sample_of_padding_gives_zeros(shared: bool, causal: bool) -> None:
    mask = torch.zeros(2, 9, dtype=torch.bool)
    assert not lsh_attention(*inputs(9), random_rotations(4, 8, 2, 4), mask, 2, shared, causal).any()


def test_scale() -> None:
    q, k, v = inputs(20)
    rotations = random_rotations(4, 8, 2, 4)
    close(
        lsh_attention(q, k, v, rotations, chunk=4, scale=0.1), lsh_attention(q * 0.1 * 8**0.5, k, v, rotations, chunk=4)
    )


def test_half_precision_is_rounded_once() -> None:
    q, k, v = (tensor.half() for tensor in inputs(20))
    rotations = random_rotations(4, 8, 2, 4)
    wide = lsh_attention(q.float(), k.float(), v.float(), rotations, chunk=4)
    assert torch.equal(lsh_attention(q, k, v, rotations, chunk=4), wide.half())


def test_no_empty_chunks() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1, found 0"):
        lsh_attention(*inputs(3), random_rotations(4, 8, 2, 4), chunk=0)


def test_rotations_are_those_of_the_seed() -> None:
    assert torch.equal(random_rotations(2, 4, 3, 5, seed=7), random_rotations(2, 4, 3, 5, seed=7))
    assert not torch.equal(random_rotations(2, 4, 3, 5, seed=7), random_rotations(2, 4, 3, 5, seed=8))


@forms
def test_gradient(shared: bool, causal: bool) -> None:
    """Where no bucket changes: gradcheck's steps are small enough here."""
    tensors = [tensor.double().requires_grad_() for tensor in inputs(7, 2, 1, 1, 3)]
    rotations = random_rotations(2, 3, 2, 4).double()
    assert torch.autograd.gradcheck(lambda q, k, v: lsh_attention(q, k, v, rotations, None, 2, shared, causal), tensors)


@pytest.mark.parametrize("shared", [False, True])
def test_gathered_attention_equals_its_definition(shared: bool) -> None:
    query, key, value = inputs(9, batch=1)
    random = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, 9, (1, 4, 2, 2, size), generator=random) for size in (3, 5))
    first, end = (torch.randint(low, low + 3, (1, 4, 2, 2, 3), generator=random) for low in (0, 3))
    totals, found = gathered_attention(query, key, value, rows, columns, first, end, 0.4, shared)
    for head, turn, chunk, row in product(range(4), range(2), range(2), range(3)):
        at = 0, head, turn, chunk
        i, seen = rows[at][row], columns[at][first[at][row] : end[at][row]]
        scores = 0.4 * key[0, head // 2, seen] @ query[0, head, i]
        scores = torch.where((seen == i) & shared, -1e5, scores)
        close(totals[at][row], scores.logsumexp(0))
        close(found[at][row], scores.softmax(0) @ value[0, head // 2, seen])


def test_equals_reformer() -> None:
    """transformers' LSHSelfAttention with the same weights and rotations.

    Without padding, at lengths that its chunk divides, and not causal. Elsewhere they differ: it cannot take other
    lengths, it sets the number of buckets by the padded length and sorts padding into the last chunks, so a padded
    sentence gets other results; and where its chunks begin depends on later tokens, which `causal` does not allow.
    """
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    heads, size, length, chunk, rounds = 2, 8, 64, 8, 3
    config = ReformerConfig(
        hidden_size=heads * size, num_attention_heads=heads, attention_head_size=size, attn_layers=["lsh"],
        lsh_attn_chunk_length=chunk, num_hashes=rounds, num_buckets=2 * length // chunk, hash_seed=3, is_decoder=False,
        axial_pos_embds=False,
    )  # fmt: skip
    torch.manual_seed(0)
    module = reformer.LSHSelfAttention(config).eval()
    hidden = normal(2, length, heads * size)
    with torch.no_grad():
        expected = module(hidden).hidden_states
        query, value = (
            layer(hidden).unflatten(-1, (heads, size)).transpose(1, 2) for layer in (module.query_key, module.value)
        )
        rotations = random_rotations(heads, size, rounds, length // chunk, seed=3)
        found = lsh_attention(query, module._len_norm(query), value, rotations, None, chunk, shared=True)
    close(found.transpose(1, 2).flatten(2), expected)
