"""Aligning tokens: padding at the beginning of a sample is moved to its end, and back."""

from __future__ import annotations

import torch
from build import normal

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.align import align_tokens

MASK = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


def test_the_first_real_token_comes_first() -> None:
    x = normal(3, 2, 5, 4)
    found = align_tokens(x, MASK)
    assert torch.equal(found[0], x[0].roll(-2, 1)) and torch.equal(found[1:], x[1:])


def test_masks_are_aligned_alike() -> None:
    assert align_tokens(MASK, MASK).tolist() == [[True, True] + [False] * 3, [True] * 5, [False] * 5]


def test_back_undoes_it() -> None:
    x = normal(3, 2, 5, 4)
    assert torch.equal(align_tokens(align_tokens(x, MASK), MASK, True), x)


def test_gradients() -> None:
    x = normal(3, 2, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda item: align_tokens(item, MASK), (x,))
