"""nystrom_attention and linformer_attention in ONNX."""

from pathlib import Path

import pytest
import torch
from build import normal
from token_mixing import HEADS, SIZE, Mix, check_in_onnx, inputs, mixing, session
from torch import Tensor

from fxpress.ir.ops.low_rank_attention import linformer_attention, nystrom_attention

SIZES = [(2, 6), (1, 1), (3, 40), (2, 101), (3, 257)]


def nystrom(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    return nystrom_attention(query, key, value, key_mask, 8)


def linformer(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    return linformer_attention(query, key, value, key_mask, None, 8)


def more_keys(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    return linformer_attention(
        query, torch.cat((key, key), 2), torch.cat((value, key), 2), torch.cat((key_mask, key_mask), 1), None, 8
    )


@pytest.mark.slow
@pytest.mark.parametrize("mix", [nystrom, linformer])
def test_equals_the_reference_at_every_length(mix: Mix, tmp_path: Path) -> None:
    check_in_onnx(mix, tmp_path, SIZES)


@pytest.mark.slow
def test_weighted_means(tmp_path: Path) -> None:
    weights = normal(HEADS, 2, SIZE)

    def mix(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        return linformer_attention(query, key, value, key_mask, weights, 8, 0.3)

    check_in_onnx(mix, tmp_path, SIZES)


@pytest.mark.slow
def test_other_keys_than_queries(tmp_path: Path) -> None:
    check_in_onnx(more_keys, tmp_path, [(2, 6), (3, 40), (2, 101)])


@pytest.mark.parametrize("mix", [nystrom, linformer])
def test_no_tensor_of_all_queries_and_keys(mix: Mix, tmp_path: Path) -> None:
    length = 2**17  # scores of all pairs would take 64 GB
    x, key_mask = inputs(1, length)
    (found,) = session(mixing(mix, 1), tmp_path).run([x.numpy(), torch.ones_like(key_mask).numpy()])
    assert found.shape == (1, length, HEADS * SIZE) and abs(found).max() > 0
