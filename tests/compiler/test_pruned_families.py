"""Heads and neurons are cut out of every model family of the README's table, and nothing else changes."""

import pytest
import torch
from sampled import sampled
from torch import Tensor

import fxpress
from fxpress.compiler.families import EXAMPLE, Family, families
from fxpress.ir.equality import sqnr_db
from fxpress.passes import Fold, MaskWeights

NAMES = ["bert", "distilbert", "roberta", "gpt2", "llama", "qwen2", "mistral", "t5", "vit", "whisper", "nn.Transformer"]
SIZES = ((2, 12), (3, 17), (1, 9))


def family(name: str) -> Family:
    return next(item for item in families() if item.name == name)


def test_the_names_are_those_of_the_table() -> None:
    assert [item.name for item in families()] == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(NAMES, many=("distilbert", "roberta", "qwen2", "nn.Transformer")))
def test_a_cut_family_gives_what_the_masked_one_gives(name: str) -> None:
    kind = family(name)
    torch.manual_seed(0)
    rewrite = MaskWeights(0.5, "random", "heads+neurons", fold=False)
    masked = fxpress.compile(kind.model().eval(), [rewrite], kind.inputs(*EXAMPLE), backend="eager", verify=False)
    cut = masked.then([Fold()], backend="eager")
    rewrites = cut.report.passes[-1].rewrites
    assert rewrites["heads"] > 0 and rewrites["neurons"] > 0
    for batch, length in SIZES:
        inputs = kind.inputs(batch, max(length, kind.shortest))
        flat = cut.program.signature.bind((), inputs)
        with torch.no_grad():
            ours, theirs = cut.program.run(flat), masked.program.run(flat)
        compared = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.shape == b.shape]
        assert compared
        assert all(isinstance(a, Tensor) and sqnr_db(a, b) > 110 for a, b in compared)
        fewer = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.shape != b.shape]
        assert all(a.shape[1] < b.shape[1] and a.shape[2:] == b.shape[2:] for a, b in fewer)  # caches with fewer heads
