"""Layers that make and read thinned units: zeros are exact, and what stays makes up for what goes."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.leastsquares import Batch, by_length, fitted
from fxpress.ir.pruning.masks import masked, put, stored
from fxpress.ir.pruning.sensitivity import Reach
from fxpress.ir.pruning.structured import Layer, put_masks, thinned, write
from fxpress.ir.pruning.units import Family, families
from fxpress.ir.rewrite import untracked
from fxpress.ir.verify import verify

ROWS, COLUMNS, TOKENS = 4, 6, 50


def correlated(seed: int = 0) -> Tensor:
    """Tokens of similar lengths."""
    return normal(TOKENS, COLUMNS, seed=seed + 10) @ (torch.eye(COLUMNS) + normal(COLUMNS, COLUMNS, seed=seed + 20) / 2)


# --- thinned ---------------------------------------------------------------------------------------------------

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


def chain_thinned(refit: bool, batches: list[list[Tensor]] = BATCHES) -> dict[str, Layer]:
    """By the weight's name."""
    traced = chain()
    result = thinned(traced, found(traced), KEEPS, refit, batches, untracked)
    return {str(node.args[1].target): layer for node, layer in result.items()}  # type: ignore[union-attr]


def gives(rows: Tensor, name: str) -> Tensor:
    """What a layer gives, as it was."""
    return F.linear(rows, WEIGHTS[name], {"u": WEIGHTS["b"], "d": WEIGHTS["c"]}.get(name))


def test_layers_are_found_in_graph_order() -> None:
    assert list(chain_thinned(False)) == ["v", "d"]
    assert list(chain_thinned(True)) == ["u", "v", "d"]  # u makes units


@pytest.mark.parametrize("batches", [[], BATCHES], ids=["no_data", "data"])
def test_without_a_fit_columns_go_and_all_else_stays(batches: list[list[Tensor]]) -> None:
    for (name, layer), keep in zip(chain_thinned(False, batches).items(), KEEPS, strict=True):
        assert torch.equal(layer.keep, keep)
        assert torch.equal(layer.weight, torch.where(keep, WEIGHTS[name], 0))
        assert layer.bias is None if name == "v" else torch.equal(layer.bias, WEIGHTS["c"])


def test_the_error_is_known_only_with_data() -> None:
    assert all(layer.sqnr_db is None for layer in chain_thinned(False, []).values())
    assert all(layer.sqnr_db is not None for refit in (False, True) for layer in chain_thinned(refit).values())


def test_the_error_is_that_of_the_outputs_each_token_in_units_of_its_length() -> None:
    layer = chain_thinned(True)["v"]
    rows = torch.tanh(gives(torch.cat([batch[0] for batch in BATCHES]), "u"))
    wrong, truth = F.linear(rows, layer.weight), gives(rows, "v")
    share = (wrong - truth).square().sum(1) / truth.square().sum(1)
    assert layer.sqnr_db == pytest.approx(-10 * math.log10(float(share.mean())), rel=1e-4)


def test_zeros_of_a_fit_are_exact() -> None:
    for name, keep in zip(("v", "d"), KEEPS, strict=True):
        assert torch.equal((chain_thinned(True)[name].weight != 0).any(0), keep)


def test_what_nothing_has_changed_before_stays_as_it_is() -> None:
    first = chain_thinned(True)["u"]
    assert torch.equal(first.weight, WEIGHTS["u"]) and first.sqnr_db == math.inf


def test_each_layer_is_fitted_behind_the_thinned_ones_to_what_it_gave_before_them() -> None:
    fit = chain_thinned(True)
    batches = []
    for (x,) in BATCHES:
        first = torch.tanh(gives(x, "u"))
        truth = gives(torch.tanh(gives(first, "v")), "d")
        batches.append(Batch(torch.tanh(F.linear(first, fit["v"].weight)), truth, by_length(truth)))
    weight, bias = fitted(batches, WEIGHTS["d"], WEIGHTS["c"], KEEPS[1])
    assert fit["d"].bias is not None and bias is not None
    torch.testing.assert_close(fit["d"].weight, weight)
    torch.testing.assert_close(fit["d"].bias, bias)


# --- residual streams ------------------------------------------------------------------------------------------

BLOCK = {
    name: normal(*sizes, seed=seed) / 4
    for seed, (name, sizes) in enumerate(
        {"u": (INNER, COLUMNS), "d": (COLUMNS, INNER), "v": (INNER, COLUMNS), "e": (COLUMNS, INNER)}.items()
    )
}


def in_turn(m: Any, x: Tensor) -> Tensor:
    """Two blocks, one behind the other."""
    x = x + F.linear(torch.tanh(F.linear(x, m.u)), m.d)
    return x + F.linear(torch.tanh(F.linear(x, m.v)), m.e)


def side_by_side(m: Any, x: Tensor) -> Tensor:
    """Two blocks that read the same, and are added before the stream is."""
    return (F.linear(torch.tanh(F.linear(x, m.u)), m.d) + F.linear(torch.tanh(F.linear(x, m.v)), m.e)) + x


def scaled(m: Any, x: Tensor) -> Tensor:
    """The stream is not what the layer's outputs are added to alone."""
    x = x + F.linear(torch.tanh(F.linear(x, m.u)), m.d)
    return torch.add(x, F.linear(torch.tanh(F.linear(x, m.v)), m.e), alpha=2)


def block_thinned(forward: Any) -> dict[str, Layer]:
    traced = program(forward, normal(5, COLUMNS), **BLOCK)
    result = thinned(traced, found(traced), KEEPS, True, BATCHES, untracked)
    return {str(node.args[1].target): layer for node, layer in result.items()}  # type: ignore[union-attr]


def last_fit(fit: dict[str, Layer], forward: Any, target: Any) -> Tensor:
    """The weight of e fitted to `target(stream as it was, as it is, what d and e gave, what d gives)`."""
    batches = []
    for (x,) in BATCHES:
        branch = torch.tanh(F.linear(x, BLOCK["u"]))
        d_was, d_is = F.linear(branch, BLOCK["d"]), F.linear(branch, fit["d"].weight)
        was, now = (x, x) if forward is side_by_side else (x + d_was, x + d_is)
        e_was = F.linear(torch.tanh(F.linear(was, BLOCK["v"])), BLOCK["e"])
        outputs, whole = target(was, now, d_was, d_is, e_was)
        batches.append(Batch(torch.tanh(F.linear(now, fit["v"].weight)), outputs, by_length(whole)))
    return fitted(batches, BLOCK["e"], None, KEEPS[1])[0]


TARGETS: dict[str, tuple[Any, Any]] = {
    "in_turn": (in_turn, lambda was, now, d_was, d_is, e: (was + e - now, was + e)),
    "side_by_side": (side_by_side, lambda was, now, d_was, d_is, e: (d_was + e - d_is, was + d_was + e)),
    "scaled": (scaled, lambda was, now, d_was, d_is, e: (e, e)),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_sum_is_fitted_to_what_it_was(case: str) -> None:
    """Where it is a sum of nothing else."""
    forward, target = TARGETS[case]
    fit = block_thinned(forward)
    torch.testing.assert_close(fit["e"].weight, last_fit(fit, forward, target), rtol=1e-4, atol=1e-5)
    if case != "scaled":
        alone = last_fit(fit, forward, TARGETS["scaled"][1])
        assert not torch.isclose(fit["e"].weight, alone, rtol=1e-2, atol=1e-3).all()


def test_tokens_count_as_far_as_they_reach() -> None:
    """Where that is known."""
    traced = chain()
    v = next(node for node in traced.calls(torch.ops.aten.linear.default) if node.args[1].target == "v")  # type: ignore[union-attr]
    reaches = {v: Reach([torch.rand(TOKENS) for _ in BATCHES])}
    layer = thinned(traced, found(traced), KEEPS, True, BATCHES, untracked, reaches)[v]
    rows = [torch.tanh(gives(x, "u")) for (x,) in BATCHES]
    batches = [Batch(x, gives(x, "v"), tokens) for x, tokens in zip(rows, reaches[v].tokens, strict=True)]
    torch.testing.assert_close(layer.weight, fitted(batches, WEIGHTS["v"], None, KEEPS[0])[0])
    assert not torch.isclose(layer.weight, chain_thinned(True)["v"].weight, rtol=1e-3, atol=1e-4).all()


def test_what_makes_units_is_fitted_to_what_it_gave() -> None:
    fit = block_thinned(in_turn)
    batches = []
    for (x,) in BATCHES:
        branch = torch.tanh(F.linear(x, BLOCK["u"]))
        truth = F.linear(x + F.linear(branch, BLOCK["d"]), BLOCK["v"])
        batches.append(Batch(x + F.linear(branch, fit["d"].weight), truth, by_length(truth)))
    whole = torch.ones(COLUMNS, dtype=torch.bool)
    torch.testing.assert_close(fit["v"].weight, fitted(batches, BLOCK["v"], None, whole)[0], rtol=1e-4, atol=1e-5)


def test_what_makes_units_and_has_a_mask_stays_as_it_is() -> None:
    """Its zeros are there to stay."""
    traced = program(in_turn, normal(5, COLUMNS), **BLOCK)
    weight = next(node for node in traced.graph.nodes if node.target == "v")
    put(traced, weight, torch.arange(COLUMNS) > 1)
    result = thinned(traced, found(traced), KEEPS, True, BATCHES, untracked)
    assert [str(stored(node.args[1]).target) for node in result] == ["u", "d", "e"]  # type: ignore[union-attr]


# --- several families ------------------------------------------------------------------------------------------


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
    both, first = thinned(traced, several, keeps, False, [], untracked).values()
    assert (~both.keep).nonzero().flatten().tolist() == [3, 13]
    assert (~first.keep).nonzero().flatten().tolist() == [3]


def test_a_family_that_stays_as_it_is_is_not_fitted() -> None:
    traced = chain()
    keeps = [torch.ones(INNER, dtype=torch.bool), KEEPS[1]]
    _, first, last = thinned(traced, found(traced), keeps, True, BATCHES, untracked).values()
    assert torch.equal(first.weight, WEIGHTS["v"]) and first.sqnr_db == math.inf
    assert not last.weight[:, :8].any()


# --- write, put_masks ------------------------------------------------------------------------------------------


def test_write_gives_the_layers_their_weights_and_biases() -> None:
    traced = chain().copy()
    result = thinned(traced, found(traced), KEEPS, True, BATCHES, untracked)
    write(traced, result)
    _, v, d = result.values()
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
