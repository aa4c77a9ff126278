"""Attention however it is spelled: every spelling becomes one operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import assert_equal, reasons, rewritten
from heads import (
    HEADS,
    LOWEST,
    SIZE,
    SIZES,
    WIDTH,
    additive,
    causal,
    examples,
    flat,
    keep,
    merge,
    qkv,
    repeat_kv,
    traced,
)  # fmt: skip

from fxpress.ir.graph import arguments
from fxpress.ir.ops.attention import attention
from fxpress.passes import Canonicalize

aten = torch.ops.aten


# --- spellings that are found: f(m, x [B, N, WIDTH], pad [B, N] True: a token, y [B, M, WIDTH]) ------------------


def sdpa(m, x, pad, y):
    return merge(F.scaled_dot_product_attention(*qkv(m, x)))


def sdpa_causal_with_scale(m, x, pad, y):
    return merge(F.scaled_dot_product_attention(*qkv(m, x), is_causal=True, scale=0.3))


def sdpa_boolean_mask(m, x, pad, y):
    return merge(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=keep(pad)))


def sdpa_additive_mask(m, x, pad, y):
    return merge(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=additive(pad)))


def sdpa_mask_of_minus_infinity(m, x, pad, y):
    bias = torch.zeros_like(keep(pad), dtype=x.dtype).masked_fill(~keep(pad), -math.inf)
    return merge(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=bias))


def sdpa_grouped_heads(m, x, pad, y):
    return merge(F.scaled_dot_product_attention(*qkv(m, x, groups=2), enable_gqa=True))


def sdpa_repeat_kv(m, x, pad, y):
    q, k, v = qkv(m, x, groups=2)
    return merge(F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=keep(pad)))


def sdpa_repeat_interleave(m, x, pad, y):
    q, k, v = qkv(m, x, groups=2)
    return merge(F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


def sdpa_single_head(m, x, pad, y):
    return F.scaled_dot_product_attention(F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v), attn_mask=causal(x))


def sdpa_multi_query(m, x, pad, y):
    return merge(F.scaled_dot_product_attention(*qkv(m, x, groups=1)))


def bert(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(SIZE) + additive(pad)
    return merge(F.dropout(F.softmax(scores, dim=-1), 0.1, False) @ v)


def scale_on_the_query(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((q * 0.7 @ k.mT).softmax(-1) @ v)


def scale_on_the_key(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((q @ (k.mT / 3)).softmax(-1) @ v)


def scale_on_both_as_in_whisper(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge(((q * SIZE**-0.25) @ (k * SIZE**-0.25).transpose(2, 3)).softmax(-1) @ v)


def scale_in_a_tensor_as_in_gptj(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((q @ k.mT / torch.sqrt(torch.tensor(float(SIZE)))).softmax(-1) @ v)


def no_scale_and_position_bias_as_in_t5(m, x, pad, y):
    q, k, v = qkv(m, x)
    distance = (torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]).clamp(-2, 2) + 2
    bias = F.embedding(distance, m.table).permute(2, 0, 1)[None]
    return merge((q @ k.mT + (bias + additive(pad))).softmax(-1) @ v)


def position_bias_and_mask_added_in_turn(m, x, pad, y):
    q, k, v = qkv(m, x)
    distance = (torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]).clamp(-2, 2) + 2
    scores = q @ k.mT + F.embedding(distance, m.table).permute(2, 0, 1)[None]
    return merge((scores + additive(pad)).softmax(-1) @ v)


def alibi_by_baddbmm_as_in_bloom(m, x, pad, y):
    q, k, v = qkv(m, x)
    batch, length = x.shape[:2]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[None, :, None, None]
    alibi = (slopes * torch.arange(length)).expand(batch, -1, -1, -1).reshape(batch * HEADS, 1, length)
    scores = alibi.baddbmm(flat(q), flat(k).transpose(1, 2), beta=1.0, alpha=SIZE**-0.5)
    scores = scores.view(batch, HEADS, length, length) + additive(pad)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype).view(batch * HEADS, length, length)
    return merge(torch.bmm(weights, flat(v)).view(batch, HEADS, length, SIZE))


def alibi_scaled_with_the_scores_as_in_falcon(m, x, pad, y):
    q, k, v = qkv(m, x)
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.0625])[None, :, None, None] * torch.arange(x.shape[1])
    scores = (q @ k.mT + alibi) * SIZE**-0.5
    return merge((scores + additive(pad, -1e9)).softmax(-1) @ v)


def softcap_as_in_gemma2(m, x, pad, y):
    q, k, v = qkv(m, x, groups=2)
    scores = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * 0.4
    scores = torch.tanh(scores / 5.0) * 5.0 + additive(pad)
    return merge(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ repeat_kv(v, 2))


def softcap_of_tanh_times_c(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((2.0 * torch.tanh(q @ k.mT)).softmax(-1) @ v)


def masked_fill_with_minus_infinity(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((q @ k.mT * 0.5).masked_fill(~keep(pad), -math.inf).softmax(-1) @ v)


def masked_fill_with_the_lowest_number_as_in_mpt(m, x, pad, y):
    q, k, v = qkv(m, x)
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * torch.arange(x.shape[1])
    scores = (q @ k.mT * 0.5 + alibi).masked_fill(~keep(pad), LOWEST)
    return merge(F.softmax(scores.float(), dim=-1).to(v.dtype) @ v)


def masked_fill_with_minus_1e9_where_the_mask_is_zero(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge((q @ k.mT * 0.5).masked_fill(keep(pad).long() == 0, -1e9).softmax(-1) @ v)


def masked_fill_then_scaled(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge(((q @ k.mT).masked_fill(~keep(pad), -1e9) * 0.5).softmax(-1) @ v)


def masked_fill_then_bias(m, x, pad, y):
    q, k, v = qkv(m, x)
    bias = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * torch.arange(x.shape[1])
    return merge(((q @ k.mT).masked_fill(~keep(pad), LOWEST) + bias).softmax(-1) @ v)


def masked_fill_with_minus_infinity_then_bias(m, x, pad, y):
    q, k, v = qkv(m, x)
    bias = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * torch.arange(x.shape[1])
    return merge(((q @ k.mT).masked_fill(~keep(pad), -math.inf) + bias).softmax(-1) @ v)


def where_as_in_gpt2(m, x, pad, y):
    q, k, v = qkv(m, x)
    lowest = torch.full([], LOWEST, dtype=x.dtype)
    return merge(torch.where(causal(x), q @ k.mT / SIZE**0.5, lowest).softmax(-1) @ v)


def where_of_the_masked_first(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge(torch.where(~keep(pad), -1e4, q @ k.mT).softmax(-1) @ v)


def mask_expanded_as_the_scores_as_in_xlm(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return merge(scores.masked_fill((~keep(pad)).expand_as(scores), LOWEST).softmax(-1) @ v)


def two_boolean_masks(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~causal(x), -math.inf).masked_fill(~keep(pad), -math.inf)
    return merge(scores.softmax(-1) @ v)


def bounded_from_below_as_in_opt(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT + additive(pad) + additive(pad)
    return merge(torch.max(scores, torch.tensor(LOWEST)).softmax(-1) @ v)


def mask_subtracted_as_in_xlnet(m, x, pad, y):
    q, k, v = (t.transpose(1, 2).transpose(0, 1) for t in qkv(m, x))
    scores = (torch.einsum("ibnd,jbnd->bnij", q, k) + 0) * 0.5 - 1e30 * torch.einsum("bj->bj", 1.0 - pad.float())[
        :, None, None
    ]
    return torch.einsum("bnij,jbnd->ibnd", scores.softmax(3), v)


def sinks_as_in_gpt_oss(m, x, pad, y):
    q, k, v = qkv(m, x, groups=2)
    scores = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * 0.5 + additive(pad)
    sinks = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    joined = torch.cat([scores, sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return merge(F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1] @ repeat_kv(v, 2))


def sinks_first(m, x, pad, y):
    q, k, v = qkv(m, x)
    sinks = m.sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return merge(torch.cat([sinks, q @ k.mT], -1).softmax(-1)[..., 1:] @ v)


def flattened_heads_by_bmm(m, x, pad, y):
    q, k, v = map(flat, qkv(m, x))
    mixed = torch.bmm(torch.bmm(q * 0.5, k.transpose(1, 2)).softmax(-1), v)
    return merge(mixed.view(x.shape[0], HEADS, -1, SIZE))


def flattened_heads_masked_in_4d_as_in_old_bart(m, x, pad, y):
    q, k, v = map(flat, qkv(m, x))
    batch, length = x.shape[:2]
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length) + additive(pad)
    weights = scores.view(batch * HEADS, length, length).softmax(-1)
    return merge(torch.bmm(weights, v).view(batch, HEADS, length, SIZE))


def heads_third_by_einsum(m, x, pad, y):
    q, k, v = (t.transpose(1, 2) for t in qkv(m, x))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~keep(pad), -1e9).softmax(-1), v).flatten(2)


def grouped_by_einsum(m, x, pad, y):
    q, k, v = qkv(m, x, groups=2)
    q = q.unflatten(1, (2, 2))
    scores = torch.einsum("bgrnd,bgmd->bgrnm", q, k) * 0.5
    return torch.einsum("bgrnm,bgmd->bngrd", scores.softmax(-1), v).flatten(2)


def grouped_by_view(m, x, pad, y):
    q, k, v = qkv(m, x, groups=2)
    q = q.reshape(x.shape[0], 2, 2, x.shape[1], SIZE)
    scores = q @ k.unsqueeze(2).mT * 0.5 + additive(pad).unsqueeze(1)
    return merge((scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2))


def multi_query(m, x, pad, y):
    q, k, v = qkv(m, x, groups=1)
    return merge((q @ k.mT).softmax(-1) @ v)


def multi_query_expanded(m, x, pad, y):
    q, k, v = qkv(m, x, groups=1)
    k, v = k.expand(-1, HEADS, -1, -1), v.repeat(1, HEADS, 1, 1)
    return merge((q @ k.mT).softmax(-1) @ v)


def cross_attention(m, x, pad, y):
    q, k, v = qkv(m, x, y)
    return merge((q @ k.mT * 0.5).softmax(-1) @ v)


def single_head(m, x, pad, y):
    scores = F.linear(x, m.q) @ F.linear(x, m.k).transpose(-2, -1) * 0.1
    return scores.masked_fill(~pad[:, None, :], -1e9).softmax(-1) @ F.linear(x, m.v)


def packed_by_chunk(m, x, pad, y):
    parts = F.linear(x, torch.cat([m.q, m.k, m.v])).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for t in parts)
    return merge((q @ k.mT).softmax(-1) @ v)


def packed_by_split(m, x, pad, y):
    parts = F.linear(x, torch.cat([m.q, m.k, m.v])).split(WIDTH, 2)
    q, k, v = (t.view(*t.shape[:2], HEADS, SIZE).permute(0, 2, 1, 3) for t in parts)
    return merge((q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v)


def packed_by_unbind_as_in_timm(m, x, pad, y):
    packed = F.linear(x, torch.cat([m.q, m.k, m.v])).reshape(x.shape[0], x.shape[1], 3, HEADS, SIZE)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return merge(((q * SIZE**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v)


def safe_softmax(m, x, pad, y):
    q, k, v = qkv(m, x)
    return merge(aten._safe_softmax((q @ k.mT).masked_fill(~keep(pad), -math.inf), -1) @ v)


def softmax_less_the_row_maximum(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -1e9)
    return merge((scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v)


def row_maximum_taken_off_as_in_layoutlmv3(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT + additive(pad)) / 32
    return merge(((scores - scores.amax(dim=-1).unsqueeze(-1)) * 32).softmax(-1) @ v)


def mask_multiplied_as_in_gpt(m, x, pad, y):
    q, k, v = qkv(m, x)
    allowed = keep(pad).to(x.dtype)
    return merge(((q @ k.mT) * allowed + -1e4 * (1 - allowed)).softmax(-1) @ v)


def sinks_by_logsumexp_as_in_granite(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT + additive(pad)
    share = (scores.logsumexp(-1) - m.sinks.view(1, -1, 1)).sigmoid()
    return merge((scores.softmax(-1) @ v) * share.unsqueeze(-1))


def cosine_similarity_as_in_swin2(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.sinks[:, None, None].exp()
    return merge((scores + additive(pad)).softmax(-1) @ v)


def windows_as_in_swin(m, x, pad, y):
    """Two windows in each row of the batch: scores are seen as [B, 2, H, N, N] for a mask of each window."""
    windows = torch.stack([x, x.flip(1)], 1).flatten(0, 1)
    q, k, v = qkv(m, windows)
    mask = torch.stack([causal(x), causal(x).T])[:, None].float().log().clamp(min=-100.0)
    scores = (q @ k.mT).view(x.shape[0], 2, HEADS, x.shape[1], x.shape[1]) + mask[None]
    return merge(scores.view(-1, HEADS, x.shape[1], x.shape[1]).softmax(-1) @ v)


def attention_over_frames_of_rank_5(m, x, pad, y):
    q, k, v = (torch.stack([t, t * 0.5], 1) for t in qkv(m, x))
    return (q @ k.mT).softmax(-1) @ v


FOUND = (
    sdpa, sdpa_causal_with_scale, sdpa_boolean_mask, sdpa_additive_mask, sdpa_mask_of_minus_infinity,
    sdpa_grouped_heads, sdpa_repeat_kv, sdpa_repeat_interleave, sdpa_single_head, sdpa_multi_query, bert,
    scale_on_the_query, scale_on_the_key, scale_on_both_as_in_whisper, scale_in_a_tensor_as_in_gptj,
    no_scale_and_position_bias_as_in_t5, position_bias_and_mask_added_in_turn, alibi_by_baddbmm_as_in_bloom,
    alibi_scaled_with_the_scores_as_in_falcon, softcap_as_in_gemma2, softcap_of_tanh_times_c,
    masked_fill_with_minus_infinity, masked_fill_with_the_lowest_number_as_in_mpt,
    masked_fill_with_minus_1e9_where_the_mask_is_zero, masked_fill_then_scaled, masked_fill_then_bias,
    masked_fill_with_minus_infinity_then_bias, where_as_in_gpt2, where_of_the_masked_first, two_boolean_masks,
    mask_expanded_as_the_scores_as_in_xlm,
    bounded_from_below_as_in_opt, mask_subtracted_as_in_xlnet, sinks_as_in_gpt_oss, sinks_first,
    flattened_heads_by_bmm, flattened_heads_masked_in_4d_as_in_old_bart, heads_third_by_einsum, grouped_by_einsum,
    grouped_by_view, multi_query, multi_query_expanded, cross_attention, single_head, packed_by_chunk,
    packed_by_split, packed_by_unbind_as_in_timm, safe_softmax, softmax_less_the_row_maximum,
    row_maximum_taken_off_as_in_layoutlmv3, mask_multiplied_as_in_gpt, sinks_by_logsumexp_as_in_granite,
    cosine_similarity_as_in_swin2, windows_as_in_swin, attention_over_frames_of_rank_5,
)  # fmt: skip


@pytest.mark.parametrize("spelling", FOUND, ids=lambda spelling: spelling.__name__)
def test_found(spelling: Callable[..., Any]) -> None:
    before = traced(spelling)
    after, result = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == 1, reasons(result, "attention")
    assert not after.calls(aten.softmax.int, aten._safe_softmax.default, aten.matmul.default)
    for batch, length in SIZES:
        assert_equal(before, after, examples(batch, length))
    assert rewritten(after, Canonicalize())[1].changes == 0


# --- what the operator has -------------------------------------------------------------------------------------

READ: dict[Callable[..., Any], dict[str, Any]] = {
    sdpa: {"scale": None, "empty": "zeros"},
    sdpa_causal_with_scale: {"scale": 0.3, "right": 0},
    sdpa_additive_mask: {"empty": "zeros"},
    bert: {"scale": SIZE**-0.5, "empty": "nan"},
    scale_on_the_query: {"scale": 0.7},
    scale_on_the_key: {"scale": 1 / 3},
    scale_on_both_as_in_whisper: {"scale": SIZE**-0.5},
    scale_in_a_tensor_as_in_gptj: {"scale": SIZE**-0.5},
    no_scale_and_position_bias_as_in_t5: {"scale": 1.0},
    alibi_by_baddbmm_as_in_bloom: {"scale": SIZE**-0.5},
    softcap_as_in_gemma2: {"scale": 0.4, "softcap": 5.0},
    softcap_of_tanh_times_c: {"scale": 2.0, "softcap": 2.0},
    masked_fill_with_minus_infinity: {"scale": 0.5, "empty": "nan"},
    masked_fill_with_minus_1e9_where_the_mask_is_zero: {"empty": "mean"},
    masked_fill_then_scaled: {"scale": 0.5, "empty": "mean"},
    where_as_in_gpt2: {"empty": "mean"},
    safe_softmax: {"empty": "zeros"},
    bounded_from_below_as_in_opt: {"empty": "mean"},
    sinks_as_in_gpt_oss: {"scale": 0.5, "empty": "zeros"},
}


@pytest.mark.parametrize("spelling", READ, ids=lambda spelling: spelling.__name__)
def test_numbers(spelling: Callable[..., Any]) -> None:
    found = operator_of(spelling)
    assert {name: found[name] for name in READ[spelling]} == pytest.approx(READ[spelling])


def operator_of(spelling: Callable[..., Any]) -> dict[str, Any]:
    """The operator's arguments, before its mask is read into the key mask and the band."""
    after, _ = rewritten(traced(spelling), Canonicalize(masks=False))
    return arguments(after.calls(attention)[0])


@pytest.mark.parametrize(
    "spelling", [masked_fill_with_minus_infinity, where_as_in_gpt2, two_boolean_masks, sdpa_boolean_mask]
)
def test_a_mask_that_only_fills_is_boolean(spelling: Callable[..., Any]) -> None:
    assert operator_of(spelling)["bias"].meta["val"].dtype is torch.bool


@pytest.mark.parametrize(
    "spelling", [sdpa_repeat_kv, sdpa_repeat_interleave, softcap_as_in_gemma2, grouped_by_einsum, grouped_by_view]
)
def test_repeated_heads_are_read_once(spelling: Callable[..., Any]) -> None:
    found = operator_of(spelling)
    assert [found[name].meta["val"].shape[1] for name in ("query", "key", "value")] == [4, 2, 2]


@pytest.mark.parametrize("spelling", [multi_query, multi_query_expanded, sdpa_multi_query])
def test_one_key_head_for_all(spelling: Callable[..., Any]) -> None:
    found = operator_of(spelling)
    assert [found[name].meta["val"].shape[1] for name in ("query", "key", "value")] == [4, 1, 1]


@pytest.mark.parametrize("spelling", [flattened_heads_by_bmm, flattened_heads_masked_in_4d_as_in_old_bart])
def test_flattened_heads_are_heads(spelling: Callable[..., Any]) -> None:
    assert operator_of(spelling)["query"].meta["val"].shape[1] == HEADS


@pytest.mark.parametrize("spelling", [packed_by_chunk, packed_by_split, packed_by_unbind_as_in_timm])
def test_packed_projections_are_one_linear(spelling: Callable[..., Any]) -> None:
    after, _ = rewritten(traced(spelling), Canonicalize())
    assert len(after.calls(aten.linear.default)) == 1
    assert not after.calls(aten.chunk.default, aten.split.Tensor, aten.unbind.int)


# --- half precision --------------------------------------------------------------------------------------------


def upcast_scores(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + additive(pad, torch.finfo(x.dtype).min).to(x.dtype)
    return merge(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v)


def upcast_queries_as_in_gptj(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q.float() @ k.float().transpose(-1, -2) / 2.0
    return merge(scores.masked_fill(~keep(pad), LOWEST).softmax(-1).to(v.dtype) @ v)


def scores_filled_then_upcast(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT * 0.5).masked_fill(~keep(pad), torch.finfo(x.dtype).min)
    return merge(scores.float().softmax(-1).to(v.dtype) @ v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    "spelling", [sdpa, scale_on_the_query, upcast_scores, upcast_queries_as_in_gptj, scores_filled_then_upcast]
)
def test_half_precision(spelling: Callable[..., Any], dtype: torch.dtype) -> None:
    before = traced(spelling, dtype)
    after, result = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == 1, reasons(result, "attention")
    assert not after.calls(aten.softmax.int)
    for batch, length in ((1, 9), (3, 1)) if spelling is upcast_scores else SIZES:
        assert_equal(before, after, examples(batch, length, dtype))
