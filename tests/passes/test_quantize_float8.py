"""Quantize to float8_e4m3: golden graphs, bad options, training, half precision, what calibration data brings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import before_after, normal, program, reasons, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.ir.calibration.target import cosines
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.float8 import FLOAT8, float8_linear, float8_quantize
from fxpress.ir.quantization.fold import fold
from fxpress.ir.rewrite import Context
from fxpress.ir.verify import verify
from fxpress.passes import Canonicalize, Quantize

aten = torch.ops.aten
BOTH = {"weights": "float8_e4m3", "activations": "float8_e4m3"}
X = (2, 5, 8)


@functools.cache
def one(dtype: torch.dtype = torch.float32) -> Program:
    parts = {"w": normal(4, 8, dtype=dtype), "b": normal(4, dtype=dtype, seed=1)}
    return program(lambda m, x: F.linear(x, m.w, m.b), normal(*X, dtype=dtype), **parts)


@functools.cache
def encoder(dtype: torch.dtype = torch.float32) -> Program:
    return rewritten(program(tiny.encoder().to(dtype), *tiny.inputs().values()), Canonicalize())[0]


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "weights": (torch.float32, {"weights": "float8_e4m3"}),
    "activations": (torch.float32, BOTH),
    "not_folded": (torch.float32, {**BOTH, "fold": False}),
    "half": (torch.float16, BOTH),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str, golden: Callable[[str], None]) -> None:
    dtype, options = CASES[case]
    before = one(dtype)
    after, result = rewritten(before, Quantize(**options))
    golden(before_after(before, after, result))
    x = normal(3, 2, 8, dtype=dtype, seed=5)
    assert sqnr_db(after.run([x])[0], before.run([x])[0]) > 25


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": "float8"}, "unknown weights 'float8': did you mean 'float8_e4m3'"),
    ({"activations": "float8_e4m3"}, "activations are float8_e4m3, weights int8: give both alike, or None"),
    ({"weights": "int4", "activations": "float8_e4m3"}, "activations are float8_e4m3, weights int4"),
    ({"weights": "float8_e4m3", "activations": "int8"}, "activations are int8, weights float8_e4m3"),
    ({"weights": "float8_e4m3", "group_size": 32}, "float8_e4m3 have one scale a row; leave group_size out"),
    ({"weights": "float8_e4m3", "symmetric": False}, "float8_e4m3 has no zero point; leave symmetric out"),
    ({**BOTH, "mode": "static"}, "a scale for each token; leave mode and granularity out"),
    ({**BOTH, "granularity": "tensor"}, "a scale for each token; leave mode and granularity out"),
    ({**BOTH, "method": "entropy"}, "'entropy' is a static range of activations"),
    ({**BOTH, "method": "awq"}, "'awq' is for weights alone"),
    ({"weights": "float8_e4m3", "method": "smoothquant"}, "'smoothquant' is for activations of 8 bits"),
]


@pytest.mark.parametrize(("options", "problem"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_are_an_error(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Quantize(**options)


def test_twice_is_refused() -> None:
    after, _ = rewritten(one(), Quantize("float8_e4m3"))
    with pytest.raises(RewriteError, match="quantized already"):
        Quantize().apply(after, Context())


def test_every_linear_stores_a_byte_a_number() -> None:
    after, result = rewritten(encoder(), Quantize("float8_e4m3", embeddings=None))
    assert result.rewrites["linear (float)"] == 6 and not after.calls(aten.linear.default)
    for call in after.calls(float8_linear):
        assert after.tensor(call.args[1]).dtype is FLOAT8 and after.tensor(call.args[2]).dtype is torch.float32


@pytest.mark.parametrize("options", [{"weights": "float8_e4m3"}, BOTH], ids=str)
def test_what_is_not_folded_gives_what_is_folded(options: dict[str, Any]) -> None:
    left, stored = (rewritten(encoder(), Quantize(fold=each, **options))[0] for each in (False, True))
    assert left.calls(float8_quantize) and not left.calls(float8_linear)
    given = list(tiny.inputs(3, 9).values())
    assert sqnr_db(left.run(given)[0], stored.run(given)[0]) > 50  # a number near a tie may be rounded elsewhere


@pytest.mark.parametrize("options", [{"weights": "float8_e4m3"}, BOTH], ids=str)
def test_what_is_not_folded_can_be_trained_and_folded_afterwards(options: dict[str, Any]) -> None:
    both = {"w": normal(16, 8) / 3, "v": normal(4, 16, seed=2) / 4}
    traced = program(lambda m, x: F.linear(F.gelu(F.linear(x, m.w)), m.v), normal(32, 8), **both)
    trained, _ = rewritten(traced, Quantize(fold=False, **options))
    x, target = normal(32, 8, seed=3), normal(32, 4, seed=4)
    optimizer = torch.optim.SGD(trained.module.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (trained.run([x])[0] - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    expected = trained.run([x])[0].detach()
    assert fold(trained) == 2
    verify(trained)
    torch.testing.assert_close(trained.run([x])[0].detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"weights": "float8_e4m3"}, BOTH], ids=str)
def test_half_precision_goes_in_and_comes_out_without_a_cast(half: torch.dtype, options: dict[str, Any]) -> None:
    after, _ = rewritten(encoder(half), Quantize(embeddings=None, **options))
    assert not after.calls(aten._to_copy.default)
    given = list(tiny.inputs(3, 5).values())
    found, expected = after.run(given)[0], encoder(half).run(given)[0]
    assert found.dtype is half and cosines(found, expected).mean() > 0.99


def test_floats_between_half_precision_are_not_rounded() -> None:
    """What is read in float32 as well stays float32."""

    def function(m: Any, x: Tensor) -> list[Tensor]:
        wide = F.linear(x.float(), m.w)
        return [wide.half(), wide]

    after, _ = rewritten(program(function, normal(*X).half(), w=normal(4, 8)), Quantize("float8_e4m3"))
    (linear,) = after.calls(float8_linear)
    assert linear.meta["val"].dtype is torch.float32


class Tied(nn.Module):
    """An embedding whose table is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(ids))
        return found


def test_a_tied_table_becomes_integers_for_the_lookup() -> None:
    ids = torch.tensor([[0, 3, 9], [1, 1, 2]])
    before = program(Tied(), ids)
    after, result = rewritten(before, Quantize("float8_e4m3"))
    assert set(result.rewrites) == {"linear (float)", "embedding"}
    assert sorted(str(value.dtype) for value in after.module.state_dict().values() if value.dim() == 2) == [
        "torch.float32",  # the scales of the lookup
        "torch.float8_e4m3fn",
        "torch.int8",
    ]
    assert sqnr_db(after.run([ids])[0], before.run([ids])[0]) > 25


@pytest.mark.parametrize("options", [{"weights": "float8_e4m3"}, BOTH], ids=str)
def test_gptq_brings_the_outputs_closer(options: dict[str, Any]) -> None:
    spread = normal(16, seed=4).exp()
    given = [(normal(64, 16, seed=seed) @ normal(16, 16, seed=9)) * spread for seed in range(5)]
    model = nn.Linear(16, 8)
    errors = {}
    for method in ("minmax", "gptq"):
        after, _ = rewritten(
            program(model, given[0]), Quantize(method=method, **options), Context(calibration=[[x] for x in given[:4]])
        )
        errors[method] = sqnr_db(after.run([given[4]])[0], model(given[4]).detach())
    assert errors["gptq"] > errors["minmax"] + (1 if options is not BOTH else 0.2)


def test_a_target_leaves_what_is_too_sensitive_in_floats() -> None:
    batches = [list(tiny.inputs(3, length).values()) for length in (6, 9, 7, 8)]
    quantize = Quantize("float8_e4m3", "float8_e4m3", embeddings=None, min_sqnr_db=45)
    after, result = rewritten(encoder(), quantize, Context(calibration=batches))
    assert "too sensitive: it stays in floats" in reasons(result) and after.calls(aten.linear.default)


def test_the_report_says_how_small_it_is() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    compiled = fxpress.compile(model, "quantize(float8_e4m3)", (normal(2, 64),), backend="eager")
    report = compiled.report
    assert report.parameters_after == report.parameters_before
    assert report.bytes_after == 2 * 64 * 256 + 2 * 4 * (64 + 256)  # numbers; biases and scales
