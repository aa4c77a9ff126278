"""What graphs under torch.compile(backend="fxpress") change, and weights that change beneath them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import dynamo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpress

EAGER = {"backend": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with dynamo.fresh():
        yield


def x(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes or (3, 8), generator=torch.Generator().manual_seed(seed + sum(sizes)))


class Cache(nn.Module):
    """A key and value cache that each call writes a place of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 8)
        self.register_buffer("keys", torch.zeros(2, 6, 8))

    def forward(self, v: Tensor, place: Tensor) -> Tensor:
        self.keys.index_copy_(1, place, self.project(v))
        return F.scaled_dot_product_attention(v, self.keys, self.keys)


class Counter(nn.Module):
    """A buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.up(v) * self.count


class Assigned(nn.Module):
    """A buffer that each call replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, v: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * v.mean(0)
        return v - self.mean


class Noted(nn.Module):
    """It sets an attribute before it reads its parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 4)
        self.seen = 0

    def forward(self, v: Tensor) -> Tensor:
        self.seen = len(v)
        return self.up(v).relu()


def scaled_in_place(v: Tensor) -> Tensor:
    v.mul_(2)
    return v + 1


def slice_written(v: Tensor) -> Tensor:
    v[:, 2:4] = v[:, :2] * 3
    return v.sum(1)


def view_written(v: Tensor) -> Tensor:
    w = v.view(-1)
    w[3:7].add_(1)
    return v * 2


def transposed_written(v: Tensor) -> Tensor:
    v.t()[0].zero_()
    return v.permute(1, 0) * 2


def masked_written(v: Tensor) -> Tensor:
    v.masked_fill_(v > 0, 1.5)
    return v.exp()


def written_and_given(v: Tensor) -> Any:
    v.add_(1)
    return v, v[0], v * 2


def scattered(v: Tensor) -> Tensor:
    v.scatter_(1, torch.tensor([[0, 1], [1, 0], [2, 3]]), 7.0)
    return v + 0.5


def own_memory_written(v: Tensor) -> Tensor:
    w = torch.zeros_like(v)
    w[1] = v[0]
    w[:, 3] += 2
    return w * v


def unsqueezed_written(v: Tensor) -> Tensor:
    v.unsqueeze(0)[:, 1].mul_(3)
    return v - 1


def two_written(v: Tensor, w: Tensor) -> Tensor:
    v.add_(w)
    w.copy_(v)
    return v * w


def indexed_written(v: Tensor) -> Tensor:
    v[torch.tensor([0, 2])] = 1.0
    return v * 2


FUNCTIONS = {
    function.__name__: function
    for function in (
        scaled_in_place, slice_written, view_written, transposed_written, masked_written, written_and_given, scattered,
        own_memory_written, unsqueezed_written, indexed_written,
    )
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_changed_input(function: Callable[..., Any]) -> None:
    (report,) = dynamo.assert_equal(function, (x(),), (x(seed=1),))
    assert report.runner == "eager", report


def test_two_changed_inputs() -> None:
    (report,) = dynamo.assert_equal(two_written, (x(), x(seed=1)))
    assert report.runner == "eager"


def one_written(v: Tensor, w: Tensor) -> Tensor:
    v.mul_(2)
    return v + w


def test_changed_input_that_shares_memory_with_another_is_left() -> None:
    compiled = torch.compile(one_written, backend="fxpress", options=EAGER)
    usual, ours = x(4, 8), x(4, 8)
    expected, found = one_written(usual[:2], usual[1:3]), compiled(ours[:2], ours[1:3])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, usual)
    assert "shares memory" in fxpress.reports()[0].reason


def test_memory_shared_only_later_is_noticed() -> None:
    compiled = torch.compile(one_written, backend="fxpress", options=EAGER)
    compiled(x(2, 8), x(2, 8, seed=1))
    usual, ours = x(4, 8), x(4, 8)
    expected, found = one_written(usual[:2], usual[1:3]), compiled(ours[:2], ours[1:3])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, usual)
    assert any("shared memory" in note for report in fxpress.reports() for note in report.notes)


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (Cache, [(x(2, 1, 8), torch.tensor([0])), (x(2, 1, 8), torch.tensor([3]))]),
        (Counter, [(x(),), (x(),), (x(),)]),
        (Assigned, [(x(),), (x(),)]),
    ],
    ids=["cache", "counter", "assigned"],
)
def test_changed_buffer(model: type[nn.Module], calls: list[Any]) -> None:
    torch.manual_seed(0)
    reports = dynamo.assert_equal(model().eval(), *calls)
    assert all(report.runner == "eager" for report in reports)


def test_a_part_sets_an_attribute_before_it_reads_its_own_parts() -> None:
    (report,) = dynamo.assert_equal(nn.Sequential(Noted()).eval(), (x(),))
    assert report.runner == "eager", report


def test_weights_found_by_a_name_that_every_module_has() -> None:
    parts = {"type": layers()}
    compiled = torch.compile(lambda v: parts["type"](v), backend="fxpress", options=EAGER)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x()), parts["type"](x()))
    assert fxpress.reports()[0].runner == "eager", fxpress.reports()


def test_cache_in_onnx_runtime() -> None:
    calls = [(x(2, 1, 8), torch.tensor([place])) for place in (0, 1, 2)]
    (report,) = dynamo.assert_equal(Cache().eval(), *calls, options={"backend": "onnx"})
    assert report.runner == "onnx", report
    assert report.weight_changes == 0


def test_batch_norm_in_training_mode_is_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    (report,) = dynamo.assert_equal(model, (x(),), (x(seed=1),))
    assert "running statistics" in report.reason


# what dynamo imports for optimizers
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_step_of_an_optimizer() -> None:
    """Its graph keeps the parameters as attributes, and changes them."""
    models = [layers(), layers()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    steps = [torch.compile(optimizers[0].step, backend="fxpress", options=EAGER), optimizers[1].step]
    for _ in range(4):
        for model, step in zip(models, steps, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            step()
        for ours, usual in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours, usual)
    reports = fxpress.reports()
    assert reports
    assert all(report.runner == "eager" for report in reports), str(reports)


def several_changed(v: Tensor, w: Tensor) -> Tensor:
    torch._foreach_add_([v, w], 1.0)
    return v + w


def written_out(v: Tensor, w: Tensor) -> Tensor:
    torch.add(v, 1, out=w)
    return w * 2


@pytest.mark.parametrize("function", [several_changed, written_out])
def test_changes_that_no_program_has_are_left(function: Callable[..., Any]) -> None:
    (report,) = dynamo.assert_equal(function, (x(), x(seed=1)))
    assert report.reason


# --- weights that change ---------------------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()


def assigned(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.ones(16, 8))


def loaded(model: Any) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def loaded_by_assignment(model: Any) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


def stepped(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def in_place(model: Any) -> None:
    model[2].bias.add_(1)


def through_data(model: Any) -> None:
    model[0].weight.data.mul_(2)


def other_data(model: Any) -> None:
    model[0].weight.data = torch.ones(16, 8)


CHANGES = {
    change.__name__: change
    for change in (assigned, loaded, loaded_by_assignment, stepped, in_place, through_data, other_data)
}


@pytest.mark.parametrize(
    ("change", "backend"),
    [*((change, "eager") for change in CHANGES.values()), (loaded, "onnx"), (through_data, "onnx")],
)
@torch.no_grad()
def test_changed_weight_is_never_stale(change: Callable[[Any], None], backend: str) -> None:
    model, given = layers(), x()
    compiled = torch.compile(model, backend="fxpress", options={"backend": backend})
    torch.testing.assert_close(compiled(given), model(given))
    before = model(given)
    change(model)
    assert not torch.allclose(before, model(given))
    for _ in range(3):
        torch.testing.assert_close(compiled(given), model(given))
    report = fxpress.reports()[-1]
    if change not in (assigned, loaded_by_assignment) or len(fxpress.reports()) == 1:
        assert report.weight_changes == 1
        assert "remade" in " ".join(report.notes)
    assert report.runner == backend


class Kept(nn.Module):
    """Its graph, traced without dynamo, keeps weights and modules as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, v: Tensor) -> tuple[Tensor]:
        return (self.layers(v) * self.scale,)


@pytest.mark.parametrize("backend", ["eager", "onnx"])
@torch.no_grad()
def test_weights_kept_as_attributes(backend: str) -> None:
    from fxpress.compiler.dynamo.backend import fxpress as compiler

    graph = torch.fx.symbolic_trace(Kept().eval())
    compiled = compiler(graph, [x()], options={"backend": backend})
    for _ in range(2):
        torch.testing.assert_close(compiled(x()), graph(x()))
        graph.scale.mul_(2)
        for _ in range(3):
            torch.testing.assert_close(compiled(x()), graph(x()))
    (report,) = fxpress.reports()
    assert (report.runner, report.weights, report.weight_changes) == (backend, 5, 2)
    assert "mlp" in report.rewrites


@torch.no_grad()
def test_lossy_graph_is_remade_at_once() -> None:
    model, given = layers(), x()
    options = {"backend": "eager", "passes": "mask_weights(0.5), fuse"}
    compiled = torch.compile(model, backend="fxpress", options=options)
    compiled(given)
    loaded(model)
    again = torch.compile(copy.deepcopy(model), backend="fxpress", options=options)
    torch.testing.assert_close(compiled(given), again(given))


@torch.no_grad()
def test_model_trained_between_its_calls_is_remade_less_and_less() -> None:
    model, given = layers(), x()
    compiled = torch.compile(model, backend="fxpress", options=EAGER)
    compiled(given)
    for _ in range(6):
        in_place(model)
        for _ in range(2):
            torch.testing.assert_close(compiled(given), model(given))
    assert fxpress.reports()[0].weight_changes == 6


@torch.no_grad()
def test_weights_made_in_inference_mode_are_left() -> None:
    with torch.inference_mode():
        model = layers()
        compiled = torch.compile(model, backend="fxpress", options=EAGER)
        torch.testing.assert_close(compiled(x()), model(x()))
    assert "inference_mode" in fxpress.reports()[0].reason


def test_the_compiled_graph_keeps_no_weight_alive() -> None:
    import gc
    import weakref

    model = layers()
    compiled: Any = torch.compile(model, backend="fxpress", options=EAGER)
    with torch.no_grad():
        compiled(x())
    seen = weakref.ref(model[0].weight)
    del model, compiled
    gc.collect()
    assert seen() is None
