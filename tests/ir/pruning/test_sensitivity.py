"""Sensitivity against derivatives that torch computes exactly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor
from torch.func import functional_call, jacrev

from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.pruning.masks import put
from fxpress.ir.pruning.sensitivity import fisher, gradients, reach, slopes
from fxpress.ir.rewrite import untracked

WIDTH, INNER = 3, 4
WEIGHTS = {"u": normal(INNER, WIDTH), "b": normal(INNER, seed=1), "d": normal(2, INNER, seed=2)}
NAMES = list(WEIGHTS)
BATCHES = [[normal(2, 5, WIDTH, seed=seed)] for seed in (3, 4)]
Batches = Sequence[Sequence[Tensor]]

PROBES = 256  # of all batches together
# With random signs s, the square of sum s_i J_i has the mean sum J_i^2 and a variance of at most twice its square; that
# of the mean over the probes is as many times smaller. No number is off by more than four standard deviations.
TOLERANCE = 4 * (2 / PROBES) ** 0.5


def forward(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, m.u, m.b)), m.d)


@functools.cache
def traced() -> Program:
    """Not to be changed."""
    return program(forward, *BATCHES[0], **WEIGHTS)


def jacobians(of: Program, batch: Sequence[Tensor], output: int = 0) -> dict[str, Tensor]:
    """Of an output by each weight of `WEIGHTS`, [outputs, *weight]."""
    fixed = {name: weight.detach() for name, weight in of.module.named_parameters()}

    def run(live: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(of.module, {**fixed, **live}, tuple(batch))[output]
        return found.flatten()

    found: dict[str, Tensor] = jacrev(run)({name: fixed[name] for name in NAMES if name in fixed})
    return found


def exact(of: Program, batches: Batches, output: int = 0, real: Tensor | None = None) -> dict[str, Tensor]:
    """The sum of the squares of all derivatives of the vectors of an output, each in units of its length."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        vectors = of.run(batch)[output].detach()
        lengths = vectors.norm(dim=-1) if vectors.dim() else vectors.abs()
        counts = torch.ones_like(lengths) if real is None else real
        for name, jacobian in jacobians(of, batch, output).items():
            squares = jacobian.square().reshape(lengths.numel(), -1, *jacobian.shape[1:]).sum(1)
            weighted = (squares.movedim(0, -1) * (counts / lengths.square()).flatten()).sum(-1)
            total[name] = total.get(name, torch.zeros(())) + weighted
    return total


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return (outputs[0] - 1).square().mean()


def loss_gradients(batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """By autograd, of a program of its own."""
    alone = program(forward, *batch, **{name: weight.clone() for name, weight in WEIGHTS.items()})
    loss(alone.run(batch)).backward()
    return {name: weight.grad for name, weight in alone.module.named_parameters() if weight.grad is not None}


# --- without a loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fisher_is_the_sum_of_squared_derivatives(name: str) -> None:
    found = fisher(traced(), NAMES, BATCHES, None, untracked)[name] / (PROBES / len(BATCHES))
    torch.testing.assert_close(found, exact(traced(), BATCHES)[name], rtol=TOLERANCE, atol=0)


def test_fisher_of_an_output_of_one_number_is_exact() -> None:
    """Its sign does not matter to a square."""
    batch = [normal(1, 1, WIDTH)]
    alone = program(lambda m, x: forward(m, x).sum(), *batch, **WEIGHTS)
    found = fisher(alone, NAMES, [batch], None, untracked)
    for name, expected in exact(alone, [batch]).items():
        torch.testing.assert_close(found[name] / PROBES, expected)


def test_outputs_count_by_their_own_length() -> None:
    """So that one that is a thousand times as large does not hide the other."""
    both = program(lambda m, x: (forward(m, x), 1000 * F.linear(x, m.u)), *BATCHES[0], **WEIGHTS)
    found = fisher(both, ["u"], BATCHES, None, untracked)["u"] / (PROBES / len(BATCHES))
    expected = sum(exact(both, BATCHES, output)["u"] for output in range(2))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=0)


def test_the_same_numbers_come_out_again() -> None:
    first, second = (fisher(traced(), NAMES, BATCHES, None, untracked) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_a_weight_that_no_output_depends_on_has_none() -> None:
    weights = {"d": normal(2, WIDTH), "u": WEIGHTS["u"]}
    alone = program(lambda m, x: (F.linear(x, m.d), F.linear(x, m.u).argmax(-1)), *BATCHES[0], **weights)
    found = fisher(alone, ["u", "d"], BATCHES, None, untracked)
    assert found["d"].all() and not found["u"].any()


def test_masked_numbers_have_none() -> None:
    thinned = program(forward, *BATCHES[0], **WEIGHTS)
    keep = normal(INNER, WIDTH) > 0
    put(thinned, next(node for node in thinned.graph.nodes if node.target == "u"), keep)
    thinned.clean()
    found = fisher(thinned, ["u"], BATCHES, None, untracked)["u"]
    assert torch.equal(found > 0, keep)


def test_nothing_is_left_behind_in_the_program() -> None:
    of = program(forward, *BATCHES[0], **WEIGHTS)
    fisher(of, NAMES, BATCHES, None, untracked)
    slopes(of, NAMES, BATCHES, loss, untracked)
    assert all(torch.equal(weight, WEIGHTS[name]) for name, weight in of.module.named_parameters())
    assert all(weight.grad is None for weight in of.module.parameters())


@pytest.mark.parametrize(("batches", "rounds"), [(1, 256), (2, 256), (3, 258), (300, 300)])
def test_there_are_as_many_probes_of_each_batch_as_make_256(batches: int, rounds: int) -> None:
    alone = program(lambda m, x: F.linear(x, m.d), normal(2, INNER), d=WEIGHTS["d"])
    given = [[normal(2, INNER)]] * batches
    assert len(list(gradients(alone, ["d"], given, None, untracked))) == rounds


def test_progress_is_shown_by_probe() -> None:
    seen: list[tuple[int, str]] = []

    def track(items: Sequence[Any], title: str) -> Sequence[Any]:
        seen.append((len(items), title))
        return items

    fisher(traced(), NAMES, BATCHES, None, track)
    assert seen == [(PROBES, "measuring sensitivity")]


# --- padding and outputs that do not count ---------------------------------------------------------------------


def attended(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Tokens and a learned number for each place, attention over those that are no padding, and a residual."""
    x = x + m.places
    y = F.linear(x, m.u)[:, None]
    mixed: Tensor = torch.ops.fxpress.attention(y, y, y, key_mask=mask)
    return x + F.linear(mixed[:, 0], m.d)


PADDED: dict[str, Tensor] = {"places": normal(5, WIDTH), "u": WEIGHTS["u"], "d": normal(WIDTH, INNER)}
MASK = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])


def test_outputs_at_padding_do_not_count() -> None:
    given = [BATCHES[0][0], MASK]
    found = fisher(program(attended, *given, **PADDED), ["places"], [given], None, untracked)["places"]
    assert [bool(row.any()) for row in found] == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["u", "d"])
def test_outputs_beside_padding_count_as_without_it(name: str) -> None:
    given = [BATCHES[0][0], MASK]
    of = program(attended, *given, **PADDED)
    found = fisher(of, [name], [given], None, untracked)[name] / PROBES
    torch.testing.assert_close(found, exact(of, [given], real=MASK)[name], rtol=TOLERANCE, atol=0)


def test_what_padding_holds_does_not_matter() -> None:
    x = BATCHES[0][0]
    of = program(attended, x, MASK, **PADDED)
    other = torch.where(MASK.unsqueeze(-1), x, 100 * normal(2, 5, WIDTH, seed=9))
    first, second = (fisher(of, ["u"], [[item, MASK]], None, untracked)["u"] for item in (x, other))
    torch.testing.assert_close(first, second)


def test_keys_and_values_that_the_model_hands_on_do_not_count() -> None:
    def cached(m: Any, x: Tensor, last: bool) -> Any:
        y = F.linear(x, m.u)[:, None]
        mixed = F.linear(torch.ops.fxpress.attention(y, y, y)[:, 0], m.d)
        return (mixed, y) if last else mixed

    weights = {"u": WEIGHTS["u"], "d": WEIGHTS["d"]}
    with_keys = program(lambda m, x: cached(m, x, True), *BATCHES[0], **weights)
    without = program(lambda m, x: cached(m, x, False), *BATCHES[0], **weights)
    found, expected = (fisher(of, ["u"], BATCHES, None, untracked)["u"] for of in (with_keys, without))
    torch.testing.assert_close(found, expected)


def test_a_program_without_an_output_of_floats_is_refused() -> None:
    alone = program(lambda m, x: F.linear(x, m.d).argmax(-1), normal(2, INNER), d=WEIGHTS["d"])
    with pytest.raises(RewriteError, match=r"no output of floats to measure sensitivity by; give a loss"):
        fisher(alone, ["d"], [[normal(2, INNER)]], None, untracked)


def test_outputs_of_floats_are_not_needed_with_a_loss() -> None:
    """Here keys are the only ones."""

    def keys(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, m.u)[:, None]
        return y, torch.ops.fxpress.attention(y, y, y).argmax(-1)

    alone = program(keys, *BATCHES[0], u=WEIGHTS["u"])
    with pytest.raises(RewriteError, match="give a loss"):
        fisher(alone, ["u"], BATCHES, None, untracked)
    assert fisher(alone, ["u"], BATCHES, lambda outputs: outputs[0].square().sum(), untracked)["u"].all()


# --- with a loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fisher_of_a_loss_is_its_squared_gradient_summed_over_batches(name: str) -> None:
    found = fisher(traced(), NAMES, BATCHES, loss, untracked)[name]
    torch.testing.assert_close(found, sum(loss_gradients(batch)[name].square() for batch in BATCHES))


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_the_gradients_of_a_loss_summed_over_batches(name: str) -> None:
    found = slopes(traced(), NAMES, BATCHES, loss, untracked)[name]
    torch.testing.assert_close(found, sum(loss_gradients(batch)[name] for batch in BATCHES))


def test_a_loss_takes_one_round_a_batch() -> None:
    assert len(list(gradients(traced(), NAMES, BATCHES, loss, untracked))) == len(BATCHES)


def test_gradients_are_taken_where_they_are_switched_off() -> None:
    with torch.no_grad():
        found = slopes(traced(), ["u"], BATCHES, loss, untracked)["u"]
    assert found.any()


# --- what layers give ------------------------------------------------------------------------------------------


def tail(m: Any, h: Tensor) -> Tensor:
    """What `forward` makes of its first layer's values."""
    return F.linear(torch.tanh(h), m.d)


def test_reach_by_a_loss_is_made_of_its_derivatives_by_what_a_layer_gives() -> None:
    of = program(forward, *BATCHES[0], **WEIGHTS)
    layer = of.calls(torch.ops.aten.linear.default)[0]
    found = reach(of, [layer], BATCHES, loss, untracked)[layer]
    slope = []
    for (x,) in BATCHES:
        h = F.linear(x, WEIGHTS["u"], WEIGHTS["b"]).requires_grad_()
        loss([tail(of.module, h)]).backward()
        slope.append(h.grad.reshape(-1, INNER))  # type: ignore[union-attr]
    assert len(found.tokens) == len(BATCHES)
    for tokens, expected in zip(found.tokens, slope, strict=True):
        torch.testing.assert_close(tokens, expected.square().sum(1))
    torch.testing.assert_close(found.channels, sum(item.T @ item for item in slope))


def test_reach_by_an_output_of_one_number_is_exact() -> None:
    batch = [normal(1, 1, WIDTH)]
    of = program(lambda m, x: forward(m, x).sum(), *batch, **WEIGHTS)
    layer = of.calls(torch.ops.aten.linear.default)[0]
    found = reach(of, [layer], [batch], None, untracked)[layer]
    h = F.linear(batch[0], WEIGHTS["u"], WEIGHTS["b"])
    slope = jacrev(lambda value: tail(of.module, value).sum())(h).reshape(-1, INNER) / of.run(batch)[0].detach()
    torch.testing.assert_close(found.tokens[0], slope.square().sum(1))
    torch.testing.assert_close(found.channels, slope.T @ slope)


def test_tokens_that_are_padding_do_not_reach() -> None:
    given = [BATCHES[0][0], MASK]
    of = program(attended, *given, **PADDED)
    layer = of.calls(torch.ops.aten.linear.default)[0]
    found = reach(of, [layer], [given], None, untracked)[layer]
    assert found.tokens[0].shape == (int(MASK.sum()),)
    assert found.tokens[0].all()


def test_a_layer_that_no_output_depends_on_does_not_reach() -> None:
    weights = {"d": normal(2, WIDTH), "u": WEIGHTS["u"]}
    of = program(lambda m, x: (F.linear(x, m.d), F.linear(x, m.u).argmax(-1)), *BATCHES[0], **weights)
    first, second = of.calls(torch.ops.aten.linear.default)
    found = reach(of, [first, second], BATCHES, None, untracked)
    assert found[first].channels.any() and not found[second].channels.any()
