"""What is nearly attention, and says why it is not; attention of all shapes, and that of Hugging Face's models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import assert_equal, check, normal, program, reasons, rewritten
from heads import LOWEST, additive, causal, examples, keep, merge, qkv, traced
from sampled import sampled
from torch import Tensor

from fxpress.compiler.trace import trace
from fxpress.ir.graph import arguments
from fxpress.ir.ops.attention import attention
from fxpress.passes import Canonicalize

# --- near misses: each with the reason -------------------------------------------------------------------------


def weights_returned(m, x, pad, y):
    q, k, v = qkv(m, x)
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def scores_read_too(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return (scores * 0.5).softmax(-1) @ v, scores.exp()


def probabilities_used_twice(m, x, pad, y):
    q, k, v = qkv(m, x)
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ v.flip(2)


def softmax_over_the_queries(m, x, pad, y):
    q, k, v = qkv(m, x)
    return (q @ k.mT).softmax(-2) @ v


def mask_after_the_softmax(m, x, pad, y):
    q, k, v = qkv(m, x)
    return (q @ k.mT).softmax(-1).masked_fill(~keep(pad), 0.0) @ v


def head_mask(m, x, pad, y):
    q, k, v = qkv(m, x)
    return ((q @ k.mT).softmax(-1) * m.sinks[:, None, None]) @ v


def active_dropout(m, x, pad, y):
    q, k, v = qkv(m, x)
    return F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v


def sdpa_dropout(m, x, pad, y):
    return F.scaled_dot_product_attention(*qkv(m, x), dropout_p=0.2)


def masked_too_little(m, x, pad, y):
    q, k, v = qkv(m, x)
    return (q @ k.mT).masked_fill(~keep(pad), -100.0).softmax(-1) @ v


def masked_with_a_tensor(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return torch.where(keep(pad), scores, q.sum(-1, keepdim=True)).softmax(-1) @ v


def masks_of_different_values(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~causal(x), -math.inf).masked_fill(~keep(pad), -1e9)
    return scores.softmax(-1) @ v


def bias_after_a_finite_fill(m, x, pad, y):
    q, k, v = qkv(m, x)
    return ((q @ k.mT).masked_fill(~keep(pad), -1e4) + m.sinks[:, None, None]).softmax(-1) @ v


def fill_that_overflows(m, x, pad, y):
    q, k, v = qkv(m, x)
    return ((q @ k.mT).masked_fill(~keep(pad), LOWEST) * 2.0).softmax(-1) @ v


def fill_that_a_bias_may_reach(m, x, pad, y):
    q, k, v = qkv(m, x)
    return (q @ k.mT + y[:, None, 2:, :1].mT).masked_fill(~causal(x), -1e4).softmax(-1) @ v


def bias_that_adds_an_axis(m, x, pad, y):
    q, k, v = F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v)
    return (q @ k.mT + m.sinks[:, None, None, None]).softmax(-1) @ v


def mask_before_the_soft_cap(m, x, pad, y):
    q, k, v = qkv(m, x)
    return (torch.tanh((q @ k.mT + additive(pad, -100.0)) / 5.0) * 5.0).softmax(-1) @ v


def scale_of_each_key(m, x, pad, y):
    q, k, v = qkv(m, x)
    return ((q @ k.mT) * k.sum(-1)[:, :, None, :]).softmax(-1) @ v


def probabilities_second(m, x, pad, y):
    q, k, v = qkv(m, x)
    return v.mT @ (q @ k.mT).softmax(-1).mT


def pooling_without_queries(m, x, pad, y):
    return F.linear(x, m.q).softmax(-1) @ m.v


def scores_changed_in_between(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return scores.index_fill(3, torch.tensor([0]), 0.0).softmax(-1) @ v


def sinks_that_are_not_dropped(m, x, pad, y):
    q, k, v = qkv(m, x)
    sinks = m.sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., 1:] @ v


def softmax_in_double_precision(m, x, pad, y):
    q, k, v = qkv(m, x)
    return (q @ k.mT).softmax(-1, dtype=torch.float64).to(v.dtype) @ v


def multiplied_by_no_mask(m, x, pad, y):
    q, k, v = qkv(m, x)
    half = keep(pad).to(x.dtype) * 0.5
    return ((q @ k.mT) * half + -1e4 * (1 - half)).softmax(-1) @ v


def shared_with_sinks_of_other_scores(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    share = ((scores * 2).logsumexp(-1) - m.sinks.view(1, -1, 1)).sigmoid()
    return (scores.softmax(-1) @ v) * share.unsqueeze(-1)


def row_maximum_before_the_soft_cap(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return (torch.tanh((scores - scores.amax(-1, keepdim=True)) / 5.0) * 5.0).softmax(-1) @ v


def row_maximum_before_the_sinks(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    sinks = m.sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([scores - scores.amax(-1, keepdim=True), sinks], -1).softmax(-1)[..., :-1] @ v


def row_maximum_before_the_logsumexp_of_sinks(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    scores = scores - scores.amax(-1, keepdim=True)
    share = (scores.logsumexp(-1) - m.sinks.view(1, -1, 1)).sigmoid()
    return (scores.softmax(-1) @ v) * share.unsqueeze(-1)


def row_maximum_before_the_bound(m, x, pad, y):
    q, k, v = qkv(m, x)
    scores = (q @ k.mT).masked_fill(~keep(pad), -math.inf)
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).softmax(-1) @ v


def sinks_twice(m, x, pad, y):
    q, k, v = qkv(m, x)
    sinks = m.sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    scores = torch.cat([q @ k.mT, sinks], -1)
    share = (scores.logsumexp(-1) - m.sinks.view(1, -1, 1)).sigmoid()
    return (scores.softmax(-1)[..., :-1] @ v) * share.unsqueeze(-1)


def shared_with_sinks_by(m, x, scores):
    share = (scores.logsumexp(-1) - m.sinks.view(1, -1, 1)).sigmoid()
    return (scores.softmax(-1) @ qkv(m, x)[2]) * share.unsqueeze(-1)


def shared_with_sinks_and_filled_with_minus_infinity(m, x, pad, y):
    q, k, _ = qkv(m, x)
    return shared_with_sinks_by(m, x, (q @ k.mT).masked_fill(~keep(pad), -math.inf))


def shared_with_sinks_and_biased_by_minus_infinity(m, x, pad, y):
    q, k, _ = qkv(m, x)
    return shared_with_sinks_by(m, x, q @ k.mT + torch.where(keep(pad), 0.0, -math.inf))


def shared_with_sinks_and_masked_twice(m, x, pad, y):
    """Together the two masks are lower than the lowest number."""
    q, k, _ = qkv(m, x)
    return shared_with_sinks_by(m, x, q @ k.mT + additive(pad) + additive(pad))


NEAR_MISSES: dict[Callable[..., Any], str] = {
    weights_returned: "softmax is returned by the model",
    scores_read_too: "matmul is also read by exp",
    probabilities_used_twice: "softmax is also read by matmul_2",
    softmax_over_the_queries: "softmax is over axis -2 of 4, expected the last",
    mask_after_the_softmax: "masked_fill (aten.masked_fill.Scalar) changes the probabilities after the softmax",
    head_mask: "mul (aten.mul.Tensor) changes the probabilities after the softmax",
    active_dropout: "dropout drops probabilities with p=0.1",
    sdpa_dropout: "dropout 0.2 on the attention weights",
    masked_too_little: "masked_fill fills masked scores with -100, expected at most -10000",
    masked_with_a_tensor: "where fills masked scores with sum_1 (aten.sum.dim_IntList), expected a number",
    masks_of_different_values: "masks fill with different values: [-inf, -1000000000.0]",
    bias_after_a_finite_fill: "a bias is added to scores that are filled with -10000",
    fill_that_overflows: "masked_fill fills masked scores with -3.40282e+38, which overflows when it is scaled",
    fill_that_a_bias_may_reach: "a bias that may itself be as low as -10000, with which scores are filled",
    bias_that_adds_an_axis: "broadcasts the scores",
    mask_before_the_soft_cap: "stands before the soft cap, expected masks after it",
    scale_of_each_key: "expected one number for each row",
    probabilities_second: "softmax is the second operand of matmul_1, expected the first",
    pooling_without_queries: "expected the product of queries and keys, found linear (aten.linear.default)",
    scores_changed_in_between: "expected the product of queries and keys, found index_fill",
    sinks_that_are_not_dropped: "expected the column of the sinks to be dropped from cat",
    multiplied_by_no_mask: "mul_1 scales the scores by mul (aten.mul.Tensor), expected one number",
    shared_with_sinks_of_other_scores: "logsumexp is not that of the scores of softmax",
    shared_with_sinks_and_filled_with_minus_infinity: "NaN where a mask of -inf leaves no key, expected a finite one",
    shared_with_sinks_and_biased_by_minus_infinity: "NaN where a mask of -inf leaves no key, expected a finite one",
    shared_with_sinks_and_masked_twice: "NaN where a mask of -inf leaves no key, expected a finite one",
    row_maximum_before_the_soft_cap: "takes each row's maximum off the scores, which changes what the soft cap gives",
    row_maximum_before_the_sinks: "takes each row's maximum off the scores, which changes the share of the sinks",
    row_maximum_before_the_logsumexp_of_sinks: "maximum off the scores, which changes the share of the sinks",
    row_maximum_before_the_bound: "maximum off the scores, which changes a row of -inf, which the bound then misses",
    sinks_twice: "cat joins sinks to scores that have sinks",
    softmax_in_double_precision: "softmax computes in float64",
}


def shared_with_sinks_and_filled(m, x, pad, y):
    q, k, _ = qkv(m, x)
    return shared_with_sinks_by(m, x, (q @ k.mT).masked_fill(~keep(pad), -1e9))


def shared_with_sinks_and_filled_in_a_bias(m, x, pad, y):
    q, k, _ = qkv(m, x)
    bias = torch.zeros_like(pad, dtype=x.dtype).masked_fill(~pad, LOWEST)
    return shared_with_sinks_by(m, x, q @ k.mT + keep(bias) + m.sinks[:, None, None])


def shared_with_sinks_and_chosen_bias(m, x, pad, y):
    q, k, _ = qkv(m, x)
    return shared_with_sinks_by(m, x, q @ k.mT + torch.where(keep(pad) & causal(x), torch.tensor(0.0), LOWEST))


@pytest.mark.parametrize(
    "spelling",
    [shared_with_sinks_and_filled, shared_with_sinks_and_filled_in_a_bias, shared_with_sinks_and_chosen_bias],
)
def test_a_finite_mask_beside_shared_sinks(spelling: Callable[..., Any]) -> None:
    before = traced(spelling)
    after, result = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == 1, reasons(result, "attention")
    assert_equal(before, after, examples(3, 8))


@pytest.mark.parametrize("spelling", NEAR_MISSES, ids=lambda spelling: spelling.__name__)
def test_near_miss(spelling: Callable[..., Any]) -> None:
    before = traced(spelling)
    after, result = rewritten(before, Canonicalize())
    assert not after.calls(attention)
    assert any(NEAR_MISSES[spelling] in found for found in reasons(result, "attention")), reasons(result, "attention")
    assert_equal(before, after, examples(3, 8))


def three(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def scaled_key_and_value(m, x, pad, y):
    q, k, _ = qkv(m, x)
    both = k * 0.5
    return merge(F.scaled_dot_product_attention(q, both, both))


def scaled_query_and_key(m, x, pad, y):
    q, _, v = qkv(m, x)
    q = q * 0.7
    return merge((q @ q.mT).softmax(-1) @ v)


def scaled_query_and_value(m, x, pad, y):
    q, k, _ = qkv(m, x)
    q = q * 0.7
    return merge((q @ k.mT).softmax(-1) @ q)


@pytest.mark.parametrize("spelling", [scaled_key_and_value, scaled_query_and_key, scaled_query_and_value])
def test_a_scale_that_two_operands_share_stays(spelling: Callable[..., Any]) -> None:
    before = traced(spelling)
    after, _ = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == 1
    assert_equal(before, after, examples(3, 8))


def test_every_axis_may_be_dynamic() -> None:
    before = program(lambda m, x: F.scaled_dot_product_attention(x, x, x), normal(2, 4, 5, 8))
    after, _ = check(before, Canonicalize())
    assert len(after.calls(attention)) == 1


@pytest.mark.parametrize(
    "shapes",
    [((2, 4, 5, 8), (1, 4, 6, 8), (2, 4, 6, 3)), ((2, 4, 5, 8), (2, 1, 6, 8), (2, 4, 6, 8)),
     ((2, 1, 5, 8), (2, 4, 6, 8), (2, 1, 6, 8)), ((2, 4, 5, 8), (6, 8), (6, 8)), ((5, 8), (6, 8), (6, 8))],
    ids=["batch", "key_heads", "query_heads", "no_batch", "matrices"],
)  # fmt: skip
def test_operands_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    before = program(lambda m, q, k, v: (q @ k.mT).softmax(-1) @ v, *three(*shapes), dynamic=None)
    after, result = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == 1, reasons(result, "attention")
    assert_equal(before, after, three(*shapes))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((6, 5, 8), (1, 5, 8), (6, 5, 8)), "a key of shape [1, 8, 5] for scores of shape [6, 5, 5]"),
        (((2, 3, 4, 5, 8), (2, 3, 1, 5, 8), (2, 3, 4, 5, 8)), "a key of shape [2, 3, 1, 8, 5] for scores of shape"),
        (((2, 3, 4, 5, 8), (2, 3, 4, 5, 8), (2, 3, 1, 5, 8)), "a value of shape [2, 3, 1, 5, 8] for scores of shape"),
        (((2, 2, 2, 2, 5, 8),) * 3, "scores of rank 6, expected at most 5"),
    ],
    ids=["flat_key", "grouped_key_alone", "grouped_value_alone", "rank_6"],
)
def test_shapes_that_are_refused(shapes: tuple[tuple[int, ...], ...], reason: str) -> None:
    before = program(lambda m, q, k, v: (q @ k.mT).softmax(-1) @ v, *three(*shapes), dynamic=None)
    after, result = rewritten(before, Canonicalize())
    assert not after.calls(attention)
    assert any(reason in found for found in reasons(result, "attention")), reasons(result, "attention")


def test_a_mask_in_fp32_stays_as_it_is_for_halves() -> None:
    """Cast to fp16 its least numbers would be infinities, and a row of them another result."""
    mask = normal(5, 5)
    mask[:, 3:] = mask[2] = torch.finfo(torch.float32).min
    tensors = [*three(*[(2, 4, 5, 8)] * 3, dtype=torch.float16), mask]
    before = program(lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), *tensors, dynamic=None)
    after, result = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == 1, reasons(result, "attention")
    assert not after.calls(torch.ops.aten._to_copy.default)
    assert_equal(before, after, tensors)


def filled_by_where(m, q, k, v, keep):
    return torch.where(keep, q @ k.mT, -1e9).softmax(-1) @ v


def filled_with_a_tensor(m, q, k, v, keep):
    return torch.where(keep, q @ k.mT, torch.full((), -1e9)).softmax(-1) @ v


def multiplied_and_added(m, q, k, v, keep):
    return (q @ k.mT * keep.to(q.dtype) + -1e9 * (1 - keep.to(q.dtype))).softmax(-1) @ v


@pytest.mark.parametrize(
    "spelling", [filled_by_where, filled_with_a_tensor, multiplied_and_added], ids=lambda spelling: spelling.__name__
)
def test_a_fill_that_float16_cannot_hold_is_infinite(spelling: Callable[..., Any]) -> None:
    """So a row without any key gives NaN, not the mean of the values."""
    keys = torch.tensor([True, True, False]).expand(2, 1, 1, 3).clone()
    given = [*three(*[(2, 4, 3, 8)] * 3, dtype=torch.float16), keys]
    before = program(spelling, *given, dynamic=None)
    after, result = rewritten(before, Canonicalize())
    (found,) = after.calls(attention)
    assert arguments(found)["empty"] == "nan", reasons(result, "attention")
    keys[0] = False
    assert after.run(given)[0][0].isnan().all() and before.run(given)[0][0].isnan().all()


def added_to_causal(m, q, k, v, mask):
    return (q @ k.mT + torch.full((5, 5), LOWEST).triu(1) + mask).softmax(-1) @ v


def added_to_causal_for_sdpa(m, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, torch.full((5, 5), LOWEST).triu(1) + mask)


def filled_with_the_lowest_number(m, q, k, v, mask):
    return (q @ k.mT + mask).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), LOWEST).softmax(-1) @ v


def filled_with_minus_1e9(m, q, k, v, mask):
    return (q @ k.mT + mask).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e9).softmax(-1) @ v


def filled_before_it_is_added(m, q, k, v, mask):
    return (q @ k.mT).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), LOWEST).add(mask).softmax(-1) @ v


@pytest.mark.parametrize("low", [LOWEST, -math.inf, -1e9, -1e4], ids=["lowest", "infinite", "-1e9", "-1e4"])
@pytest.mark.parametrize(
    "spelling",
    [added_to_causal, added_to_causal_for_sdpa, filled_with_the_lowest_number, filled_with_minus_1e9,
     filled_before_it_is_added],
    ids=lambda spelling: spelling.__name__,
)  # fmt: skip
def test_a_user_may_hide_all_keys_that_a_causal_mask_leaves(spelling: Callable[..., Any], low: float) -> None:
    """By an input that is added, as left padding does for the first queries: which of both hides more, then shows."""
    given = [*three(*[(2, 4, 5, 8)] * 3), torch.zeros(2, 1, 1, 5)]
    before = program(spelling, *given, dynamic=None)
    after, _ = rewritten(before, Canonicalize())
    given[3][0, ..., :2] = low
    assert_equal(before, after, given)


def test_a_matmul_without_a_softmax_is_no_near_miss() -> None:
    _, result = rewritten(traced(lambda m, x, pad, y: x @ y.mT @ y), Canonicalize())
    assert not reasons(result, "attention")


def test_a_trained_scale_stays_trained() -> None:
    """A scale that is a parameter must not become a number: training goes on after the rewrite."""

    def scaled(m: Any, x: Tensor, pad: Tensor, y: Tensor) -> Tensor:
        q, k, v = qkv(m, x)
        return merge((q @ k.mT * m.sinks[:1].reshape(())).softmax(-1) @ v)

    after, _ = rewritten(traced(scaled), Canonicalize())
    assert len(after.calls(attention)) == 1
    assert "sinks" in dict(after.module.named_parameters())


# --- Hugging Face's eager attention ----------------------------------------------------------------------------

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
FACES: dict[str, tuple[dict[str, Any], int]] = {  # configuration, and the number of attentions
    "Bert": (SMALL, 1),
    "GPT2": (GPT, 1),
    "T5": ({"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}, 3),
    "OPT": ({**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, 1),
    "Bloom": ({"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 4}, 1),
    "Falcon": ({**SMALL, "alibi": True, "multi_query": False}, 1),
    "Gemma2": ({**GROUPED, "head_dim": 8, "sliding_window": 4}, 1),
    "Llama": (GROUPED, 1),
    "Mistral": ({**GROUPED, "sliding_window": 4}, 1),
    "Phi": (SMALL, 1),
    "GPTNeoX": (SMALL, 1),
    "GptOss": ({**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, 1),
    "Mpt": ({"vocab_size": 99, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}, 1),
    "GPTJ": ({**GPT, "rotary_dim": 4}, 1),
    "XGLM": ({"vocab_size": 99, "d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}, 1),
    "XLNet": ({"vocab_size": 99, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}, 1),
    "XLM": ({"vocab_size": 99, "emb_dim": 32, "n_layers": 1, "n_heads": 4}, 1),
    "GPTBigCode": (GPT, 1),
    "DebertaV2": ({**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, 1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(FACES, many=("Llama", "Phi", "GPTNeoX", "XGLM", "GPTBigCode")))
def test_eager_attention_of_hugging_face(name: str) -> None:
    import transformers

    options, count = FACES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    config.use_cache = False
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.set_attn_implementation("eager")
    before = trace(model, ((), token_ids(name, 2, 12)))
    after, result = rewritten(before, Canonicalize())
    assert len(after.calls(attention)) == count, reasons(result, "attention")
    for batch, length in ((2, 12), (3, 17)):
        assert_equal(before, after, before.signature.bind((), token_ids(name, batch, length)))


def token_ids(name: str, batch: int, length: int) -> dict[str, Tensor]:
    """Token ids and a mask that pads the last third of the last row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(length))
    decoder = {"decoder_input_ids": ids[:, : length // 2]} if name == "T5" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}
