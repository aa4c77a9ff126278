"""pool_tokens, pool_mask and unpool_tokens in ONNX."""

from pathlib import Path

import pytest
from token_mixing import check_in_onnx
from torch import Tensor

from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.pool import pool_mask, pool_tokens, unpool_tokens

SIZES = [(2, 6), (1, 1), (3, 2), (3, 40), (2, 101)]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_equals_the_reference_at_every_length(stride: int, tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        few = pool_tokens(query, key_mask, stride)
        mask = pool_mask(key_mask, stride)
        pooled = attention(few, pool_tokens(key, None, stride), pool_tokens(value, key_mask, stride), key_mask=mask)
        return unpool_tokens(pooled, query, stride)

    check_in_onnx(mix, tmp_path, SIZES, groups=4)
