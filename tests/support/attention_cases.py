"""Attention kernels in the interpreter against the operators' references: inputs, and the comparison."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from build import normal
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.equality import compare, widen
from fxpress.ir.ops.table import OPERATORS

LOWEST = torch.finfo(torch.float32).min


def inputs(
    num_queries: int, num_keys: int, heads: tuple[int, int] = (2, 2), dims: tuple[int, int] = (12, 20), batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value, of H and G heads and D and E dimensions."""
    sizes = ((heads[0], num_queries, dims[0]), (heads[1], num_keys, dims[0]), (heads[1], num_keys, dims[1]))
    query, key, value = (normal(batch, *size, seed=seed).to(dtype) for seed, size in enumerate(sizes))
    return query, key, value


def padded(batch: int, length: int, before: int, after: int) -> Tensor:
    """A key mask that hides the first and last keys of the first sample."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, :before] = False
    mask[0, max(length - after, 0) :] = False
    return mask


@contextmanager
def interpreted(module: Any, blocks: tuple[int, int] | None = (16, 16), splits: int | None = None) -> Iterator[None]:
    """New tensors are full of NaN, NumPy is quiet about those of the interpreter, and blocks are small."""
    empty, empty_like = torch.empty, torch.empty_like
    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=RuntimeWarning))
        stack.enter_context(patch("torch.empty", lambda *sizes, **options: empty(*sizes, **options).fill_(torch.nan)))
        stack.enter_context(patch("torch.empty_like", lambda like: empty_like(like).fill_(torch.nan)))
        if blocks is not None:
            config = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "num_warps": 4, "num_stages": 2}
            stack.enter_context(patch.object(module, "attention_configs", lambda *arguments: [config]))
        if splits is not None:
            stack.enter_context(patch.object(module, "attention_splits", lambda *sizes: splits))
        yield


def check(
    operator: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[int, int] | None = (16, 16),
    splits: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Run the kernel of the operator's name; its result, found equal to the reference."""
    reference = OPERATORS[operator].reference
    with interpreted(module, blocks, splits):
        found = getattr(module, reference.__name__)(query, key, value, **options)
    eager = reference(query, key, value, **options)
    wide = {name: widen(option) for name, option in options.items()}
    comparison = compare([found], [eager], [reference(*map(widen, (query, key, value)), **wide)])
    assert comparison.equal, comparison.reasons
    assert found.transpose(1, 2).is_contiguous()
    return found
