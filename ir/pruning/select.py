"""From scores to masks: which numbers of weights stay, the lowest scores being masked, with exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """How the zeros of a weight may lie.

    Attributes:
        kind: "unstructured", "n:m" or "blocks".
        keep, of: of an n:m pattern: `keep` numbers stay of each `of` neighbours in a row.
        block: of blocks: their height and width.
    """

    kind: str
    keep: int = 0
    of: int = 0
    block: int = 0

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a weight [rows, columns] cannot have the pattern."""
        if self.kind == "n:m" and columns % self.of:
            return f"{columns} inputs are no multiple of {self.of}"
        if self.kind == "blocks" and (rows % self.block or columns % self.block):
            return f"{rows} x {columns} numbers are not made of blocks of {self.block} x {self.block}"
        return None


def mask(scores: Tensor, sparsity: float, pattern: Pattern, by_row: bool = False) -> Tensor:
    """Booleans [N, K], True for what stays.

    Args:
        scores: [N, K]; the lowest go. Equal ones go from the front.
        by_row: every row loses the same share (Wanda), to one number.
    """
    if pattern.kind == "n:m":
        return n_of_m(scores, pattern.keep, pattern.of)
    if pattern.kind == "blocks":
        return blocks(scores, sparsity, pattern.block)
    return rows(scores, sparsity) if by_row else lowest([scores], sparsity)[0]


def lowest(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Booleans for several scores, False for the lowest of all together: exactly round(sparsity * count)."""
    if not scores:
        return []
    flat = torch.cat([item.flatten() for item in scores])
    keep = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    keep[torch.argsort(flat, stable=True)[: round(sparsity * len(flat))]] = False
    parts = keep.split([item.numel() for item in scores])
    return [part.reshape(item.shape) for part, item in zip(parts, scores, strict=True)]


def rows(scores: Tensor, sparsity: float) -> Tensor:
    """Booleans [N, K], False for the lowest of each row; as many in all as `lowest` would take."""
    ranks = torch.argsort(torch.argsort(scores, dim=1, stable=True), dim=1)
    return ranks >= shares(sparsity, len(scores), scores.shape[1]).to(scores.device).unsqueeze(1)


def shares(sparsity: float, parts: int, size: int) -> Tensor:
    """[parts], how many go from each of so many parts of one size, so that every sum from the front is right."""
    total = [round(sparsity * (size * count)) for count in range(parts + 1)]
    return torch.tensor([after - before for before, after in pairwise(total)])


def n_of_m(scores: Tensor, keep: int, of: int) -> Tensor:
    """Booleans [N, K], True for the `keep` highest of each `of` neighbours in a row; K is a multiple of `of`."""
    groups = scores.reshape(len(scores), -1, of)
    ranks = torch.argsort(torch.argsort(groups, dim=2, stable=True), dim=2)
    return (ranks >= of - keep).reshape(scores.shape)


def whole(flags: Tensor, pattern: Pattern) -> Tensor:
    """Booleans [N, K]; with blocks, True only where all of a block is."""
    if pattern.kind != "blocks":
        return flags
    size = pattern.block
    tiles = flags.reshape(len(flags) // size, size, flags.shape[1] // size, size).all(3).all(1)
    return tiles.repeat_interleave(size, 0).repeat_interleave(size, 1)


def blocks(scores: Tensor, sparsity: float, size: int) -> Tensor:
    """Booleans [N, K], False for the square blocks with the lowest sums; N and K are multiples of `size`."""
    height, width = len(scores) // size, scores.shape[1] // size
    sums = scores.reshape(height, size, width, size).sum((1, 3))
    return lowest([sums], sparsity)[0].repeat_interleave(size, 0).repeat_interleave(size, 1)
