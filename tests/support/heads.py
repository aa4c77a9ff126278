"""A layer of attention heads for tests: its projections, masks, weights and examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor

from fxpress.ir.graph import Program

HEADS, SIZE = 4, 3  # an odd head size
WIDTH = HEADS * SIZE
SIZES = ((2, 5), (3, 8), (1, 1), (1, 3), (2, 1))  # batch and length
LOWEST = torch.finfo(torch.float32).min


def project(m: Any, x: Tensor, name: str, heads: int = HEADS) -> Tensor:
    """[B, N, WIDTH] -> [B, heads, N, SIZE]."""
    return F.linear(x, getattr(m, name)[: heads * SIZE]).view(x.shape[0], x.shape[1], heads, SIZE).transpose(1, 2)


def qkv(m: Any, x: Tensor, y: Tensor | None = None, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    y = x if y is None else y
    return project(m, x, "q"), project(m, y, "k", groups), project(m, y, "v", groups)


def merge(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def keep(pad: Tensor) -> Tensor:
    """A padding mask [B, M] for scores [B, H, N, M]."""
    return pad[:, None, None, :]


def causal(x: Tensor) -> Tensor:
    length = x.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=x.device).tril()


def additive(pad: Tensor, value: float = LOWEST) -> Tensor:
    return (1.0 - keep(pad).float()) * value


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, groups, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, groups, times, length, size).reshape(batch, groups * times, length, size)


def flat(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B * H, N, D]."""
    return x.reshape(-1, x.shape[2], x.shape[3])


WEIGHTS = {
    **{name: normal(WIDTH, WIDTH, seed=seed) * 0.3 for seed, name in enumerate("qkv")},
    "table": normal(5, HEADS, seed=4),
    "sinks": normal(HEADS, seed=5),
}


def examples(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, a padding mask that ends one row early and masks the last of several rows throughout, and y."""
    pad = torch.ones(batch, length, dtype=torch.bool)
    pad[0, (length + 1) // 2 :] = False
    pad[1:][-1:] = False
    return [normal(batch, length, WIDTH, dtype=dtype), pad, normal(batch, length + 2, WIDTH, dtype=dtype, seed=1)]


@functools.cache
def traced(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Program:
    return program(function, *examples(2, 5, dtype), **{name: tensor.to(dtype) for name, tensor in WEIGHTS.items()})
