"""Masks that grow while a model is trained: the ramp, which numbers go and how many, what is refused, resuming."""

import functools
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program, rewritten
from torch import Tensor

from fxpress.ir.errors import InputError
from fxpress.ir.graph import Program
from fxpress.ir.pruning.masks import fold, masked
from fxpress.ir.pruning.schedule import MaskScheduler, ramp
from fxpress.ir.pruning.select import lowest, n_of_m
from fxpress.ir.verify import verify
from fxpress.passes import MaskWeights

SHAPES = {"w": (24, 8), "v": (8, 24)}
NUMBERS = 24 * 8 * 2
LAYERS = list(SHAPES)  # named, because the last would be spared


@functools.cache
def traced() -> Program:
    """Two linear layers [8 -> 24 -> 8]."""
    weights = {"w": normal(24, 8) / 3, "b": normal(24, seed=1), "v": normal(8, 24, seed=2) / 5}
    return program(lambda m, x: F.linear(F.gelu(F.linear(x, m.w, m.b)), m.v), normal(16, 8), **weights)


def with_masks(*passes: MaskWeights) -> Program:
    """The layers with masks, and tensors of their own."""
    made = traced()
    for item in passes or (MaskWeights(0.0, layers=LAYERS, fold=False),):
        made, _ = rewritten(made, item)
    for node in made.graph.nodes:
        if node.op == "get_attr":
            made.set_weight(node, made.tensor(node))
    return made


def masks(made: Program) -> dict[str, Tensor]:
    """A copy of each mask by the name of its weight, True for what stays."""
    return {str(item.weight.target): made.tensor(item.mask) != 0 for item in masked(made)}


def effective(made: Program) -> dict[str, Tensor]:
    """What the layers read."""
    return {
        str(item.weight.target): (made.tensor(item.weight) * made.tensor(item.mask)).detach() for item in masked(made)
    }


def zeros(made: Program) -> dict[str, int]:
    return {name: int((~keep).sum()) for name, keep in masks(made).items()}


def losses(made: Program, count: int, seed: int = 3) -> Iterator[Tensor]:
    x, target = normal(16, 8, seed=seed), normal(16, 8, seed=seed + 1)
    for _ in range(count):
        yield (made.run([x])[0] - target).square().mean()


def train(made: Program, scheduler: MaskScheduler, optimizer: torch.optim.Optimizer, count: int) -> None:
    for loss in losses(made, count):
        optimizer.zero_grad()
        loss.backward()
        scheduler.observe()
        optimizer.step()
        scheduler.step()


def adam(made: Program) -> torch.optim.Optimizer:
    """With momentum and weight decay, both of which move masked parameters."""
    return torch.optim.Adam(made.module.parameters(), lr=0.01, weight_decay=0.1)


# --- the ramp --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.2), (10, 0.2), (20, 0.8 - 0.6 * 0.75**3), (30, 0.8 - 0.6 / 8), (40, 0.8 - 0.6 / 64), (50, 0.8), (90, 0.8)],
)
def test_ramp(step: int, share: float) -> None:
    assert ramp(step, 0.8, 0.2, begin=10, end=50) == pytest.approx(share, abs=1e-12)


def test_ramp_ends_at_the_very_number() -> None:
    assert [ramp(7, share / 100, 0.01, 0, 7) for share in range(101)] == [share / 100 for share in range(101)]


# --- how many go, and when -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", ["magnitude", "movement", "random"])
def test_counts_are_exact_at_each_update_and_stay_between(method: str, scope: str) -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.7, method, begin=2, end=12, every=3, start=0.1, scope=scope)
    optimizer, seen = adam(made), []
    for step in range(1, 16):
        before = zeros(made)
        train(made, scheduler, optimizer, 1)
        if step not in (2, 5, 8, 11, 12):
            assert zeros(made) == before
        else:
            seen.append(step)
            share = ramp(step, 0.7, 0.1, 2, 12)
            if scope == "layer":
                assert zeros(made) == {name: round(share * 192) for name in SHAPES}
            assert sum(zeros(made).values()) == pytest.approx(round(share * NUMBERS), abs=scope == "layer")
    assert seen == [2, 5, 8, 11, 12]
    assert scheduler.steps == 15
    assert [step for step, _ in scheduler.history] == seen
    assert scheduler.history[-1][1] == scheduler.sparsity_now == sum(zeros(made).values()) / NUMBERS
    assert round(scheduler.sparsity_now * NUMBERS) in (round(0.7 * NUMBERS), 2 * round(0.7 * 192))


@pytest.mark.parametrize("method", ["magnitude", "movement", "random"])
def test_what_is_masked_once_stays_masked(method: str) -> None:
    made = with_masks()
    scheduler, optimizer = MaskScheduler(made, 0.9, method, end=10, every=1), adam(made)
    for _ in range(10):
        before = masks(made)
        train(made, scheduler, optimizer, 1)
        assert all(not bool((keep & ~before[name]).any()) for name, keep in masks(made).items())


def test_a_hundredth_of_the_ramp_lies_between_updates_unless_told() -> None:
    assert [MaskScheduler(with_masks(), 0.5, begin=100, end=end).every for end in (101, 250, 1100)] == [1, 1, 10]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_of_m_is_reached_by_exact_counts(pattern: str) -> None:
    made, (keep, of) = with_masks(), map(int, pattern.split(":"))
    share = 1 - keep / of
    scheduler, optimizer = MaskScheduler(made, None, pattern=pattern, end=6, every=1), adam(made)
    for step in range(1, 7):
        train(made, scheduler, optimizer, 1)
        assert zeros(made) == {name: round(ramp(step, share, 0, 0, 6) * 192) for name in SHAPES}
        assert all(int(item.reshape(-1, of).sum(1).min()) >= keep for item in masks(made).values())
    assert all(bool((item.reshape(-1, of).sum(1) == keep).all()) for item in masks(made).values())


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "movement", "random"])
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_zeros_stay_zeros_and_the_others_move(method: str, kind: str) -> None:
    made = with_masks()
    optimizer = {
        "adam": lambda: adam(made),
        "adamw": lambda: torch.optim.AdamW(made.module.parameters(), lr=0.01, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(made.module.parameters(), lr=0.05, momentum=0.9),
    }[kind]()
    scheduler = MaskScheduler(made, 0.5, method, end=5, every=1)
    train(made, scheduler, optimizer, 5)
    kept, start = masks(made), effective(made)
    hidden = {name: made.tensor(item.weight).detach().clone() for item in masked(made) for name in [item.weight.target]}
    for _ in range(10):
        train(made, scheduler, optimizer, 1)
        for name, value in effective(made).items():
            assert bool((value[~kept[name]] == 0).all())
    for item in masked(made):
        name = str(item.weight.target)
        assert torch.equal(masks(made)[name], kept[name])
        assert bool((effective(made)[name] != start[name])[kept[name]].all())
        moved = made.tensor(item.weight).detach() != hidden[name]
        assert bool(moved[~kept[name]].any())  # the optimizer moves parameters behind the masks, and nobody sees it
    expected = made.run([normal(16, 8, seed=9)])[0].detach()
    assert fold(made) == 2
    verify(made)
    assert torch.equal(made.run([normal(16, 8, seed=9)])[0].detach(), expected)
    assert {name: int((made.module.get_parameter(name) == 0).sum()) for name in SHAPES} == {"w": 96, "v": 96}


def test_a_module_that_is_converted_is_followed() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, end=2)
    made.module.double()  # has other buffers, as one that moves to a GPU has
    for _ in range(2):
        scheduler.step()
    assert zeros(made) == {"w": 96, "v": 96}
    assert all(made.tensor(item.mask).dtype == torch.float64 for item in masked(made))


# --- which numbers go ------------------------------------------------------------------------------------------


def test_magnitude_takes_the_smallest() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.6, end=4, every=1)
    for _ in range(4):
        scheduler.step()
    for name, keep in masks(made).items():
        assert torch.equal(keep, lowest([made.module.get_parameter(name).detach().abs()], 0.6)[0])


def test_global_scope_has_one_threshold() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.6, end=4, every=1, scope="global")
    for _ in range(4):
        scheduler.step()
    kept = masks(made)
    values = {name: made.module.get_parameter(name).detach().abs() for name in SHAPES}
    highest = max(float(values[name][~keep].max()) for name, keep in kept.items())
    assert highest <= min(float(values[name][keep].min()) for name, keep in kept.items())
    assert sum(zeros(made).values()) == round(0.6 * NUMBERS) and len(set(zeros(made).values())) == 2
    assert {layer.layer: layer.zeros for layer in scheduler.layers} == zeros(made)


def test_n_of_m_takes_the_smallest_of_each_group() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, pattern="2:4", end=3, every=1)
    for _ in range(3):
        scheduler.step()
    for name, keep in masks(made).items():
        assert torch.equal(keep, n_of_m(made.module.get_parameter(name).detach().abs(), 2, 4))


def test_random_is_that_of_the_pass() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, "random", end=3, every=1, seed=4)
    for _ in range(3):
        scheduler.step()
    expected = masks(with_masks(MaskWeights(0.5, "random", layers=LAYERS, seed=4, fold=False)))
    assert all(torch.equal(keep, expected[name]) for name, keep in masks(made).items())
    other = masks(with_masks(MaskWeights(0.5, "random", layers=LAYERS, seed=5, fold=False)))
    assert not torch.equal(other["w"], expected["w"])


def single() -> tuple[Program, Tensor]:
    """A linear layer without bias, and its weight [16, 8]."""
    traced = program(lambda m, x: F.linear(x, m.w), normal(8, 8), w=normal(16, 8))
    made, _ = rewritten(traced, MaskWeights(0.0, layers=["w"], fold=False))
    return made, made.module.get_parameter("w")


def test_movement_takes_what_the_loss_shrinks() -> None:
    made, weight = single()
    shrinks = normal(16, 8, seed=5).argsort(dim=1) % 2 == 0  # half of them, large and small
    target = torch.where(shrinks, 0.0, 3 * weight.detach())
    scheduler = MaskScheduler(made, 0.5, "movement", end=6, every=2, begin=1)
    optimizer = torch.optim.SGD(made.module.parameters(), lr=0.02)
    for _ in range(6):
        optimizer.zero_grad()
        (made.run([torch.eye(8)])[0] - target.T).square().sum().backward()
        scheduler.observe()
        optimizer.step()
        scheduler.step()
    assert torch.equal(masks(made)["w"], ~shrinks)
    assert not torch.equal(lowest([weight.detach().abs()], 0.5)[0], ~shrinks)


def test_movement_is_the_sum_of_minus_weight_times_gradient() -> None:
    made, weight = single()
    scheduler = MaskScheduler(made, 0.5, "movement", end=6, every=6)
    total, optimizer = torch.zeros(16, 8), torch.optim.SGD(made.module.parameters(), lr=0.02)
    for _ in range(6):
        optimizer.zero_grad()
        for seed in (1, 2):  # accumulated over two batches
            (made.run([normal(8, 8, seed=seed)])[0] - 1).square().sum().backward()
        assert weight.grad is not None
        total -= weight.detach() * weight.grad
        scheduler.observe()
        optimizer.step()
        scheduler.step()
    assert torch.equal(masks(made)["w"], lowest([total], 0.5)[0])


def test_gradients_that_are_not_finite_count_for_nothing() -> None:
    """As a GradScaler skips such steps; the schedule goes on."""
    made, weight = single()
    scheduler = MaskScheduler(made, 0.5, "movement", end=3, every=1)
    weight.grad = torch.full_like(weight, torch.inf)
    scheduler.observe()
    scheduler.step()
    assert zeros(made) == {"w": 0} and scheduler.history == []
    weight.grad = normal(16, 8, seed=8)
    scheduler.observe()
    scheduler.step()
    weight.grad = torch.full_like(weight, torch.nan)
    scheduler.observe()
    scheduler.step()
    assert torch.equal(masks(made)["w"], lowest([-weight.detach() * normal(16, 8, seed=8)], 0.5)[0])


# --- masks that are there already ------------------------------------------------------------------------------


def test_masks_that_are_there_stay_and_count() -> None:
    made = with_masks(MaskWeights(0.3, "random", layers=LAYERS, fold=False))
    before = masks(made)
    scheduler = MaskScheduler(made, 0.6, start=0.0, end=6, every=1)
    assert scheduler.sparsity_now == pytest.approx(0.3, abs=0.01)
    found = []
    for step in range(1, 7):
        scheduler.step()
        found.append(zeros(made)["w"])
        assert found[-1] == max(round(0.3 * 192), round(ramp(step, 0.6, 0, 0, 6) * 192))
        assert all(not bool((keep & ~before[name]).any()) for name, keep in masks(made).items())
    assert found[-1] == round(0.6 * 192)


@pytest.mark.parametrize(
    ("passes", "options", "reason"),
    [
        (MaskWeights(0.6, layers=LAYERS, fold=False), {}, "59.9% of w are masked already"),
        (MaskWeights(0.6, layers=["w"], fold=False), {}, "59.9% of w are masked already"),
        (MaskWeights(0.6, layers=LAYERS, fold=False), {"scope": "global"}, "59.9% of the model are masked already"),
        (MaskWeights(0.4, layers=LAYERS, fold=False), {"pattern": "2:4"}, "the masks leave [01] of 4 neighbours of w"),
        (MaskWeights(0.5, pattern="neurons", fold=False), {}, "masks of whole rows or columns"),
    ],
    ids=["layer", "one layer", "global", "n:m", "neurons"],
)
def test_masks_that_do_not_fit_are_refused(passes: MaskWeights, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        MaskScheduler(with_masks(passes), 0.5, end=5, **options)


def test_neurons_without_biases_are_refused_too() -> None:
    both = {"w": normal(24, 8), "v": normal(8, 24)}
    made = program(lambda m, x: F.linear(F.gelu(F.linear(x, m.w)), m.v), normal(16, 8), **both)
    made, _ = rewritten(made, MaskWeights(0.5, pattern="neurons", fold=False))
    assert all(made.tensor(item.mask).dim() == 2 for item in masked(made))
    with pytest.raises(InputError, match="masks of whole rows or columns"):
        MaskScheduler(made, 0.9, end=5)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_all(sparsity: float) -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, sparsity, end=2)
    for _ in range(3):
        scheduler.step()
    assert scheduler.sparsity_now == sparsity
    assert MaskScheduler(made, sparsity, end=2).sparsity_now == sparsity  # made once more, on masks such as these


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparsity": 1.5}, "sparsity must lie between 0 and 1, found 1.5"),
        ({"sparsity": float("nan")}, "sparsity must lie between 0 and 1, found nan"),
        ({"sparsity": True}, "sparsity must lie between 0 and 1, found True"),
        ({"sparsity": None}, "sparsity must lie between 0 and 1, found None"),
        ({"method": "magnitud"}, "unknown method 'magnitud': did you mean 'magnitude'"),
        ({"method": "wanda"}, r"unknown method 'wanda': .*\(valid: magnitude, movement, random\)"),
        ({"scope": "auto"}, "unknown scope 'auto'"),
        ({"pattern": "unstructred"}, "unknown pattern 'unstructred': did you mean 'unstructured'"),
        ({"pattern": 24}, "unknown pattern 24"),
        ({"pattern": "heads"}, "heads do not go by a schedule: let MaskWeights choose them at once"),
        ({"pattern": "neurons"}, "neurons do not go by a schedule"),
        ({"pattern": "blocks"}, "blocks do not go by a schedule"),
        ({"pattern": "4:4"}, "must keep some, not all, of each group"),
        ({"pattern": "0:4"}, "must keep some, not all, of each group"),
        ({"pattern": "2:4", "sparsity": 0.7}, "pattern '2:4' is a sparsity of 0.5, found 0.7"),
        ({"pattern": "2:4", "scope": "global"}, "every layer has its share of 2:4"),
        ({"pattern": "3:5", "sparsity": None}, "w cannot have pattern '3:5': 8 inputs are no multiple of 5"),
        ({"start": 0.6}, "start must lie between 0 and the sparsity of 0.5, found 0.6"),
        ({"start": -0.1}, "start must lie between 0"),
        ({"begin": -1}, "begin must be a number of steps, 0 or more, found -1"),
        ({"begin": 10}, "must end after it begins, found begin=10 and end=10"),
        ({"end": 0}, "end must be a number of steps, 1 or more, found 0"),
        ({"end": 100.0}, "end must be a number of steps, 1 or more, found 100.0"),
        ({"every": 0}, "every must be a number of steps, 1 or more, found 0"),
        ({"every": True}, "every must be a number of steps, 1 or more, found True"),
        ({"seed": "1"}, "seed must be int, found '1'"),
        ({"program": SimpleNamespace()}, "program must be a Program, found a SimpleNamespace; give compiled.program"),
    ],
    ids=lambda value: "-".join(f"{name}={item}" for name, item in value.items()) if isinstance(value, dict) else "",
)
def test_arguments_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        MaskScheduler(**{"program": with_masks(), "sparsity": 0.5, "end": 10, **options})


def test_a_program_without_masks_is_refused() -> None:
    with pytest.raises(InputError, match=r"no masks; compile the model with MaskWeights\(0.0, fold=False\)"):
        MaskScheduler(traced(), 0.5, end=10)


def test_movement_that_is_not_observed_is_refused() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, "movement", end=4, every=1)
    train(made, scheduler, adam(made), 1)
    with pytest.raises(InputError, match=r"not seen the gradients of step 2: call observe\(\) after backward"):
        scheduler.step()
    assert scheduler.steps == 1
    train(made, scheduler, adam(made), 3)
    scheduler.step()  # the end is behind
    scheduler.observe()
    assert scheduler.steps == 5


def test_movement_observed_at_the_wrong_place_is_refused() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, "movement", end=2)
    with pytest.raises(InputError, match=r"there are no gradients: call observe\(\) after backward\(\)"):
        scheduler.observe()
    next(losses(made, 1)).backward()
    gradient, made.module.get_parameter("v").grad = made.module.get_parameter("v").grad, None
    with pytest.raises(InputError, match=r"weight v has no gradient, .* compile with MaskWeights\(0.0, skip=\['v'\]"):
        scheduler.observe()
    made.module.get_parameter("v").grad = gradient
    scheduler.observe()
    with pytest.raises(InputError, match=r"observe\(\) was called twice in step 1"):
        scheduler.observe()


@pytest.mark.parametrize(("value", "reason"), [(0.0, "are zero"), (torch.nan, "have infinities or NaN")])
def test_movement_that_has_seen_nothing_is_refused(value: float, reason: str) -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, "movement", end=1)
    for parameter in made.module.parameters():
        parameter.grad = torch.full_like(parameter, value)
    scheduler.observe()
    with pytest.raises(InputError, match=f"all gradients that movement has seen {reason}"):
        scheduler.step()
    assert zeros(made) == {"w": 0, "v": 0}


def test_movement_of_frozen_weights_is_refused() -> None:
    made = with_masks()
    made.module.get_parameter("v").requires_grad_(False)
    with pytest.raises(InputError, match="weight v is frozen"):
        MaskScheduler(made, 0.5, "movement", end=2)
    assert MaskScheduler(made, 0.5, end=2).sparsity_now == 0


# --- resuming --------------------------------------------------------------------------------------------------


def saved(state: Any) -> Any:
    """Through a file, as tensors and numbers only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", ["magnitude", "movement", "random"])
def test_training_that_is_resumed_goes_on_as_if_it_had_not_stopped(method: str) -> None:
    def begin() -> tuple[Program, MaskScheduler, torch.optim.Optimizer]:
        made = with_masks()
        return made, MaskScheduler(made, 0.7, method, end=12, every=2, seed=3), adam(made)

    whole = begin()
    train(*whole, 15)
    first, second = begin(), begin()
    train(*first, 7)
    for part, after in zip(
        (first[0].module, first[2], first[1]), (second[0].module, second[2], second[1]), strict=True
    ):
        after.load_state_dict(saved(part.state_dict()))
    train(*second, 8)
    for name, value in whole[0].module.state_dict().items():
        assert torch.equal(second[0].module.state_dict()[name], value), name
    assert second[1].history == whole[1].history and second[1].steps == 15


def test_a_state_is_no_view_of_the_schedule() -> None:
    made = with_masks()
    scheduler, optimizer = MaskScheduler(made, 0.5, "movement", end=8, every=2), adam(made)
    train(made, scheduler, optimizer, 2)
    state = scheduler.state_dict()
    before = saved(state)
    train(made, scheduler, optimizer, 3)
    assert all(torch.equal(state["movement"][name], before["movement"][name]) for name in SHAPES)
    assert state["history"] == before["history"]


def test_other_states_are_refused() -> None:
    made = with_masks()
    scheduler = MaskScheduler(made, 0.5, end=4, every=1)
    for _ in range(3):
        scheduler.step()
    state = scheduler.state_dict()
    with pytest.raises(InputError, match=r"another schedule: sparsity was 0\.5, is 0\.6"):
        MaskScheduler(made, 0.6, end=4, every=1).load_state_dict(state)
    with pytest.raises(InputError, match=r"numbers of weight w were masked .* 0 are now; load the module's"):
        MaskScheduler(with_masks(), 0.5, end=4, every=1).load_state_dict(state)
    with pytest.raises(InputError, match="another model: it has masks of other weights"):
        MaskScheduler(single()[0], 0.5, end=4, every=1).load_state_dict(state)
    for wrong in ({}, None, made.module.state_dict()):
        with pytest.raises(InputError, match="no state of a MaskScheduler"):
            scheduler.load_state_dict(wrong)  # type: ignore[arg-type]
    wide = {**state, "movement": {"w": torch.zeros(2, 2)}}
    with pytest.raises(InputError, match="weight w has another shape there"):
        scheduler.load_state_dict(wide)
