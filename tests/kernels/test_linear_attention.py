"""Linear attention in chunks, in the interpreter, against fxpress::linear_attention."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from attention_cases import check, inputs, interpreted, padded
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.ops import linear_attention as op
from fxpress.kernels import linear_attention as kernels

SMALL = {"BLOCK_N": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": 2}


def equal(query: Tensor, key: Tensor, value: Tensor, small: bool = True, **options: Any) -> Tensor:
    config = kernels.linear_attention_config
    replaced = (lambda *sizes: ({"BLOCK_M": 16, **SMALL}, SMALL)) if small else config
    with patch.object(kernels, "linear_attention_config", replaced):
        return check(op.linear_attention, kernels, query, key, value, blocks=None, **options)


def features(query: Tensor, key: Tensor, size: int) -> dict[str, Tensor]:
    """Features of queries and keys, not negative."""
    made = (normal(*x.shape[:3], size, seed=7 + place).exp() for place, x in enumerate((query, key)))
    query_features, key_features = (x.to(query.dtype) for x in made)
    return {"query_features": query_features, "key_features": key_features}


@settings(max_examples=15)
@given(data=st.data())
def test_it_is_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    length = draw(st.integers(1, 70))
    heads = draw(st.sampled_from([(1, 1), (2, 1)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    query, key, value = inputs(length, length, heads, (draw(st.integers(1, 20)), draw(st.integers(1, 20))), 2, dtype)
    if draw(st.booleans()):  # heads third in memory, as a model's projections leave them
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    mask = padded(2, length, draw(st.integers(0, 30)), draw(st.integers(0, 70)))
    equal(
        query,
        key,
        value,
        **features(query, key, draw(st.integers(1, 20))),
        gain=normal(heads[0], dtype=dtype) if draw(st.booleans()) else None,
        key_mask=mask if draw(st.booleans()) else None,
        window=draw(st.sampled_from([0, 0, 1, 3, 16, 20, 90])),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, -0.5])),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_several_chunks(window: int, causal: bool, dtype: torch.dtype) -> None:
    query, key, value = inputs(50, 50, (2, 1), (8, 20), 1, dtype)
    mask = padded(1, 50, 3, 7)
    equal(query, key, value, **features(query, key, 20), key_mask=mask, window=window, causal=causal)


@pytest.mark.parametrize(("window", "causal"), [(0, False), (0, True), (30, False)])
def test_tiles_of_the_real_size(window: int, causal: bool) -> None:
    query, key, value = inputs(140, 140, (1, 1), (24, 40), 1, torch.float16)
    equal(query, key, value, small=False, **features(query, key, 70), gain=normal(1), window=window, causal=causal)


@pytest.mark.parametrize("window", [0, 4, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_no_key(window: int, causal: bool) -> None:
    query, key, value = inputs(37, 37, dims=(4, 4))
    mask = torch.stack([torch.zeros(37, dtype=torch.bool), torch.arange(37) > 20])
    options = {**features(query, key, 6), "key_mask": mask, "window": window, "causal": causal}
    assert (equal(query, key, value, **options)[0] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_sums_beyond_half_precision(causal: bool) -> None:
    query, key, value = (x * 30 for x in inputs(90, 90, (1, 1), (4, 16), 1, torch.float16))
    found = features(query, key, 16)
    found = {
        "query_features": found["query_features"] * 1e-3,
        "key_features": found["key_features"].clamp(max=12) * 5e3,
    }
    assert equal(query, key, value, **found, causal=causal).isfinite().all()


def test_features_that_are_nothing() -> None:
    query, key, value = inputs(40, 40)
    found = features(query, key, 6)
    found["key_features"][..., :3] = 0
    equal(query, key, value, **found, causal=True)
    found["query_features"][..., 3:] = 0
    assert (equal(query, key, value, **found) == 0).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.flatten().repeat(2)[1 : 1 + x.numel()].view(x.shape),
        lambda x: x[:, :1].expand(x.shape),
    ],
    ids=["columns", "every second", "unaligned", "expanded"],
)  # fmt: skip
def test_layouts(view: Any) -> None:
    query, key, value = inputs(40, 40, batch=1)
    found = {name: view(x) for name, x in features(query, key, 6).items()}
    mask = (normal(40, 1) > -0.5).T
    equal(view(query), view(key), view(value), **found, key_mask=mask, window=4)


def test_features_of_another_dtype() -> None:
    query, key, value = inputs(40, 40, dtype=torch.float16)
    found = {name: x.float() for name, x in features(query, key, 6).items()}
    equal(query, key, value, **found, causal=True)


@pytest.mark.parametrize("window", [0, 4])
def test_later_tokens_have_no_part(window: int) -> None:
    query, key, value = inputs(60, 60, batch=1)
    found = features(query, key, 6)
    before = equal(query, key, value, **found, window=window, causal=True)
    for tensor in (key, value, found["key_features"]):
        tensor[:, :, 50:] = math.nan
    with (
        interpreted(kernels, None),
        patch.object(kernels, "linear_attention_config", lambda *sizes: ({"BLOCK_M": 16, **SMALL}, SMALL)),
    ):
        after = kernels.linear_attention(query, key, value, **found, window=window, causal=True)
    assert torch.equal(after[:, :, :48], before[:, :, :48])


def test_offsets_that_need_64_bits(tmp_path: Path) -> None:
    stride = 2**27 + 3
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=18 * stride, dtype=torch.float16)
    tensors = [memory[start:].as_strided((1, 1, 18, 4), (1, 1, stride, 1)) for start in (0, 4, 8, 12, 16)]
    for seed, tensor in enumerate(tensors):
        tensor.copy_(normal(*tensor.shape, seed=seed).abs())
    query, key, value, query_features, key_features = tensors
    equal(query, key, value, query_features=query_features, key_features=key_features, window=2)


def test_no_tokens() -> None:
    query, key, value = inputs(0, 0)
    assert kernels.linear_attention(query, key, value, query, key).shape == (2, 2, 0, 20)


def test_chunks_are_multiples_of_the_window() -> None:
    assert kernels.linear_attention_chunk(4096, 128, 64, 0, True, 64) == (128, 32, 1)
    assert kernels.linear_attention_chunk(4096, 128, 64, 64, True, 64) == (64, 64, 1)
    assert kernels.linear_attention_chunk(4096, 128, 64, 30, False, 64) == (90, 46, 2)
    assert kernels.linear_attention_chunk(4096, 128, 64, 3000, False, 64)[2] == 0
    assert kernels.linear_attention_chunk(4096, 128, 64, 0, False, 64) == (256, 1, 1)
