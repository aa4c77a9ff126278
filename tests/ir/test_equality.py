"""The meaning of equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from build import normal, program
from torch import Tensor

from fxpress.ir.equality import compare, cosine, run_float64, sqnr_db

TRUTH = normal(1000, dtype=torch.float64)
NOISE = normal(1000, seed=1).double() * 1e-3
EAGER = (TRUTH + NOISE).float()


def reasons(actual: Any, eager: Any, judge: Any = None) -> tuple[str, ...]:
    judge = judge if judge is not None else eager.double() if isinstance(eager, Tensor) else eager
    return compare([actual], [eager], [judge]).reasons


def test_eager_equals_itself() -> None:
    assert compare([EAGER], [EAGER], [TRUTH]).equal


@pytest.mark.parametrize("factor, equal", [(1.9, True), (2.1, False)])
def test_twice_the_error_of_eager_is_allowed(factor: float, equal: bool) -> None:
    assert compare([(TRUTH + factor * NOISE).float()], [EAGER], [TRUTH]).equal is equal


@pytest.mark.parametrize("factor, equal", [(2.9, True), (3.2, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_thrice_in_half_precision(dtype: torch.dtype, factor: float, equal: bool) -> None:
    eager = (TRUTH + 30 * NOISE).to(dtype)
    error = eager.double() - TRUTH
    assert compare([(TRUTH + factor * error).to(dtype)], [eager], [TRUTH]).equal is equal


@pytest.mark.parametrize("size, equal", [(0.9e-6, True), (1.1e-6, False)])
def test_floor_is_a_millionth_of_the_peak(size: float, equal: bool) -> None:
    truth = torch.full((4,), 8.0, dtype=torch.float64)
    assert compare([truth + 8 * size], [truth], [truth]).equal is equal


def test_one_wrong_element_is_not_exempt() -> None:
    wrong = EAGER.clone()
    wrong[500] += 1
    assert reasons(wrong, EAGER, TRUTH)[0].startswith("output 0 has RMSE 0.03")


@pytest.mark.parametrize("value, kind", [(math.nan, "NaN"), (math.inf, "+inf"), (-math.inf, "-inf")])
def test_special_values_stand_in_the_same_places(value: float, kind: str) -> None:
    usual, other = torch.zeros(3), torch.zeros(3)
    usual[0] = other[1] = value
    assert reasons(other, usual) == (f"output 0 has {kind} in other places than eager",)
    assert reasons(usual, usual) == ()


def test_infinities_of_other_sign_differ() -> None:
    assert reasons(torch.tensor([-math.inf]), torch.tensor([math.inf])) != ()


def test_nothing_finite_is_equal() -> None:
    assert compare([torch.tensor([math.nan])], [torch.tensor([math.nan])], [torch.tensor([math.nan])]).equal


def test_dtype() -> None:
    assert reasons(torch.zeros(2).half(), torch.zeros(2)) == ("output 0 is float16[2], expected float32[2]",)


def test_shape() -> None:
    assert reasons(torch.zeros(3), torch.zeros(2)) == ("output 0 is float32[3], expected float32[2]",)


def test_integers_are_exact() -> None:
    found, usual = torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3])
    assert reasons(found, usual) == ("output 0 differs in 1 elements; it must be identical",)
    assert reasons(usual, usual) == ()


def test_other_values_are_identical_in_type_too() -> None:
    assert reasons(1, 1.0) == ("output 0 is 1, expected 1.0",)
    assert reasons(None, None) == ()


def test_a_number_is_no_tensor() -> None:
    assert reasons(1.0, torch.ones(1)) == ("output 0 is no tensor",)


def test_number_of_outputs() -> None:
    assert compare([EAGER], [EAGER, EAGER], [TRUTH, TRUTH]).reasons == ("1 outputs, expected 2",)


def test_names_are_told() -> None:
    assert compare([1], [2], [2], ["logits"]).reasons == ("logits is 1, expected 2",)


def test_worst_output_is_summed_up() -> None:
    worse = EAGER + 1
    found = compare([EAGER, worse], [EAGER, EAGER], [TRUTH, TRUTH])
    assert found.sqnr_db == pytest.approx(sqnr_db(worse, TRUTH))
    assert found.cosine == pytest.approx(cosine(worse, TRUTH))
    assert found.max_abs == pytest.approx(1, abs=0.01)


def test_summary_of_no_floats() -> None:
    found = compare([1], [1], [1])
    assert (found.sqnr_db, found.cosine, found.max_abs) == (math.inf, 1.0, 0.0)


def test_sqnr() -> None:
    truth = torch.ones(10)
    assert sqnr_db(truth * 1.1, truth) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(truth, truth) == math.inf
    assert sqnr_db(truth, truth * 0) == -math.inf


def test_cosine() -> None:
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
    assert (cosine(torch.zeros(2), torch.zeros(2)), cosine(torch.ones(2), torch.zeros(2))) == (1.0, 0.0)


def test_float64_run_widens_weights_inputs_and_casts() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (x * m.w).to(torch.float16).float() + torch.zeros(8, dtype=torch.float32)

    made = program(forward, normal(2, 8), w=normal(8))
    x = normal(2, 8, seed=3)
    assert torch.equal(run_float64(made, [x])[0], x.double() * made.module.w.double())
    assert made.module.w.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_float64_run_keeps_integers() -> None:
    made = program(lambda m, i: i + torch.arange(3), torch.arange(3), dynamic=None)
    assert run_float64(made, [torch.arange(3)])[0].tolist() == [0, 2, 4]
