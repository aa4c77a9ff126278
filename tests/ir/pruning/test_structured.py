"""Layers that read thinned units: zeros are exact, and what stays makes up for what goes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.masks import masked
from fxpress.ir.pruning.structured import Reader, fitted, put_masks, readers, write
from fxpress.ir.pruning.units import Family, families
from fxpress.ir.rewrite import untracked
from fxpress.ir.verify import verify

ROWS, COLUMNS, TOKENS = 4, 6, 50
KEEP = torch.tensor([True, False, True, True, False, True])
W, B = normal(ROWS, COLUMNS), normal(ROWS, seed=1)
ALIKE = normal(TOKENS, 3, seed=2) @ normal(3, COLUMNS, seed=3)  # every input is made of any three others


def correlated(seed: int = 0) -> Tensor:
    """Tokens of similar lengths."""
    return normal(TOKENS, COLUMNS, seed=seed + 10) @ (torch.eye(COLUMNS) + normal(COLUMNS, COLUMNS, seed=seed + 20) / 2)


def off(rows: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The squared error of the outputs, over their square."""
    truth = F.linear(rows, W, None if bias is None else B)
    return float((F.linear(rows, weight, bias) - truth).square().sum() / truth.square().sum())


# --- fitted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, B], ids=["no_bias", "bias"])
def test_columns_that_go_are_exactly_zero(bias: Tensor | None) -> None:
    weight, _ = fitted(correlated(), W, bias, KEEP)
    assert torch.equal((weight != 0).all(0), KEEP) and torch.equal((weight != 0).any(0), KEEP)


def test_a_layer_without_a_bias_gets_none() -> None:
    assert fitted(correlated(), W, None, KEEP)[1] is None


@pytest.mark.parametrize("bias", [None, B], ids=["no_bias", "bias"])
@pytest.mark.parametrize("seed", range(4))
def test_the_outputs_are_closer_than_with_zeros_alone(seed: int, bias: Tensor | None) -> None:
    rows = correlated(seed)
    assert off(rows, *fitted(rows, W, bias, KEEP)) < 0.9 * off(rows, W * KEEP, bias)


def test_what_stays_makes_up_for_all_where_it_holds_the_same() -> None:
    assert off(ALIKE, W * KEEP, None) > 0.1
    assert off(ALIKE, *fitted(ALIKE, W, None, KEEP, damp=1e-9)) < 1e-8


def test_the_bias_makes_up_for_an_input_that_is_always_the_same() -> None:
    """Without the others having to move."""
    rows = correlated()
    rows[:, ~KEEP] = torch.tensor([3.0, -2.0])
    weight, bias = fitted(rows, W, B, KEEP, damp=1e-9)
    assert bias is not None
    torch.testing.assert_close(bias, B + W[:, 1] * 3 - W[:, 4] * 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight, W * KEEP, rtol=1e-4, atol=1e-4)


def test_where_everything_stays_nothing_moves() -> None:
    weight, bias = fitted(correlated(), W, B, torch.ones(COLUMNS, dtype=torch.bool))
    torch.testing.assert_close(weight, W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, B, rtol=1e-5, atol=1e-5)


def test_inputs_that_say_nothing_of_those_that_go_do_not_move() -> None:
    """Each token has one input that is not zero."""
    rows = torch.eye(COLUMNS).repeat(5, 1)
    weight, _ = fitted(rows, W, None, KEEP)
    torch.testing.assert_close(weight, W * KEEP)


def test_all_may_go_but_the_bias() -> None:
    weight, bias = fitted(correlated(), W, B, torch.zeros(COLUMNS, dtype=torch.bool))
    assert bias is not None
    assert not weight.any() and bool(bias.isfinite().all())


def test_damping_holds_the_weight_as_it_was() -> None:
    near, far = (fitted(correlated(), W, None, KEEP, damp=damp)[0] - W * KEEP for damp in (1e3, 1e-3))
    assert near.norm() < 0.01 * far.norm()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bias", [None, B], ids=["no_bias", "bias"])
def test_fewer_tokens_than_inputs(bias: Tensor | None, size: int) -> None:
    rows = correlated()[:size]
    found = fitted(rows, W, bias, KEEP)
    assert all(bool(item.isfinite().all()) for item in found if item is not None)
    assert off(rows, *found) < off(rows, W * KEEP, bias)


@pytest.mark.parametrize("bias", [None, B], ids=["no_bias", "bias"])
def test_inputs_of_nothing_but_zeros_move_nothing(bias: Tensor | None) -> None:
    weight, level = fitted(torch.zeros(TOKENS, COLUMNS), W, bias, KEEP)
    torch.testing.assert_close(weight, W * KEEP)
    assert bias is None or (level is not None and bool(torch.isclose(level, bias).all()))


def test_a_token_of_zeros_among_others_is_no_harm() -> None:
    rows = torch.cat([correlated(), torch.zeros(1, COLUMNS)])
    assert all(bool(item.isfinite().all()) for item in fitted(rows, W, None, KEEP)[:1])


def test_ordinary_tokens_are_fitted_beside_some_that_are_a_thousand_times_as_long() -> None:
    """Those would be all that plain least squares fits to."""
    rows = correlated()
    giants = rows.clone()
    giants[:3] = normal(3, COLUMNS, seed=7) * 1000
    assert off(rows[3:], *fitted(giants, W, None, KEEP)) < off(rows[3:], W * KEEP, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_weights_type(dtype: torch.dtype) -> None:
    weight, bias = fitted(correlated().to(dtype), W.to(dtype), B.to(dtype), KEEP)
    assert bias is not None
    assert weight.dtype is bias.dtype is dtype
    torch.testing.assert_close(weight.float(), fitted(correlated(), W, B, KEEP)[0], rtol=0.1, atol=0.05)


def test_what_is_given_is_not_changed() -> None:
    rows, weight, bias, keep = (item.clone() for item in (correlated(), W, B, KEEP))
    fitted(rows, weight, bias, keep)
    for found, before in zip((rows, weight, bias, keep), (correlated(), W, B, KEEP), strict=True):
        assert torch.equal(found, before)


# --- readers ---------------------------------------------------------------------------------------------------

INNER = 16
WEIGHTS = {
    "u": normal(INNER, COLUMNS, seed=4),
    "b": normal(INNER, seed=5),
    "v": normal(INNER, INNER, seed=6) / 4,
    "d": normal(ROWS, INNER, seed=7) / 4,
    "c": normal(ROWS, seed=8),
}


def forward(m: Any, x: Tensor) -> Tensor:
    """Neurons of v read those of u."""
    return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, m.u, m.b)), m.v)), m.d, m.c)


@functools.cache
def chain() -> Program:
    """Not to be changed."""
    return program(forward, normal(5, COLUMNS), **WEIGHTS)


BATCHES = [[correlated(seed)] for seed in (1, 2)]
KEEPS = [torch.arange(INNER) % 2 == 0, torch.arange(INNER) >= 8]


def found(traced: Program) -> list[Family]:
    return families(follow(traced))[0]


def thinned(refit: bool, batches: list[list[Tensor]] = BATCHES) -> dict[str, Reader]:
    """By the weight's name."""
    traced = chain()
    result = readers(traced, found(traced), KEEPS, refit, batches, untracked)
    return {str(node.args[1].target): reader for node, reader in result.items()}  # type: ignore[union-attr]


def test_readers_are_found_in_graph_order() -> None:
    assert list(thinned(False)) == ["v", "d"]


@pytest.mark.parametrize("batches", [[], BATCHES], ids=["no_data", "data"])
def test_without_a_fit_columns_go_and_all_else_stays(batches: list[list[Tensor]]) -> None:
    for (name, reader), keep in zip(thinned(False, batches).items(), KEEPS, strict=True):
        assert torch.equal(reader.keep, keep)
        assert torch.equal(reader.weight, torch.where(keep, WEIGHTS[name], 0))
        assert reader.bias is None if name == "v" else torch.equal(reader.bias, WEIGHTS["c"])


def test_the_error_is_known_only_with_data() -> None:
    assert all(reader.sqnr_db is None for reader in thinned(False, []).values())
    assert all(reader.sqnr_db is not None for reader in thinned(False).values())


def test_a_fit_lessens_the_error_of_each_layer() -> None:
    plain, fit = thinned(False), thinned(True)
    for name in ("v", "d"):
        before, after = plain[name].sqnr_db, fit[name].sqnr_db
        assert before is not None and after is not None and after > before + 0.5


def test_zeros_of_a_fit_are_exact() -> None:
    for reader, keep in zip(thinned(True).values(), KEEPS, strict=True):
        assert torch.equal((reader.weight != 0).any(0), keep)


def test_each_layer_is_fitted_behind_the_thinned_ones() -> None:
    """The second one gets what the first one gives without its units."""
    fit = thinned(True)
    x = torch.cat([batch[0] for batch in BATCHES])
    first = torch.tanh(F.linear(x, WEIGHTS["u"], WEIGHTS["b"]))
    second = torch.tanh(F.linear(first, fit["v"].weight))
    behind = fitted(second, WEIGHTS["d"], WEIGHTS["c"], KEEPS[1])[0]
    ahead = fitted(torch.tanh(F.linear(first, WEIGHTS["v"])), WEIGHTS["d"], WEIGHTS["c"], KEEPS[1])[0]
    torch.testing.assert_close(fit["d"].weight, behind, rtol=1e-3, atol=1e-4)
    assert not torch.isclose(behind, ahead, rtol=1e-3, atol=1e-3).all()


def test_a_layer_that_reads_two_families_loses_the_columns_of_both() -> None:
    """The first inputs of d are neurons of their own, because e reads them too."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(F.linear(x, m.u))
        return F.linear(torch.cat([h, F.relu(F.linear(x, m.w))], -1), m.d), F.linear(h, m.e)

    given = {"u": normal(8, COLUMNS), "w": normal(9, COLUMNS, seed=1), "d": normal(3, 17), "e": normal(3, 8)}
    traced = program(forward, normal(5, COLUMNS), **given)
    several = [
        Family("neurons", "", channels, tuple(a for f in found(traced) for a in f.columns), ())
        for channels in (torch.arange(8), torch.arange(8, 17))
    ]
    keeps = [torch.arange(8) != 3, torch.arange(9) != 5]
    both, first = readers(traced, several, keeps, False, [], untracked).values()
    assert (~both.keep).nonzero().flatten().tolist() == [3, 13]
    assert (~first.keep).nonzero().flatten().tolist() == [3]


def test_a_family_that_stays_as_it_is_is_not_fitted() -> None:
    traced = chain()
    keeps = [torch.ones(INNER, dtype=torch.bool), KEEPS[1]]
    first = next(iter(readers(traced, found(traced), keeps, True, BATCHES, untracked).values()))
    assert torch.equal(first.weight, WEIGHTS["v"])
    assert first.sqnr_db == float("inf")


# --- write, put_masks ------------------------------------------------------------------------------------------


def test_write_gives_the_layers_their_weights_and_biases() -> None:
    traced = chain().copy()
    result = readers(traced, found(traced), KEEPS, True, BATCHES, untracked)
    write(traced, result)
    v, d = result.values()
    assert d.bias is not None
    for name, tensor in (("v", v.weight), ("d", d.weight), ("c", d.bias)):
        assert torch.equal(getattr(traced.module, name), tensor)
    assert torch.equal(chain().module.d, WEIGHTS["d"])  # the copy alone


def with_masks() -> Program:
    traced = chain().copy()
    for family, keep in zip(found(traced), KEEPS, strict=True):
        put_masks(traced, family, keep)
    traced.clean()
    verify(traced)
    return traced


def test_masks_are_put_on_rows_biases_and_columns() -> None:
    traced = with_masks()
    found = {str(item.weight.target): traced.tensor(item.mask).bool() for item in masked(traced)}
    expected = {
        "u": KEEPS[0][:, None].expand(INNER, COLUMNS),
        "b": KEEPS[0],
        "v": KEEPS[1][:, None] & KEEPS[0],
        "d": KEEPS[1].expand(ROWS, INNER),
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_masked_rows_do_not_matter_where_columns_are_masked() -> None:
    x = correlated(3)
    truth = F.linear(torch.tanh(F.linear(x, WEIGHTS["u"], WEIGHTS["b"])), WEIGHTS["v"] * KEEPS[0])
    truth = F.linear(torch.tanh(truth), WEIGHTS["d"] * KEEPS[1], WEIGHTS["c"])
    torch.testing.assert_close(with_masks().run([x])[0].detach(), truth)
