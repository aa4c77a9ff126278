"""window_attention in ONNX, in one piece and in blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from token_mixing import HEADS, SIZE, check_in_onnx, inputs, mixing, session
from torch import Tensor

from fxpress.ir.ops.window_attention import window_attention

SIZES = [(2, 6), (1, 1), (3, 40), (2, 101), (1, 64), (3, 257)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"left": 3, "right": 2, "globals": 2},
        {"left": 5, "right": 0, "globals": 3, "causal": True},
        {"left": 2, "right": 2, "dilation": 2, "scale": 0.3},
        {"left": 2, "right": 2, "scale": -0.3},
        {"left": 2, "right": 2, "globals": 1, "dilation": 3, "softcap": 2.0},
        {"left": 0, "right": 0, "globals": 1},
    ],
    ids=["global", "sinks", "dilation", "negative scale", "all", "star without ring"],
)
def test_equals_the_reference_at_every_length(options: dict[str, Any], tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        return window_attention(query, key, value, key_mask, **options)

    check_in_onnx(mix, tmp_path, SIZES)


def test_no_tensor_of_all_queries_and_keys(tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        return window_attention(query, key, value, key_mask, 3, 3, 2)

    length = 2**17  # a boolean mask of all pairs would take 16 GB
    x, key_mask = inputs(1, length)
    (found,) = session(mixing(mix, 1), tmp_path).run([x.numpy(), torch.ones_like(key_mask).numpy()])
    assert found.shape == (1, length, HEADS * SIZE) and abs(found).max() > 0
