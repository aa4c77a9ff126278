"""Quantize(attention="int8"): golden graphs, refusals, targets, order, training, half precision."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import before_after, normal, program, reasons, rewritten
from torch import Tensor

from fxpress.ir.calibration.target import cosines
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program, arguments
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.int8_attention import int8_attention
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fuse, Quantize

BATCHES = [list(tiny.inputs(3, length).values()) for length in (6, 9)]


def heads(seed: int) -> Tensor:
    return normal(2, 4, 7, 8, seed=seed)


@functools.cache
def causal(dtype: torch.dtype = torch.float32) -> Program:
    given = [heads(seed).to(dtype) for seed in range(3)]
    traced = program(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *given)
    return rewritten(traced, Canonicalize())[0]


@functools.cache
def encoder(dtype: torch.dtype = torch.float32) -> Program:
    return rewritten(program(tiny.encoder().to(dtype), *tiny.inputs().values()), Canonicalize())[0]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_rule(mode: str, golden: Callable[[str], None]) -> None:
    before = causal()
    batches = [[heads(seed) for seed in range(3)]]
    after, result = rewritten(before, Quantize(attention="int8", mode=mode), Context(calibration=batches))
    golden(before_after(before, after, result))


def test_fixed_ranges_are_those_of_real_tokens() -> None:
    """Whatever stands at the padding: the ranges are of the keys that are attended."""
    after, _ = rewritten(encoder(), Quantize(attention="int8", mode="static"), Context(calibration=BATCHES))
    masked = [[torch.where(mask, ids, 49), mask] for ids, mask in BATCHES]
    other, _ = rewritten(encoder(), Quantize(attention="int8", mode="static"), Context(calibration=masked))
    first, second = (traced.tensor(arguments(traced.calls(int8_attention)[0])["ranges"]) for traced in (after, other))
    torch.testing.assert_close(first, second)
    assert first.shape == (3,) and (first > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_stay_close(dtype: torch.dtype) -> None:
    before = encoder(dtype)
    after, result = rewritten(before, Quantize(attention="int8"))
    given = list(tiny.inputs(3, 5).values())
    found = after.run(given)[0]
    assert result.rewrites["attention"] == 1 and not after.calls(attention)
    assert found.dtype is dtype and cosines(found, before.run(given)[0]).mean() > 0.99


def test_attention_stays_unless_asked() -> None:
    after, _ = rewritten(encoder(), Quantize())
    assert len(after.calls(attention)) == 1


def test_sinks_are_refused() -> None:
    traced = program(lambda m, q, k, v: attention(q, k, v, sinks=m.s), *map(heads, range(3)), s=normal(4))
    after, result = rewritten(traced, Quantize(attention="int8"))
    assert reasons(result, "attention") == ["it has sinks, whose probability no integer stands for"]
    assert len(after.calls(attention)) == 1


def test_a_program_without_attention_is_told() -> None:
    _, result = rewritten(
        program(lambda m, x: F.linear(x, m.w), normal(2, 8), w=normal(4, 8)), Quantize(attention="int8")
    )
    assert reasons(result, "attention") == ["there is no attention; put canonicalize before quantize"]


def test_a_budget_of_nothing_changes_nothing() -> None:
    after, result = rewritten(encoder(), Quantize(attention="int8"), Context(max_rewrites=0))
    assert result.changes == 0 and len(after.calls(attention)) == 1


def test_twice_is_refused() -> None:
    after, _ = rewritten(causal(), Quantize(attention="int8"))
    with pytest.raises(RewriteError, match="quantized already"):
        Quantize().apply(after, Context())


def test_bad_options_are_an_error() -> None:
    with pytest.raises(InputError, match="unknown attention 'int4': did you mean 'int8'"):
        Quantize(attention="int4")
    with pytest.raises(InputError, match="static ranges of activations needs calibration data"):
        Quantize(attention="int8", mode="static", activations=None).apply(causal(), Context())


def test_a_target_is_of_the_model_with_its_own_attention() -> None:
    """Integers of attention alone bring the outputs below 70 dB, whatever is chosen for the linear layers."""
    quantize = Quantize(attention="int8", embeddings=None, min_sqnr_db=70)
    _, result = rewritten(encoder(), quantize, Context(calibration=BATCHES))
    assert any(reason.startswith("not reached: SQNR 70 dB") for reason in reasons(result, "target"))


def test_a_batch_of_no_number_is_named() -> None:
    with pytest.raises(RewriteError, match=r"calibration fails at attention: query, key or value of .* holds NaN"):
        batches = [[heads(0), heads(1), heads(2) * torch.inf]]
        rewritten(causal(), Quantize(attention="int8", mode="static", activations=None), Context(calibration=batches))


def test_it_can_be_trained() -> None:
    after, _ = rewritten(encoder(), Quantize(attention="int8", fold=False))
    after.run(list(tiny.inputs(3, 5).values()))[0].square().sum().backward()
    grads = [value.grad for value in after.module.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


def test_order_with_fuse_does_not_matter() -> None:
    given, rewrite = list(tiny.inputs(3, 9).values()), Quantize(attention="int8")
    early = rewritten(rewritten(encoder(), rewrite)[0], Fuse())[0]
    late = rewritten(rewritten(encoder(), Fuse())[0], rewrite)[0]
    torch.testing.assert_close(early.run(given)[0], late.run(given)[0])
