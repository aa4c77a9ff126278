"""Pooling tokens and up-sampling them: against loops, and against transformers' Funnel."""

from __future__ import annotations

import pytest
import torch
from build import normal
from torch import Tensor
from transformers import FunnelConfig
from transformers.models.funnel.modeling_funnel import FunnelAttentionStructure, upsample

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.pool import pool_mask, pool_tokens, unpool_tokens


def mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_the_first_stays_and_the_others_are_means_of_neighbours(length: int, stride: int) -> None:
    x = normal(2, length, 3)
    expected = [x[:, 0]] + [x[:, start : start + stride].mean(1) for start in range(1, length, stride)]
    close(pool_tokens(x, None, stride), torch.stack(expected, 1))


def test_heads_are_pooled_alike() -> None:
    x, key_mask = normal(2, 4, 7, 3), mask("xxxxxxx", "xxxx...")
    close(pool_tokens(x, key_mask), torch.stack([pool_tokens(x[:, head], key_mask) for head in range(4)], 1))


def test_padding_does_not_dilute_means() -> None:
    x = normal(1, 6, 3)
    close(pool_tokens(x, mask("xxxx.."))[:, 2], x[:, 3])


def test_what_is_all_padding_is_the_mean_of_that() -> None:
    x = normal(1, 5, 3)
    close(pool_tokens(x, mask("xxx.."))[:, 2], x[:, 3:].mean(1))


def test_a_pooled_token_is_real_where_one_of_its_tokens_is() -> None:
    assert torch.equal(pool_mask(mask("xxxx..", "x.....", "......")), mask("xxx.", "x...", "...."))


def test_up_sampling_repeats() -> None:
    pooled = normal(1, 4, 3)
    close(unpool_tokens(pooled, normal(1, 6, 9)), pooled[:, [0, 1, 1, 2, 2, 3]])


def test_stride_of_one_is_the_identity() -> None:
    x, key_mask = normal(2, 5, 3), mask("xxxxx", "xx...")
    assert torch.equal(pool_tokens(x, key_mask, 1), x) and torch.equal(pool_mask(key_mask, 1), key_mask)


def test_gradients() -> None:
    x, key_mask = normal(2, 5, 3, dtype=torch.float64).requires_grad_(), mask("xxxxx", "xx...")
    assert torch.autograd.gradcheck(lambda item: unpool_tokens(pool_tokens(item, key_mask), item), (x,))


@pytest.mark.parametrize("length", [2, 7, 8])
def test_means_are_those_of_funnel(length: int) -> None:
    """Funnel with `separate_cls` and without `truncate_seq`, which would drop the last token of an even length.

    It differs where there is padding: its means take it in, and a pooled token of which one is padding is padding.
    """
    structure = FunnelAttentionStructure(FunnelConfig(separate_cls=True, truncate_seq=False))
    x = normal(2, length, 3)
    close(pool_tokens(x), structure.pool_tensor(x, mode="mean", stride=2))


@pytest.mark.parametrize("length", [3, 7, 8])
def test_up_sampling_is_that_of_funnel(length: int) -> None:
    x = normal(2, length, 3)
    pooled = pool_tokens(x)
    close(
        unpool_tokens(pooled, x), upsample(pooled, stride=2, target_len=length, separate_cls=True, truncate_seq=False)
    )
