"""Calls of every operator of the graph language, small and odd-sized, for tests of what lowers them."""

from __future__ import annotations

from typing import Any

import torch
from build import normal
from torch import Tensor

from fxpress.ir.ops.sparse import pack_sparse24
from fxpress.ir.ops.table import OPERATORS

BY_NAME = {entry.name: target for target, entry in OPERATORS.items()}
LENGTH = 13


def heads(seed: int, groups: int = 4) -> Tensor:
    """[2, groups, 13, 8] as a projection leaves it: heads are no axis of memory."""
    return normal(2, LENGTH, groups, 8, seed=seed).transpose(1, 2)


def int8(*sizes: int, seed: int = 0) -> Tensor:
    return (normal(*sizes, seed=seed) * 40).round().clamp(-128, 127).to(torch.int8)


def float8(*sizes: int) -> Tensor:
    return (normal(*sizes) * 100).to(torch.float8_e4m3fn)


def sparse24(*sizes: int, seed: int = 0) -> Tensor:
    """Of each four neighbours, two are zero."""
    fours = normal(*sizes, seed=seed).half().reshape(-1, 4)
    return fours.scatter(-1, fours.abs().argsort(-1)[:, :2], 0.0).reshape(sizes)


def fixed(*sizes: int) -> Tensor:
    """Numbers in fixed point."""
    return (normal(*sizes) * 65536).to(torch.int32)


def places(width: int) -> Tensor:
    """[2, 4, 2, 3, width] of tokens: for each head, in two rounds of three chunks."""
    return torch.randint(0, LENGTH, (2, 4, 2, 3, width), generator=torch.Generator().manual_seed(width))


first = torch.arange(3).expand(2, 4, 2, 3, 3)
mask = torch.ones(2, LENGTH, dtype=torch.bool)
mask[1, 9:] = False
q, k, v = heads(0), heads(1), heads(2)
grouped_k, grouped_v = heads(1, 2), heads(2, 2)
q_row, k_row, v_row = (normal(1, 22, 4, 8, seed=seed).transpose(1, 2) for seed in range(3))  # the tokens of `mask`
x = normal(3, 5, 16)
positive = normal(2, 4, LENGTH, 6, seed=5).abs()
weight, other = normal(7, 16, seed=1), normal(7, 16, seed=2)
bias = normal(7, seed=3)
large = torch.tensor(1 << 20)
table = torch.randint(0, 5, (2, 4, 4, 2), generator=torch.Generator().manual_seed(0))

nibbles = torch.arange(56).reshape(7, 8).to(torch.uint8) * 4

CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("attention", (q, k, v), {}),
    ("attention", (q, grouped_k, grouped_v), {"key_mask": mask, "right": 0}),
    ("attention", (q, k, v, normal(4, LENGTH, LENGTH)), {"left": 3, "scale": 0.2, "softcap": 5.0}),
    ("attention", (q, k, v, normal(2, 1, 1, LENGTH) > 0), {"sinks": normal(4)}),
    ("attention", (q, k, v), {"left": -20, "empty": "nan"}),
    ("attention", (q, k, v), {"key_mask": torch.zeros_like(mask), "empty": "mean"}),
    ("int8_attention", (q, grouped_k, grouped_v), {"right": 0}),
    ("int8_attention", (q, k, v, None, mask), {"scale": 0.2, "ranges": torch.full((3,), 0.03)}),
    ("window_attention", (q, k, v, mask), {"left": 3, "right": 3, "globals": 1}),
    ("window_attention", (q, k, v), {"left": 3, "causal": True, "dilation": 2}),
    ("block_attention", (q, k, v, table, None, mask, 4, 4), {}),
    ("random_blocks", (q, mask, 4), {}),
    ("expander_blocks", (q, mask, 4), {}),
    ("dynamic_blocks", (q, k, mask, 4, 4, 2), {}),
    ("conv_attention", (v, normal(4, 3).softmax(-1), mask), {}),
    ("linear_attention", (q, k, v, positive, positive.flip(2), None, mask), {}),
    ("linear_attention", (q, k, v, positive, positive.flip(2), None, None, 4, True), {}),
    ("random_features", (q, normal(6, 8), mask), {}),
    ("softmax_features", (q, normal(4, 8, 6)), {}),
    ("nystrom_attention", (q, k, v, mask, 4), {}),
    ("linformer_attention", (q, k, v, mask, None, 4), {}),
    ("lsh_attention", (q, k, v, normal(4, 8, 2, 2), mask, 4), {}),
    ("gathered_attention", (q, grouped_k, grouped_v, places(3), places(8), first, first + 4, 0.4, True), {}),
    ("pseudo_inverse", (normal(2, 3, 5, 5).softmax(-1),), {}),
    ("align_tokens", (q, mask), {}),
    ("align_tokens", (normal(2, LENGTH), mask, True), {}),
    ("pool_tokens", (normal(2, LENGTH, 8), mask), {}),
    ("pool_mask", (mask,), {}),
    ("unpool_tokens", (normal(2, 7, 8), normal(2, LENGTH, 8)), {}),
    ("pack_tokens", (normal(2, LENGTH, 8), mask.flatten().nonzero()[:, 0]), {}),
    ("unpack_tokens", (normal(1, 22, 8), mask), {}),
    ("packed_attention", (q_row, k_row[:, :2], v_row[:, :2], mask), {}),
    ("packed_attention", (q_row, k_row, v_row, mask), {"causal": True, "scale": 0.2, "softcap": 5.0}),
    ("rms_norm", (x, normal(16), 1e-6), {}),
    ("add_rms_norm", (x, x.flip(0), normal(16), 1e-6), {}),
    ("add_layer_norm", (x, x.flip(0), normal(16), normal(16, seed=1), 1e-6), {}),
    ("rotary", (q, normal(1, 1, LENGTH, 8), normal(1, 1, LENGTH, 8, seed=1)), {}),
    ("linear_act", (x, weight, bias, "gelu"), {}),
    ("gated_linear", (x, weight, other, None, bias, "silu"), {}),
    ("mlp", (x, weight, bias, normal(16, 7), None, "relu"), {}),
    ("mlp", (x, weight, None, normal(16, 7), normal(16), "gelu_tanh", other), {}),
    ("split_linear", (x, weight, bias, [2, 5]), {}),
    ("quantize", (x * 50, torch.tensor(0.5)), {"stored": True}),
    ("dequantize", (int8(5, 16), normal(5, 1).abs()), {}),
    ("dynamic_quantize", (x, "token"), {}),
    ("dynamic_quantize", (x, "tensor"), {"stored": True}),
    ("int8_linear", (int8(3, 5, 16), normal(3, 5, 1).abs(), None, int8(7, 16), normal(7, 1).abs(), bias), {}),
    ("int8_linear", (int8(3, 16), torch.tensor(0.1), torch.tensor(3.0), int8(7, 16), normal(7, 1).abs(), None), {}),
    ("int4_linear", (x, torch.arange(56).reshape(7, 8).to(torch.uint8) * 4, normal(7, 4).abs(), None, bias), {}),
    ("int4_linear", (x, torch.arange(56).reshape(7, 8).to(torch.uint8), normal(7, 2), int8(7, 2) // 32, None), {}),
    ("expand_int4", (nibbles, int8(7, 4).clamp(1, 15), None, 16), {}),
    ("expand_int4", (nibbles, int8(7, 2).clamp(1, 11), int8(7, 2) // 32, 15), {}),
    ("int8_weight_linear", (x, int8(7, 16), normal(7, 1).abs(), None, bias), {}),
    ("int8_weight_linear", (x, int8(7, 16), normal(7, 4).abs(), int8(7, 4) // 8, None), {}),
    ("sparse24_linear", (x.half(), *pack_sparse24(sparse24(7, 16)), bias.half()), {}),
    ("sparse24_linear", (normal(70, 20).half(), *pack_sparse24(w20 := sparse24(7, 20)), None, w20), {}),
    ("int4_embedding", (nibbles, normal(7, 4).abs(), None, torch.tensor([[0, 6], [3, 3]]), 16), {}),
    ("int4_embedding", (nibbles, normal(7, 2).abs(), int8(7, 2) // 32, torch.tensor([5, 0]), 15), {}),
    ("float8_quantize", (x * 50, normal(3, 5, 1).abs()), {}),
    ("float8_scale", (x,), {}),
    ("float8_linear", (x, float8(7, 16), normal(7).abs(), bias), {}),
    ("float8_linear", (x, float8(7, 16), normal(7).abs(), None, True), {}),
    ("float8_products", (float8(3, 5, 16), float8(7, 16)), {}),
    ("requantize", (int8(3, 8), large, 22, None, -128, 127), {}),
    ("integer_add", (int8(3, 8), int8(3, 8, seed=1), large, large // 3, 22, -128, 127), {}),
    ("integer_linear", (int8(3, 5, 16), int8(7, 16, seed=1), torch.arange(7, dtype=torch.int32)), {}),
    ("integer_matmul", (int8(2, 3, 16), int8(2, 16, 5)), {}),
    ("integer_matmul", (int8(2, 3, 16).to(torch.int32).abs() * 300, int8(2, 16, 5)), {}),
    ("integer_gelu", (fixed(3, 8),), {}),
    ("integer_softmax", (fixed(2, 2, 5, 5),), {"right": 0}),
    ("integer_layer_norm", (fixed(3, 8) // 64, fixed(8), fixed(8), 5), {}),
]


def alibi(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores lowered by the distance, in each head by another slope (Press et al., 2021)."""
    rows, columns = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    return BY_NAME["attention"](query, key, value, (columns - rows).abs() * self.slopes[:, None, None])  # type: ignore[operator]
