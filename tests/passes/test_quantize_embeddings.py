"""Embeddings of 4 bits: golden graphs, error, size, tied tables, what is left for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, normal, program, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.compiler.pipeline import parameters
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.quantize import int4_embedding, int4_linear, int8_linear
from fxpress.ir.rewrite import Context
from fxpress.passes import Fold, Quantize

IDS = torch.tensor([[0, 3, 9], [1, 1, 2]])


def lookup(width: int = 64, dtype: torch.dtype = torch.float32) -> Program:
    return program(lambda m, ids: F.embedding(ids, m.w), IDS, w=normal(10, width, dtype=dtype))


@pytest.mark.parametrize("case", ["folded", "symmetric", "not_folded"])
def test_rule(case: str, golden: Callable[[str], None]) -> None:
    before = lookup()
    options: dict[str, Any] = {"symmetric": {"symmetric": True}, "not_folded": {"fold": False}}.get(case, {})
    after, result = rewritten(before, Quantize(embeddings="int4", **options))
    golden(before_after(before, after, result))


@pytest.mark.parametrize("width", [16, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_stay_close_and_keep_their_dtype(width: int, dtype: torch.dtype) -> None:
    before = lookup(width, dtype)
    after, _ = rewritten(before, Quantize(embeddings="int4"))
    found, expected = after.run([IDS])[0], before.run([IDS])[0]
    assert found.dtype is dtype and sqnr_db(found, expected) > 20


def test_the_report_counts_numbers_and_bytes() -> None:
    """Of 32 numbers: 16 bytes, 4 of the scale, 1 of the zero point."""
    model = nn.Embedding(100, 64).eval()
    compiled = fxpress.compile(model, "quantize(embeddings=int4)", (IDS,), backend="eager")
    assert compiled.report.bytes_after == 100 * 2 * (16 + 4 + 1)
    assert parameters(compiled.program) == compiled.report.parameters_before == 6400


class Tied(nn.Module):
    """An embedding whose table is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(10, 64), nn.Linear(64, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(ids))
        return found


def test_a_table_that_is_a_weight_of_4_bits_too_is_stored_once() -> None:
    after, _ = rewritten(program(Tied(), IDS), Quantize("int4", embeddings="int4"))
    (row,), (head,) = after.calls(int4_embedding), after.calls(int4_linear)
    assert row.args[0] is head.args[1]
    assert [value.dtype for value in after.module.state_dict().values()].count(torch.uint8) == 1


def test_a_table_that_is_a_weight_of_8_bits_too_has_the_linears_integers() -> None:
    after, _ = rewritten(program(Tied(), IDS), Quantize(embeddings="int4"))
    assert len(after.calls(int8_linear)) == 1 and not after.calls(int4_embedding)


def test_what_is_not_folded_can_be_folded_afterwards() -> None:
    left, folded = (rewritten(lookup(), Quantize(embeddings="int4", fold=each))[0] for each in (False, True))
    assert not left.calls(int4_embedding)
    later, _ = rewritten(left, Fold())
    assert len(later.calls(int4_embedding)) == 1
    assert torch.equal(later.run([IDS])[0], folded.run([IDS])[0]) and torch.equal(
        left.run([IDS])[0], folded.run([IDS])[0]
    )


def test_twice_is_refused() -> None:
    after, _ = rewritten(lookup(), Quantize(embeddings="int4"))
    with pytest.raises(RewriteError, match="quantized already"):
        Quantize().apply(after, Context())


def test_other_bits_are_refused() -> None:
    with pytest.raises(InputError, match="unknown embeddings 'int2': did you mean 'int8'"):
        Quantize(embeddings="int2")


# --- under a target ------------------------------------------------------------------------------------------------

BATCHES = [[torch.randint(0, 40, (8, 16), generator=torch.Generator().manual_seed(seed))] for seed in range(4)]


def embedded(layer: Callable[[Any, Tensor], Tensor]) -> Program:
    tensors = {"table": normal(40, 48, seed=1), "w": normal(48, 48, seed=2) / 7, "w2": normal(40, 48, seed=3) / 7}
    return program(lambda m, ids: layer(m, F.embedding(ids, m.table)), BATCHES[0][0], **tensors)


CASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a table of its own": lambda m, x: F.linear(x, m.w),
    "a table that is a head's weight": lambda m, x: F.linear(F.relu(x), m.table),
    "a weight of two layers": lambda m, x: F.linear(F.linear(F.relu(F.linear(x, m.w)), m.w), m.w2),
}


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("decibels", [15.0, 30.0, 35.0, 40.0, 45.0, 60.0])
@pytest.mark.parametrize("name", CASES)
def test_a_target_that_is_said_to_be_reached_is(name: str, decibels: float, weights: str) -> None:
    """With tables, and weights that are used twice, among what makes the error."""
    before = embedded(CASES[name])
    passes = Quantize(weights, embeddings="int4", activations=None, min_sqnr_db=decibels)
    after, result = rewritten(before, passes, Context(calibration=BATCHES))
    (said,) = [match.detail for match in result.matches if match.rule == "target"]
    judging = BATCHES[3]
    found = sqnr_db(after.run(judging)[0], before.run(judging)[0])
    assert found >= decibels
    assert f"error {10 ** (-found / 10):.2g} " in said or found > 100


def test_a_table_that_costs_too_much_stays_in_floats() -> None:
    before = embedded(CASES["a table of its own"])
    passes = Quantize(embeddings="int4", activations=None, min_sqnr_db=30.0)
    after, result = rewritten(before, passes, Context(calibration=BATCHES))
    assert [item.reason for item in result.refusals] == ["too sensitive: it stays in floats"]
    assert after.calls(torch.ops.aten.embedding.default) and result.rewrites == {"linear (float)": 1}


def test_a_weight_has_the_bits_that_each_of_its_layers_was_chosen_to_have() -> None:
    passes = Quantize("int4", embeddings=None, min_sqnr_db=20.0)
    after, result = rewritten(embedded(CASES["a weight of two layers"]), passes, Context(calibration=BATCHES))
    assert result.rewrites == {"linear (float)": 1, "linear (float, 8 bits)": 2}
    assert len(after.calls(int4_linear)) == 1 and len(after.calls(torch.ops.aten.linear.default)) == 2
    stored = {name for name, value in after.module.state_dict().items() if value.dtype in (torch.uint8, torch.int8)}
    # One weight in 4 bits for its first layer and in 8 for its second.
    assert {name for name in stored if "zero_point" not in name} == {"w_2_packed", "w_1_integers", "w2_1_integers"}
