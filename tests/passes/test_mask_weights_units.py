"""MaskWeights on heads, neurons, layers and branches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import assert_equal, before_after, normal, program, reasons, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.printer import print_program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.costs import unit_macs
from fxpress.ir.pruning.masks import masked
from fxpress.ir.pruning.units import families
from fxpress.ir.rewrite import Context, PassResult
from fxpress.passes import Canonicalize, Fold, Fuse, MaskWeights

METHODS = ("random", "magnitude", "wanda", "sparsegpt", "fisher", "movement")
PATTERNS = ("heads", "neurons", "heads+neurons")
HEADS, NEURONS = 4, 32  # of the encoder
TEXTS = [list(tiny.inputs(4, length).values()) for length in (6, 9, 7)]
SIZES = ((2, 6), (1, 1), (3, 11))


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].square().mean() + outputs[0][..., 0].mean()


def mask_units(method: str = "magnitude", pattern: str = "heads+neurons", **options: Any) -> MaskWeights:
    """With a loss where one is needed."""
    if method == "movement":
        options.setdefault("loss", loss)
    return MaskWeights(options.pop("sparsity", 0.5), method, pattern, **options)


@functools.cache
def encoder() -> Program:
    """One Transformer layer, canonical; not to be changed."""
    return rewritten(program(tiny.encoder(), *tiny.inputs().values()), Canonicalize())[0]


@functools.cache
def pruned(rewrite: MaskWeights) -> tuple[Program, PassResult]:
    """The encoder; not to be changed."""
    return rewritten(encoder(), rewrite, Context(calibration=TEXTS))


def outputs(traced: Program, size: tuple[int, int] = (3, 11)) -> Tensor:
    found: Tensor = traced.run(list(tiny.inputs(*size).values()))[0].detach()
    return found


def stay(traced: Program) -> tuple[int, int]:
    """How many heads and neurons an encoder has."""
    return len(traced.module.query.weight) // 4, len(traced.module.up.weight)


# --- golden graphs ---------------------------------------------------------------------------------------------


def mlp(m: Any, x: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(x, m.u, m.b)), m.d, m.c)


MLP = {"u": normal(24, 8), "b": normal(24, seed=1), "d": normal(8, 24, seed=2), "c": normal(8, seed=3)}
GOLDEN: dict[str, tuple[Callable[[], Program], MaskWeights]] = {
    "neurons": (lambda: program(mlp, normal(2, 5, 8), **MLP), mask_units(pattern="neurons", sparsity=0.3)),
    "neurons_left": (
        lambda: program(mlp, normal(2, 5, 8), **MLP),
        mask_units(pattern="neurons", sparsity=0.3, fold=False),
    ),
    "heads": (encoder, mask_units(pattern="heads")),
    "branches": (encoder, mask_units("random", "branches")),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_graph(case: str, golden: Callable[[str], None]) -> None:
    before = GOLDEN[case][0]()
    golden(before_after(before, *rewritten(before, GOLDEN[case][1])))


# --- heads and neurons -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_program_gives_what_the_masked_one_gives(method: str, pattern: str) -> None:
    small, masks = (pruned(mask_units(method, pattern, fold=fold))[0] for fold in (True, False))
    heads, neurons = stay(small)
    assert (heads < HEADS) is ("heads" in pattern) and (neurons < NEURONS) is ("neurons" in pattern)
    for size in SIZES:
        assert_equal(masks, small, list(tiny.inputs(*size).values()))


@pytest.mark.parametrize("method", METHODS)
def test_cut_at_once_or_later_is_the_same(method: str) -> None:
    at_once = pruned(mask_units(method))[0]
    later, result = rewritten(pruned(mask_units(method, fold=False))[0], Fold())
    assert print_program(at_once) == print_program(later)
    for name, weight in at_once.module.state_dict().items():
        assert torch.equal(later.module.state_dict()[name], weight)
    assert result.rewrites["heads"] == HEADS - stay(later)[0]


@pytest.mark.parametrize(("sparsity", "expected"), [(0.0, (4, 32)), (0.25, (3, 24)), (1.0, (1, 8))])
@pytest.mark.parametrize("method", METHODS)
def test_by_layer_every_family_loses_the_same_share(method: str, sparsity: float, expected: tuple[int, int]) -> None:
    assert stay(pruned(mask_units(method, scope="layer", sparsity=sparsity))[0]) == expected


def macs(heads: int, neurons: int) -> float:
    """Multiplications of so many units of the encoder."""
    channels = follow(encoder())
    costs = [unit_macs(encoder(), channels, family) for family in families(channels)[0]]
    return costs[0] * heads + costs[1] * neurons


@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_over_all_families_the_budget_of_multiplications_is_met(method: str, sparsity: float) -> None:
    heads, neurons = stay(pruned(mask_units(method, scope="global", sparsity=sparsity))[0])
    removed, budget = macs(HEADS, NEURONS) - macs(heads, neurons), sparsity * macs(HEADS, NEURONS)
    assert removed <= budget * 1.0001
    assert heads == 1 or removed + macs(1, 0) > budget
    assert neurons == 8 or removed + macs(0, 8) > budget


@pytest.mark.parametrize("method", ["sparsegpt", "fisher"])
def test_some_methods_look_at_all_families_together(method: str) -> None:
    found, expected = (pruned(mask_units(method, scope=scope, sparsity=0.2))[0] for scope in ("auto", "global"))
    assert stay(found) == stay(expected)


@pytest.mark.parametrize("pattern", ["heads", "neurons"])
@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher"])
def test_refit_lessens_the_error_of_the_layer_that_reads_units(method: str, pattern: str) -> None:
    before, after = (
        max(report.sqnr_db or 0 for report in pruned(mask_units(method, pattern, refit=refit))[1].sparsity)
        for refit in (False, True)
    )
    assert after > before + 0.3


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "movement"])
def test_without_a_refit_what_stays_is_as_it_was(method: str) -> None:
    before, after = encoder().module.state_dict(), pruned(mask_units(method, fold=False))[0].module.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_on_alike_neurons_making_up_for_what_goes_pays() -> None:
    """Of 24 neurons there are only 8 directions: with the others fitted, 16 go for next to nothing."""
    u = (normal(24, 8, seed=4) @ normal(8, 8, seed=5)) / 8
    before = program(lambda m, x: F.linear(F.linear(x, m.u), m.d), normal(2, 8), u=u, d=MLP["d"])
    context = Context(calibration=[[normal(64, 8, seed=seed)] for seed in (6, 7)])
    x = normal(64, 8, seed=8)
    small = [
        rewritten(before, mask_units(method, "neurons", sparsity=0.66), context)[0]
        for method in ("magnitude", "sparsegpt")
    ]
    errors = [sqnr_db(after.run([x])[0], before.run([x])[0]) for after in small]
    assert errors[0] < 10 and errors[1] > 20


def test_a_loss_says_what_matters() -> None:
    """Only the second output counts, which reads the last 12 neurons alone."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.linear(x, m.u).tanh()
        return F.linear(h, m.d).tanh(), F.linear(h, m.e)

    e = normal(3, 24, seed=9)
    e[:, :12] = 0
    before = program(forward, normal(2, 8), u=MLP["u"], d=MLP["d"] * 10, e=e)
    context = Context(calibration=[[normal(64, 8, seed=6)]])
    for method in ("fisher", "sparsegpt"):
        rewrite = mask_units(method, "neurons", sparsity=0.34, loss=lambda given: given[1].square().mean(), fold=False)
        after, _ = rewritten(before, rewrite, context)
        gone = (after.module.u_mask == 0).all(1)
        assert int(gone.sum()) == 8 and not gone[12:].any()


def test_what_was_done_is_reported() -> None:
    _, result = pruned(mask_units("wanda"))
    assert result.rewrites == {"heads": 2, "neurons": 16}
    done = [(match.rule, match.node, match.detail) for match in result.matches]
    assert done == [("heads", "out", "2 of 4 heads stay"), ("neurons", "down", "16 of 32 neurons stay")]
    shares = {report.layer: report.zeros / report.numbers for report in result.sparsity}
    assert shares == dict.fromkeys(("query", "key", "value", "out", "up", "down"), 0.5)


def test_only_readers_have_an_error() -> None:
    _, result = pruned(mask_units("wanda"))
    assert {report.layer for report in result.sparsity if report.sqnr_db is not None} == {"out", "down"}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_units_again(method: str) -> None:
    again = rewritten(encoder(), mask_units(method), Context(calibration=TEXTS))[0]
    for name, weight in pruned(mask_units(method))[0].module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], weight)


def test_another_seed_takes_other_units() -> None:
    first, second = (pruned(mask_units("random", "neurons", seed=seed))[0].module.up.weight for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_padding_holds_does_not_matter(method: str) -> None:
    ids, mask = TEXTS[1]
    first, second = (
        rewritten(encoder(), mask_units(method), Context(calibration=[[torch.where(mask, ids, fill), mask]]))[0]
        for fill in (0, 49)
    )
    for size in SIZES:
        torch.testing.assert_close(outputs(first, size), outputs(second, size))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": ["out"]}, (2, 32)),
        ({"layers": ["u*"]}, (4, 16)),
        ({"skip": ["query", "key", "value", "out"]}, (4, 16)),
        ({"skip": ["up", "down"]}, (2, 32)),
    ],
    ids=str,
)
def test_families_that_are_meant(options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert stay(rewritten(encoder(), mask_units(**options))[0]) == expected


@pytest.mark.parametrize("skip", ["query", "value", "out", "up", "down"])
def test_a_family_stays_if_one_of_its_layers_is_skipped(skip: str) -> None:
    after, _ = rewritten(encoder(), mask_units(skip=[skip]))
    assert getattr(after.module, skip).weight.shape == getattr(encoder().module, skip).weight.shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("budget", "expected"), [(0, (4, 32)), (1, (2, 32))])
def test_as_many_families_as_rewrites_are_left(budget: int, expected: tuple[int, int], method: str) -> None:
    context = Context(calibration=TEXTS, max_rewrites=budget)
    assert stay(rewritten(encoder(), mask_units(method, scope="layer"), context)[0]) == expected


def test_layers_whose_inputs_cannot_be_cut_are_refused_with_a_reason() -> None:
    """v reads the sum of what the block gives and of the input."""
    before = program(lambda m, x: F.linear(mlp(m, x), m.v), normal(2, 8), **MLP, v=normal(3, 8))
    _, result = rewritten(before, mask_units(pattern="neurons"))
    (refusal,) = result.refusals
    assert refusal.node == "v"
    assert refusal.reason.startswith("its inputs cannot be cut: add (aten.add.Tensor) joins it with x")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_before_and_after_fuse_are_the_same(pattern: str) -> None:
    rewrite = mask_units(pattern=pattern)
    early = rewritten(pruned(rewrite)[0], Fuse())[0]
    late = rewritten(rewritten(rewritten(encoder(), Fuse())[0], rewrite)[0], Fuse())[0]
    for size in SIZES:
        assert_equal(early, late, list(tiny.inputs(*size).values()))


@pytest.mark.slow
def test_units_are_cut_after_training_as_they_were_masked() -> None:
    compiled = fxpress.compile(tiny.encoder(), [mask_units(fold=False)], tiny.inputs(), backend="eager")
    module = compiled.program.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        (module(*tiny.inputs(3, 5 + step).values())[0] - 1).square().mean().backward()
        optimizer.step()
    folded = compiled.then([Fold()], backend="eager")
    assert stay(folded.program) == (2, 16) and masked(folded.program) == []
    for size in SIZES:
        assert folded.verify(tiny.inputs(*size)).equal


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_the_onnx_backend_gives_what_the_smaller_program_gives(method: str) -> None:
    calibration = [tiny.inputs(3, length) for length in (6, 9)]
    compiled = fxpress.compile(
        tiny.encoder(), [mask_units(method)], tiny.inputs(), calibration=calibration, backend="onnx"
    )
    for size in SIZES:
        found = torch.as_tensor(compiled(**tiny.inputs(*size)))
        torch.testing.assert_close(found, outputs(compiled.program, size), rtol=1e-4, atol=1e-5)


# --- layers and branches ---------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Four layers of two branches each, of which the first ones give their keys where `cached` says so."""

    def __init__(self, cached: Sequence[int] = (), gone: Sequence[str] = (), small: Sequence[str] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cached, self.gone = cached, gone
        sizes = {"key": (6, 6), "mix": (6, 6), "up": (6, 8), "down": (8, 6)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(4)
        )
        for name in small:
            for weight in self.get_submodule(f"layers.{name}").parameters():
                weight.data /= 1000

    def forward(self, x: Tensor) -> Any:
        keys = []
        for place, layer in enumerate(self.layers):
            if f"{place}.mix" not in self.gone:
                key = layer["key"](x)  # type: ignore[index]
                keys += [key] if place in self.cached else []
                x = x + layer["mix"](torch.tanh(key))  # type: ignore[index]
            if f"{place}.down" not in self.gone:
                x = x + layer["down"](F.relu(layer["up"](x)))  # type: ignore[index]
        return [x, *keys] if keys else x


X = normal(2, 5, 6)
ROWS = [[normal(3, 4, 6, seed=seed)] for seed in (1, 2)]


@functools.cache
def stack(small: tuple[str, ...] = (), cached: tuple[int, ...] = ()) -> Program:
    """Not to be changed."""
    return program(Stack(cached, small=small), X)


def dropped(rewrite: MaskWeights, of: Program | None = None, budget: int | None = None) -> tuple[list[str], Program]:
    after, result = rewritten(of or stack(), rewrite, Context(calibration=ROWS, max_rewrites=budget))
    return [match.node for match in result.matches], after


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_share_of_layers_goes(sparsity: float, count: int, method: str) -> None:
    names, after = dropped(MaskWeights(sparsity, method, "layers"))
    assert len(set(names)) == count and all(name.startswith("layers.") for name in names)
    assert len(after.calls(torch.ops.aten.linear.default)) == 4 * (4 - count)


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize(("sparsity", "count"), [(0.25, 2), (0.5, 4)])
def test_the_share_of_branches_goes(sparsity: float, count: int, method: str) -> None:
    names, _ = dropped(MaskWeights(sparsity, method, "branches"))
    assert len(set(names)) == count and all(name.endswith((".key", ".up")) for name in names)


def test_layers_that_add_next_to_nothing_go_first() -> None:
    small = ("1.mix", "1.down", "3.mix", "3.down")
    assert set(dropped(MaskWeights(0.5, pattern="layers"), stack(small))[0]) == {"layers.1", "layers.3"}


def test_branches_that_add_next_to_nothing_go_first() -> None:
    names, _ = dropped(MaskWeights(0.25, pattern="branches"), stack(("1.mix", "2.down")))
    assert set(names) == {"layers.1.key", "layers.2.up"}


def test_the_program_is_that_of_a_model_without_these_branches() -> None:
    _, after = dropped(MaskWeights(0.25, pattern="branches"), stack(("1.mix", "2.down")))
    by_hand = program(Stack(gone=("1.mix", "2.down")), X)
    for x in (X, normal(1, 1, 6), normal(3, 7, 6)):
        assert torch.equal(after.run([x])[0], by_hand.run([x])[0])


def test_a_seed_takes_the_same_layers_and_another_one_others() -> None:
    first, again, *others = (dropped(MaskWeights(0.5, "random", "layers", seed=seed))[0] for seed in (0, 0, 1, 2, 3))
    assert first == again and any(set(other) != set(first) for other in others)


def test_layers_that_are_named_and_not_skipped_go() -> None:
    names, _ = dropped(MaskWeights(1.0, "random", "layers", layers=["layers.1", "layers.2"], skip=["layers.2"]))
    assert names == ["layers.1"]


def test_as_many_layers_as_rewrites_are_left() -> None:
    assert len(dropped(MaskWeights(1.0, "random", "layers"), budget=2)[0]) == 2


@pytest.mark.parametrize("pattern", ["layers", "branches"])
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_layers_whose_keys_are_outputs_stay_with_a_reason(method: str, pattern: str) -> None:
    rewrite = MaskWeights(1.0, method, pattern)
    after, result = rewritten(stack(cached=(0, 2)), rewrite, Context(calibration=ROWS))
    assert len(result.matches) == (2 if pattern == "layers" else 6)
    assert len(reasons(result)) == 2
    assert all("aten.linear.default) is an output of the model" in reason for reason in reasons(result))
    assert len(after.run([X])) == 3


def test_a_model_whose_keys_are_all_outputs_has_no_layers_to_cut() -> None:
    message = "no layers that can be cut: layers.0: .*is an output of the model"
    with pytest.raises(RewriteError, match=message):
        rewritten(stack(cached=(0, 1, 2, 3)), MaskWeights(0.5, "random", "layers"))
