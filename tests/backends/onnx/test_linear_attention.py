"""random_features, softmax_features and linear_attention in ONNX."""

from pathlib import Path

import pytest
import torch
from build import normal
from token_mixing import HEADS, SIZE, check_in_onnx, inputs, mixing, session
from torch import Tensor

from fxpress.ir.ops.linear_attention import linear_attention, random_features, softmax_features

SIZES = [(2, 6), (1, 1), (3, 40), (2, 101), (1, 64), (3, 257)]
WEIGHT, GAIN, PROJECTION = normal(HEADS, SIZE, 5), normal(HEADS), normal(16, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
@pytest.mark.parametrize("window", [0, 10, 16])
def test_learned_features(window: int, causal: bool, tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        features = softmax_features(query, WEIGHT), softmax_features(key, WEIGHT[: key.shape[1]])
        return linear_attention(query, key, value, *features, GAIN, key_mask, window, causal)

    check_in_onnx(mix, tmp_path, SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
def test_random_features(causal: bool, tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        rows = random_features(query, PROJECTION, None, "row")
        columns = random_features(key, PROJECTION, *((None, "fixed") if causal else (key_mask, "all")))
        return linear_attention(query, key, value, rows, columns, None, key_mask, 0, causal)

    check_in_onnx(mix, tmp_path, SIZES)


def test_no_tensor_of_all_queries_and_keys(tmp_path: Path) -> None:
    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        features = softmax_features(query, WEIGHT), softmax_features(key, WEIGHT[:1])
        return linear_attention(query, key, value, *features, GAIN, key_mask, 16)

    length = 2**17  # products of all pairs would take 64 GB
    x, key_mask = inputs(1, length)
    (found,) = session(mixing(mix, 1), tmp_path).run([x.numpy(), torch.ones_like(key_mask).numpy()])
    assert found.shape == (1, length, HEADS * SIZE) and abs(found).max() > 0
