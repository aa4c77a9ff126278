"""Quantize and its calibration data: outliers, targets, fitted methods, ranges, padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import normal, program, reasons, rewritten
from torch import Tensor

from fxpress.ir.calibration.target import cosines
from fxpress.ir.equality import sqnr_db
from fxpress.ir.graph import Program
from fxpress.ir.ops.quantize import int4_linear, int8_linear
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fold, Quantize

PLAIN = {"method": "minmax", "sensitive": None}  # everything rounded to nearest, with calibration data or without
Batches = list[list[Tensor]]


def linear(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.b)


def weights(*sizes: int, **more: Tensor) -> dict[str, Tensor]:
    return {"w": normal(*sizes), "b": normal(sizes[0], seed=1), **more}


def calibrated(batches: Batches) -> Context:
    return Context(calibration=batches)


@functools.cache
def encoder(dtype: torch.dtype = torch.float32) -> Program:
    """One Transformer layer, canonical; not to be changed."""
    return rewritten(program(tiny.encoder().to(dtype), *tiny.inputs().values()), Canonicalize())[0]


TEXTS: Batches = [list(tiny.inputs(3, length).values()) for length in (6, 9, 7, 8)]


def outliers(seed: int, count: int = 48, size: float = 100.0) -> list[Tensor]:
    """Rows [count, 32] with one channel that is much larger than the others."""
    x = normal(count, 32, seed=seed)
    x[:, 5] *= size
    return [x]


ROWS: Batches = [outliers(seed) for seed in range(4)]


@functools.cache
def wide() -> Program:
    """A layer that hardly reads its input's outliers, and a second layer without any."""
    first = normal(24, 32, seed=1) / 6
    first[:, 5] /= 100
    return program(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.v), normal(4, 32), w=first, v=normal(8, 24, seed=2)
    )


def noise(before: Program, batches: Batches, seed: int = 9, **options: Any) -> float:
    """Energy of the error over that of the outputs, on rows that were not calibrated with."""
    after, _ = rewritten(before, Quantize(**options), calibrated(batches))
    found, expected = (each.run(outliers(seed))[0].detach() for each in (after, before))
    return float((found - expected).square().sum() / expected.square().sum())


def test_smoothquant_halves_the_error_of_outlier_channels() -> None:
    plain, smooth = (
        noise(wide(), ROWS, granularity="tensor", method=method, sensitive=None) for method in ("minmax", "smoothquant")
    )
    assert smooth < plain / 4  # in energy


def test_the_layer_behind_values_smooths_what_attention_gives() -> None:
    """Folded at once or later, no multiplication stands between attention and the layer that reads it."""
    options: dict[str, Any] = {"method": "smoothquant", "sensitive": None}
    at_once, result = rewritten(encoder(), Quantize(**options), context=calibrated(TEXTS))
    unfolded, _ = rewritten(encoder(), Quantize(**options, fold=False), context=calibrated(TEXTS))
    later, folding = rewritten(unfolded, Fold())
    assert result.rewrites["smoothing into values"] == folding.rewrites["smoothing into values"] == 1
    factors = [[str(node.args[1]) for node in made.calls(torch.ops.aten.mul.Tensor)] for made in (at_once, unfolded)]
    assert len(factors[0]) == len(factors[1]) - 1
    for text in TEXTS:
        assert torch.equal(at_once.run(text)[0], later.run(text)[0])
        torch.testing.assert_close(at_once.run(text)[0], unfolded.run(text)[0], atol=0.05, rtol=0)


def test_outliers_need_no_finer_layers_once_smoothed() -> None:
    _, result = rewritten(wide(), Quantize(min_cosine=0.999), calibrated(ROWS))
    assert reasons(result) == [] and result.rewrites["linear (static, smoothed)"] >= 1


def test_mixed_precision_reaches_a_target_that_one_range_everywhere_misses() -> None:
    """Nothing is smoothed, so that the first layer has to stay in floats."""
    target = 0.999
    before = wide()
    coarse, _ = rewritten(before, Quantize(granularity="tensor", **PLAIN), calibrated(ROWS))
    mixed, result = rewritten(
        before, Quantize(granularity="tensor", method="minmax", min_cosine=target), calibrated(ROWS)
    )
    given = outliers(9, 200)
    cosine = [cosines(each.run(given)[0], before.run(given)[0]).mean().item() for each in (coarse, mixed)]
    assert cosine[0] < target <= cosine[1]
    assert reasons(result) == ["too sensitive: it stays in floats"] and result.rewrites["linear (tensor)"] == 1


def test_a_target_is_reported() -> None:
    _, result = rewritten(wide(), Quantize(min_sqnr_db=20.0), calibrated(ROWS))
    assert [match.detail.partition(":")[0] for match in result.matches if match.rule == "target"] == ["SQNR 20 dB"]


def test_a_metric_that_is_never_satisfied_is_reported() -> None:
    rewrite = Quantize(metric=lambda outputs, truth: 0.0, min_metric=1.0)
    _, result = rewritten(wide(), rewrite, calibrated(ROWS))
    assert len(reasons(result, "target")) == 1 and reasons(result, "target")[0].startswith("not reached: metric 1")


def test_a_metric_sees_the_outputs_and_the_models() -> None:
    seen: list[list[tuple[int, ...]]] = []

    def metric(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        seen.append([tuple(item.shape) for item in (*outputs, *truth)])
        return 1.0

    rewritten(wide(), Quantize(metric=metric, min_metric=0.5), calibrated(ROWS))
    assert seen and all(shapes == [(48, 8), (48, 8)] for shapes in seen)  # a fourth of the batches judges


def test_gptq_is_closer_than_nearest_on_correlated_inputs() -> None:
    mix = torch.eye(32) + normal(32, 32, seed=5) / 3
    batches = [[normal(200, 32, seed=seed) @ mix] for seed in range(3)]
    before = program(lambda m, x: F.linear(x, m.w), normal(4, 32), w=normal(24, 32, seed=1))
    x = [normal(400, 32, seed=9) @ mix]
    nearest, fitted = (
        sqnr_db(
            rewritten(before, Quantize(weights="int4", method=method), calibrated(batches))[0].run(x)[0],
            before.run(x)[0],
        )
        for method in ("minmax", "gptq")
    )
    assert fitted > nearest + 2


@pytest.mark.parametrize("method", ["smoothquant", "gptq", "bias", "smoothquant+gptq+bias", "auto"])
@pytest.mark.parametrize("options", [{"granularity": "tensor"}, {"granularity": "token"}, {"mode": "static"}], ids=str)
def test_no_method_is_worse_than_rounding(method: str, options: dict[str, Any]) -> None:
    plain = noise(wide(), ROWS, **options, **PLAIN)
    assert noise(wide(), ROWS, **options, method=method, sensitive=None) < 1.1 * plain


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_static_ranges(method: str) -> None:
    before = encoder()
    after, result = rewritten(before, Quantize(mode="static", method=method), calibrated(TEXTS))
    assert result.rewrites["linear (static)"] + result.rewrites["linear (static, smoothed)"] == 6
    given = list(tiny.inputs(3, 10).values())
    assert cosines(after.run(given)[0], before.run(given)[0]).mean() > 0.99


def with_padding(value: int, mask: Tensor) -> Batches:
    """The same real tokens, the padding filled with one id."""
    ids = tiny.inputs(4, 9)["ids"]
    return [[torch.where(tiny.inputs(4, 9)["mask"], ids, value), mask]]


def test_padding_does_not_change_what_is_calibrated() -> None:
    padded = tiny.inputs(4, 9)["mask"]
    rewrite = Quantize(mode="static", embeddings=None)
    first, second, unmasked = (
        rewritten(encoder(), rewrite, calibrated(batches))[0].module.state_dict()
        for batches in (with_padding(0, padded), with_padding(49, padded), with_padding(49, torch.ones_like(padded)))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], unmasked[name]) for name in first if name in unmasked)


def test_scores_by_position_are_measured_at_several_lengths() -> None:
    """As of question answering: outputs [B, N], of which N differs from batch to batch."""
    batches = [[normal(2, length, 8, seed=length)] for length in range(3, 12)]
    before = program(lambda m, x: F.linear(x, m.w).squeeze(-1), normal(2, 5, 8), w=normal(1, 8))
    _, result = rewritten(before, Quantize(), calibrated(batches))
    assert len([match for match in result.matches if match.rule == "target"]) == 1


def test_four_bits_that_multiply_integers_are_smoothed() -> None:
    passes = Quantize(weights="int4", activations="int8", granularity="token", group_size=16)
    after, result = rewritten(wide(), passes, calibrated(ROWS))
    assert len(after.calls(int8_linear)) == 2 and any("smoothed" in name for name in result.rewrites)


@pytest.mark.parametrize("activations", ["int8", None])
def test_layers_of_four_bits_become_finer_by_eight_before_they_stay_in_floats(activations: str | None) -> None:
    coarse, fine = (
        Quantize("int4", activations=activations, embeddings=None, **more) for more in ({}, {"min_sqnr_db": 40.0})
    )
    after, result = rewritten(encoder(), fine, calibrated(TEXTS))
    eight = sum(count for name, count in result.rewrites.items() if name.endswith("8 bits)"))
    assert 0 < eight < 6 and reasons(result) == []
    given = list(tiny.inputs(3, 9).values())
    expected = encoder().run(given)[0].detach()
    before, found = (
        each.run(given)[0].detach() for each in (rewritten(encoder(), coarse, calibrated(TEXTS))[0], after)
    )
    assert sqnr_db(before, expected) < 40 < sqnr_db(found, expected)


def test_four_bits_read_floats_and_are_not_smoothed() -> None:
    after, result = rewritten(wide(), Quantize(weights="int4"), calibrated(ROWS))
    assert result.rewrites == {"linear (float)": 2} and len(after.calls(int4_linear)) == 2
