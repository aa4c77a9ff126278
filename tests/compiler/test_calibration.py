"""Calibration data is checked before any work is done, and a quantized program can be trained and then folded."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.ops.quantize import int8_linear, quantize
from fxpress.ir.rewrite import Pass
from fxpress.passes import Fold, IntegerOnly, MaskWeights, Quantize

EXAMPLE = (torch.ones(2, 8),)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()


class Untraceable(nn.Module):
    """Runs once, on the example, before it is traced; fails if it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.compiler.is_exporting(), "work was begun"
        return x


BAD: dict[str, tuple[Any, str]] = {
    "not a finite number": ((torch.full((2, 8), torch.nan),), "batch 1, input '.*' has NaN or infinity"),
    "infinity": ((torch.full((2, 8), torch.inf),), "batch 1, input '.*' has NaN or infinity"),
    "dtype": ((torch.ones(2, 8, dtype=torch.int64),), "batch 1, input '.*': dtype int64, the example has float32"),
    "rank": ((torch.ones(8),), "batch 1, input '.*': shape \\[8\\], the example has \\[2, 8\\]"),
    "no rows": ((torch.ones(0, 8),), "batch 1, input '.*' is empty"),
    "kind": (torch.ones(2, 8), "batch 1 must be a dict or a tuple, found"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration_data_is_refused_before_any_work(name: str) -> None:
    batch, problem = BAD[name]
    with pytest.raises(InputError, match=problem):
        fxpress.compile(Untraceable().eval(), "quantize", EXAMPLE, calibration=[EXAMPLE, batch])


def test_named_batches_are_checked_by_name() -> None:
    batches = [{"input": torch.full((2, 8), torch.nan)}]
    with pytest.raises(InputError, match="calibration batch 0, input 'input' has NaN"):
        fxpress.compile(model(), "quantize", {"input": torch.ones(2, 8)}, calibration=batches)


def encoder_with(weight: str, value: float) -> nn.Module:
    """A model with one wrong number in a weight."""
    made = tiny.encoder()
    with torch.no_grad():
        made.get_parameter(weight)[0] = value
    return made


FITTING = [
    Quantize(),
    Quantize(attention="int8", mode="static"),
    IntegerOnly(),
    MaskWeights(0.5, "wanda"),
    MaskWeights(0.5, "fisher"),
    MaskWeights(0.5, "sparsegpt", "neurons"),
    MaskWeights(0.5, pattern="layers"),
]


@pytest.mark.parametrize("rewrite", FITTING, ids=str)
def test_a_batch_that_the_model_fails_on_is_named(rewrite: Pass) -> None:
    """One of four is what quantized outputs are judged by: the number is that of the user's."""
    bad = {**tiny.inputs(), "ids": torch.full((2, 6), 77)}
    batches = [*(tiny.inputs(3, length) for length in (4, 6, 7)), bad]
    problem = r"calibration batch 3 fails at embed \(tiny.py:\d+: .*\): index out of range in self; mend it, or leave"
    with pytest.raises(InputError, match=problem):
        fxpress.compile(tiny.encoder(), [rewrite], tiny.inputs(), calibration=batches, backend="eager", verify=False)


def test_outputs_that_are_all_padding_judge_nothing() -> None:
    empty = {**tiny.inputs(), "mask": torch.zeros(2, 6, dtype=torch.bool)}
    with pytest.raises(InputError, match="all tokens of the calibration data that outputs are judged by are padding"):
        fxpress.compile(
            tiny.encoder(), "quantize", tiny.inputs(), calibration=[*[tiny.inputs()] * 3, empty], backend="eager"
        )


@pytest.mark.parametrize("rewrite", FITTING[:-1], ids=str)
def test_a_weight_that_is_no_number_is_named(rewrite: Pass) -> None:
    with pytest.raises(RewriteError, match=r"the weight of up is nan at \[0, 0\]; mend it, or leave the layer out"):
        fxpress.compile(
            encoder_with("up.weight", torch.nan), [rewrite], tiny.inputs(), calibration=[tiny.inputs()],
            backend="eager", verify=False,
        )  # fmt: skip


def test_a_table_that_is_not_finite_is_named() -> None:
    with pytest.raises(RewriteError, match=r"the weight of embed is inf at \[0, 0\]"):
        fxpress.compile(encoder_with("embed.weight", torch.inf), "quantize", tiny.inputs(), backend="eager")


def test_what_a_weight_elsewhere_makes_of_the_data_is_named_by_the_layer() -> None:
    with pytest.raises(RewriteError, match=r"calibration fails at up: .*; look for a batch .*, or a weight"):
        fxpress.compile(
            encoder_with("norm1.weight", torch.nan), [MaskWeights(0.5, "sparsegpt")], tiny.inputs(),
            calibration=[tiny.inputs()], backend="eager", verify=False,
        )  # fmt: skip


@pytest.mark.parametrize("options", [("fisher",), ("fisher", "neurons"), ("sparsegpt", "heads+neurons")], ids=str)
def test_outputs_that_are_no_numbers_have_no_sensitivity(options: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="calibration batch 0 gives outputs, or a loss, of NaN or infinity"):
        fxpress.compile(
            encoder_with("norm1.weight", torch.nan), [MaskWeights(0.5, *options)], tiny.inputs(),
            calibration=[tiny.inputs()], backend="eager", verify=False,
        )  # fmt: skip


@pytest.mark.parametrize("passes", ["quantize(mode=static)", "quantize(min_cosine=0.9)", "quantize(method=gptq)"])
def test_missing_calibration_data_is_refused_before_any_work(passes: str) -> None:
    with pytest.raises(InputError, match=r"pass quantize\(.*\): .* needs calibration data; give calibration=batches"):
        fxpress.compile(Untraceable().eval(), passes, EXAMPLE)


def test_calibration_data_may_be_a_generator() -> None:
    batches = (EXAMPLE for _ in range(2))
    compiled = fxpress.compile(model(), "quantize(mode=static)", EXAMPLE, calibration=batches, backend="eager")
    assert compiled.program.calls(int8_linear)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_batches_may_be_what_a_tokenizer_gives(dtype: str | None) -> None:
    batch: UserDict[str, Tensor] = UserDict(input=torch.randn(2, 8))  # BatchEncoding is one
    compiled = fxpress.compile(
        model(), "quantize(mode=static)", batch, calibration=[batch], backend="eager", dtype=dtype
    )
    assert compiled.program.calls(int8_linear)
    assert compiled.verify(batch).errors == compiled.verify(dict(batch)).errors
    assert compiled.then("fuse", backend="eager", calibration=[batch]).report.equal


def test_inputs_to_verify_are_named_or_positional() -> None:
    compiled = fxpress.compile(model(), [], EXAMPLE, backend="eager")
    with pytest.raises(InputError, match=r"must be a dict of named or a tuple of positional ones, found a tensor"):
        compiled.verify(*EXAMPLE)


def test_a_trained_program_is_folded_with_its_trained_weights() -> None:
    compiled = fxpress.compile(model(), [Quantize(fold=False)], EXAMPLE, backend="eager")
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(compiled.program.module.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        compiled.program.module(x)[0].square().mean().backward()
        optimizer.step()
    folded = compiled.then([Fold()], backend="eager")
    assert folded.program.calls(int8_linear) and not folded.program.calls(quantize)
    torch.testing.assert_close(folded(x), compiled(x).detach(), rtol=1e-4, atol=1e-5)
    assert compiled.program.calls(quantize)  # what it was made from stays


def test_more_passes_are_judged_by_the_program_before_them() -> None:
    first = fxpress.compile(model(), [Quantize()], EXAMPLE, backend="eager")
    second = first.then("fuse", backend="eager")
    assert second.report.equal
    assert second.verify(EXAMPLE).equal


def test_calibration_data_of_more_passes_is_checked_too() -> None:
    first = fxpress.compile(model(), [], EXAMPLE, backend="eager")
    with pytest.raises(InputError, match=r"calibration batch 0, input '.*' has NaN or infinity"):
        first.then("quantize", backend="eager", calibration=[(torch.full((2, 8), torch.nan),)])
