"""MaskWeights on a program that is masked already: what is zero counts, and goes first."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import tiny
from build import program, rewritten
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.pruning.masks import masked
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, MaskWeights

TEXTS = [list(tiny.inputs(3, length).values()) for length in (6, 9, 7)]


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].square().mean() + outputs[0][..., 0].mean()


@functools.cache
def thinned(fold: bool) -> Program:
    """One Transformer layer with a tenth of its weights gone; not to be changed."""
    canonical = rewritten(program(tiny.encoder(), *tiny.inputs().values()), Canonicalize())[0]
    return rewritten(canonical, MaskWeights(0.1, "random", seed=1, fold=fold))[0]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt", "fisher", "movement"])
def test_zeros_of_before_are_among_those_of_now(method: str, pattern: str, fold: bool) -> None:
    options = {"loss": loss} if method == "movement" else {}
    second = MaskWeights(0.5, method, pattern, scope="layer", fold=False, **options)
    after, result = rewritten(thinned(fold), second, Context(calibration=TEXTS))
    assert all(item.zeros == item.numbers // 2 for item in result.sparsity)
    for item in masked(after):
        gone = after.tensor(item.mask) == 0
        if pattern == "2:4":  # of four neighbours three may have gone before
            assert int(gone.reshape(-1, 4).sum(1).min()) == 2
        else:
            assert int(gone.sum()) == gone.numel() // 2
