"""MaskWeights whose masks stay in the graph: training, folding, saving and loading what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

import fxpress
from fxpress.ir.graph import Program
from fxpress.ir.pruning.masks import masked
from fxpress.passes import Fold, MaskWeights

SIZES = ((2, 6), (1, 1), (3, 11))


def weights(traced: Program) -> dict[str, Tensor]:
    names = ("query", "key", "value", "out", "up", "down")
    return {name: getattr(traced.module, name).weight.detach() for name in names}


def zeros(traced: Program) -> dict[str, Tensor]:
    """Of the masks, by layer."""
    return {str(item.weight.target).rpartition(".")[0]: traced.tensor(item.mask) == 0 for item in masked(traced)}


def trained(compiled: fxpress.Compiled, kind: type[torch.optim.Optimizer]) -> None:
    """Five steps towards outputs of one."""
    module = compiled.program.module
    optimizer = kind(module.parameters(), lr=0.05)  # type: ignore[call-arg]
    for step in range(5):
        loss = (module(*tiny.inputs(3, 5 + step).values())[0] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def compiled_masks() -> fxpress.Compiled:
    return fxpress.compile(tiny.encoder(), [MaskWeights(0.5, fold=False)], tiny.inputs(), backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_zeros_stay_zeros_in_training_and_the_others_move(kind: type[torch.optim.Optimizer]) -> None:
    compiled = compiled_masks()
    before, masks = weights(compiled.program), zeros(compiled.program)
    before = {name: weight.clone() for name, weight in before.items()}
    trained(compiled, kind)
    after = weights(compiled.then([Fold()], backend="eager").program)
    for name, zero in masks.items():
        assert torch.equal(after[name] == 0, zero)
        assert bool((after[name] != before[name])[~zero].float().mean() > 0.9)


@pytest.mark.slow
def test_folding_what_was_trained_does_not_change_the_outputs() -> None:
    compiled = compiled_masks()
    trained(compiled, torch.optim.SGD)
    folded = compiled.then([Fold()], backend="eager")
    assert masked(folded.program) == []
    for size in SIZES:
        assert folded.verify(tiny.inputs(*size)).equal


@pytest.mark.slow
def test_what_was_trained_is_saved_and_loaded(tmp_path: Path) -> None:
    compiled = compiled_masks()
    trained(compiled, torch.optim.SGD)
    folded = compiled.then([Fold()], backend="onnx")
    folded.save(tmp_path / "model")
    loaded = fxpress.load(tmp_path / "model")
    for size in SIZES:
        found = torch.as_tensor(loaded(**tiny.inputs(*size)))
        torch.testing.assert_close(
            found, compiled.program.run(list(tiny.inputs(*size).values()))[0], rtol=1e-4, atol=1e-5
        )
