"""SparseGPT: zeros in a weight whose other numbers make up for them (Frantar and Alistarh, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.sweep import sweep
from .select import Pattern, blocks, lowest, n_of_m

BLOCK = 128  # columns that are chosen together; an n:m group, or a block's width, at a time with these patterns


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern, *, damp: float = 0.01, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The weight [N, K] with zeros, and the mask, False where they are.

    Columns are visited from left to right. Before a block of them, the numbers of it whose loss costs least, as the
    columns before left them, are chosen; then each column is masked, and those to come are moved to make up for it.

    Args:
        weight: [N, K], float; computed in fp32, fp64 stays.
        gram: [K, K], sum x^T x over the inputs x of calibration tokens.
        sparsity: the share of zeros; met exactly by "unstructured", to one block of a column of blocks by "blocks".
        damp: see `sweep`.
        block: see `BLOCK`.

    Raises:
        ValueError: what `sweep` raises.
    """
    values = weight if weight.dtype == torch.float64 else weight.float()
    keep = torch.ones_like(values, dtype=torch.bool)
    dead = gram.diagonal() == 0  # what multiplies nothing but zeros costs nothing
    step = {"n:m": pattern.of, "blocks": pattern.block}.get(pattern.kind, block)

    def enter(columns: Tensor, pivots: Tensor, indices: Tensor) -> None:
        cost = (columns / pivots).square().masked_fill(dead[indices], 0)
        if pattern.kind == "n:m":
            chosen = n_of_m(cost, pattern.keep, pattern.of)
        elif pattern.kind == "blocks":
            chosen = blocks(cost, sparsity, pattern.block)
        else:
            first, last = int(indices[0]), int(indices[-1]) + 1
            zeros = round(sparsity * len(values) * last) - round(sparsity * len(values) * first)
            chosen = lowest([cost], zeros / cost.numel())[0]
        keep[:, indices] = chosen

    def project(column: Tensor, index: int) -> Tensor:
        return torch.where(keep[:, index], column, 0)

    return sweep(values, gram, project, enter=enter, damp=damp, block=step), keep


def refit(weight: Tensor, gram: Tensor, keep: Tensor, *, damp: float = 0.01, block: int = BLOCK) -> Tensor:
    """The weight with zeros where `keep` is False, whose other numbers make up for them as far as the order lets them.

    Shapes and errors as in `sparsegpt`.
    """
    values = weight if weight.dtype == torch.float64 else weight.float()
    return sweep(values, gram, lambda column, index: torch.where(keep[:, index], column, 0), damp=damp, block=block)
