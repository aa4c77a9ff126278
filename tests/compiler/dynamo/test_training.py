"""Training under torch.compile(backend="fxpress"): gradients, dropout, checkpoints, autocast, gradient modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import dynamo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxpress
from fxpress.ir.equality import compare

EAGER = {"backend": "eager"}
pytestmark = [
    # dynamo looks at .grad of everything that a resumed function takes
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # dynamo makes an object of a torch.autograd.Function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with dynamo.fresh():
        yield


def x(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes or (3, 8), generator=torch.Generator().manual_seed(seed + sum(sizes)))


class Block(nn.Module):
    """A feed-forward block around which the tests build."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.drop = nn.Dropout(drop)

    def forward(self, v: Tensor) -> Tensor:
        return self.norm(v + self.drop(self.down(F.gelu(self.up(v)))))


class Around(nn.Module):
    """A block and a function of it."""

    def __init__(self, function: Callable[..., Any], drop: float = 0.0, **parts: nn.Module) -> None:
        super().__init__()
        self.block, self.function = Block(drop), function
        torch.manual_seed(1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self.block, *args)


def attended(m: Any, v: Tensor) -> Tensor:
    q = v.unflatten(-1, (2, 4)).transpose(1, 2)
    return m(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))


def detached(m: Any, v: Tensor) -> Tensor:
    return m(v) + m.up(v).detach().sum()


def without_gradients(m: Any, v: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.up(v).mean()
    return m(v) * scale


def with_gradients(m: Any, v: Tensor) -> Tensor:
    with torch.enable_grad():
        return m(v) * 2


def broken(m: Any, v: Tensor) -> Tensor:
    v = m(v)
    torch._dynamo.graph_break()
    return m(v)


def recomputed(m: Any, v: Tensor) -> Tensor:
    return checkpoint(m, v, use_reentrant=False) * 2  # type: ignore[no-any-return]


def several(m: Any, v: Tensor) -> Any:
    return {"loss": m(v).sum(), "rest": (m.up(v), None)}


def in_place(m: Any, v: Tensor) -> Tensor:
    w = m.up(v)
    w.mul_(2)
    w[:, 0] = 1
    return w.relu_()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return gradient * 3 * v**2


def cubed(m: Any, v: Tensor) -> Tensor:
    return m(Cube.apply(v))  # type: ignore[no-untyped-call, no-any-return]


def twice_shared(m: Any, v: Tensor) -> Tensor:
    return m(m(v))


class Attention(nn.Module):
    """Projections that inference packs into one weight; training must not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, v: Tensor) -> Tensor:
        parts = (part(v).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


def partly_frozen() -> nn.Module:
    model = Around(lambda m, v: m(v))
    model.block.up.requires_grad_(False)
    return model


TRAINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "block": (lambda: Around(lambda m, v: m(v)), ""),
    "attention": (lambda: Around(attended), ""),
    "projections": (Attention, ""),
    "shared": (lambda: Around(twice_shared), ""),
    "frozen part": (partly_frozen, ""),
    "dropout": (lambda: Around(lambda m, v: m(m(v)), drop=0.5), ""),
    "several outputs": (lambda: Around(several), ""),
    "graph break": (lambda: Around(broken), ""),
    "changes in place": (lambda: Around(in_place), ""),
    "detached": (lambda: Around(detached), "detached"),
    "gradients off in a part": (lambda: Around(without_gradients), "switched off"),
    "gradients on in a part": (lambda: Around(with_gradients), ""),
    "checkpoint": (lambda: Around(recomputed), "higher-order operator"),
    "checkpoint with dropout": (lambda: Around(recomputed, drop=0.5), "higher-order operator"),
    "own function": (lambda: Around(cubed), "higher-order operator"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "running statistics"),
    "embedding bag": (lambda: Around(lambda m, v: m(v), table=nn.Embedding(4, 8)), ""),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1), ""),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), ""),
}  # fmt: skip


@pytest.mark.parametrize(("model", "reason"), TRAINED.values(), ids=TRAINED)
def test_rewritten_training(model: Callable[[], nn.Module], reason: str) -> None:
    given = x(4, 8) if model is TRAINED["batch norm"][0] else x(2, 3, 8)
    reports = dynamo.assert_equal(model().train(), (given.requires_grad_(),), (given,), train=True)
    reasons = [report.reason for report in reports if report.runner == "pytorch"]
    assert any(reason in found for found in reasons) if reason else not reasons, str(reports)


@pytest.mark.parametrize("name", ["block", "attention", "dropout", "graph break", "checkpoint", "batch norm"])
def test_training_is_left_to_pytorch_by_itself(name: str) -> None:
    given = x(4, 8) if name == "batch norm" else x(2, 3, 8)
    model = TRAINED[name][0]().train()
    reports = dynamo.assert_equal(model, (given.requires_grad_(),), train=True, options={"backend": "auto"})
    assert all("gradients" in report.reason for report in reports)


def test_a_parameter_that_is_given_is_an_input() -> None:
    """Another one at each call, as in functional code, is no weight that changes."""
    compiled = torch.compile(lambda p, v: F.gelu(v @ p) * 2, backend="fxpress", options=EAGER)
    for seed in range(3):
        parameter = nn.Parameter(x(8, 8, seed=seed))
        with torch.no_grad():
            torch.testing.assert_close(compiled(parameter, x()), F.gelu(x() @ parameter) * 2)
        compiled(parameter, x()).sum().backward()
        usual = nn.Parameter(x(8, 8, seed=seed))
        (F.gelu(x() @ usual) * 2).sum().backward()
        torch.testing.assert_close(parameter.grad, usual.grad)
    assert [report.weight_changes for report in fxpress.reports()] == [0, 0]
    assert all(report.runner == "eager" for report in fxpress.reports())


def test_packed_weights_stay_the_models_own() -> None:
    (report,) = dynamo.assert_equal(Attention(), (x(2, 3, 8),), train=True)
    assert report.rewrites["attention"] == 1
    (report,) = dynamo.assert_equal(Attention(), (x(2, 3, 8),))[1:]
    assert report.rewrites["pack_projections"] == 1


@pytest.mark.parametrize("backend", ["onnx", "triton"])
def test_only_pytorch_computes_gradients(backend: str) -> None:
    (report,) = dynamo.assert_equal(Block(), (x(2, 3, 8),), train=True, options={"backend": backend})
    assert report.runner == "pytorch" and "gradients" in report.reason


def test_training_at_several_sizes_compiles_twice() -> None:
    reports = dynamo.assert_equal(Block(), *((x(n, 3, 8),) for n in (2, 3, 5)), train=True)
    assert len(reports) == 2
    assert all(report.training and report.rewrites for report in reports)


def test_a_lossy_pass_trains_through_its_gradients() -> None:
    torch.manual_seed(0)
    model = Block()
    passes = "mask_weights(0.5, fold=False)"
    compiled = torch.compile(model, backend="fxpress", options={"passes": passes})
    (compiled(x()) * x(seed=2)).sum().backward()
    same = fxpress.compile(Block().eval(), passes, (x(),), backend="eager", verify=False).program
    (same(x()) * x(seed=2)).sum().backward()
    torch.testing.assert_close(model.up.weight.grad, same.module.get_parameter("up.weight").grad)
    (report,) = fxpress.reports()
    assert report.runner == "eager"
    assert report.training


def test_recomputation_is_respected() -> None:
    counted = 0

    def pre_hook(*_: Any) -> None:
        nonlocal counted
        counted += 1

    model = Around(recomputed)
    compiled = torch.compile(model, backend="fxpress")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(x(2, 3, 8)).sum()
    usual: list[Tensor] = []
    plain = torch.compile(Around(lambda m, v: m(v) * 2), backend="fxpress", options=EAGER)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: usual.append(t) or t, lambda t: t):
        plain(x(2, 3, 8)).sum()
    assert len(saved) < len(usual)


def test_dropout_draws_the_numbers_that_eager_draws() -> None:
    model = Block(drop=0.5).train()
    compiled = torch.compile(model, backend="fxpress", options=EAGER)
    for seed in (0, 1):
        torch.manual_seed(seed)
        usual = (model(x()), torch.rand(2))
        torch.manual_seed(seed)
        torch.testing.assert_close((compiled(x()), torch.rand(2)), usual)


def test_dropout_without_gradients_goes_to_no_onnx_runtime() -> None:
    model = Block(drop=0.5).train()
    for backend in ("auto", "onnx"):
        (report,) = dynamo.assert_equal(model, (x(),), options={"backend": backend})
        assert "random numbers" in report.reason
        torch._dynamo.reset()
        fxpress.reports(clear=True)
    (report,) = dynamo.assert_equal(model, (x(),))
    assert report.runner == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("where", ["around", "within", "off within"])
def test_autocast(where: str, train: bool, dtype: torch.dtype) -> None:
    model = Around(attended).train(train)
    exact = copy.deepcopy(model).double()
    given = x(2, 3, 8)

    def function(call: Callable[..., Tensor], v: Tensor) -> Tensor:
        if where == "around":
            return call(v)
        with torch.autocast("cpu", dtype=dtype, enabled=where == "within"):
            return call(v)

    compiled = torch.compile(function, backend="fxpress", options=EAGER)
    around = torch.autocast("cpu", dtype=dtype, enabled=where != "within")
    with torch.set_grad_enabled(train), around:
        found, usual = (call(model, given) for call in (compiled, function))
    with torch.no_grad():
        verdict = compare([found], [usual], [exact(given.double())])
    assert verdict.equal, verdict.reasons
    (report,) = fxpress.reports()
    assert ("autocast" in report.reason) == train
    assert report.runner == ("pytorch" if train else "eager")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes(mode: Any) -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend="fxpress", options=EAGER)
    with mode():
        found = compiled(x())
        torch.testing.assert_close(found, model(x()))
    assert not found.requires_grad
    assert found.is_inference() == (mode is torch.inference_mode)
    trained = compiled(x())
    assert trained.requires_grad
    assert [report.training for report in fxpress.reports()] == [False, True]


def test_a_few_steps_of_training_follow_eager() -> None:
    models = [Block(drop=0.1).train(), Block(drop=0.1).train()]
    losses = []
    for model, call in (
        (models[0], models[0]),
        (models[1], torch.compile(models[1], backend="fxpress", options=EAGER)),
    ):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(5):
            loss = call(x(4, 8, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Annealed(nn.Module):
    """Attention whose scores are divided by a temperature and masked; both are buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.Linear(8, 24)
        self.register_buffer("mask", torch.ones(3, 3).tril() > 0)
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, v: Tensor) -> Tensor:
        query, key, value = self.projections(v).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / self.temperature
        return scores.masked_fill(~self.mask, -1e9).softmax(-1) @ value


@pytest.mark.parametrize(("name", "later"), [("mask", torch.ones(3, 3).triu() > 0), ("temperature", torch.tensor(0.5))])
def test_buffers_may_change_between_steps(name: str, later: Tensor) -> None:
    """In inference a change has the graph compiled again; a graph that trains reads them anew."""
    model = Annealed()
    usual = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fxpress", options=EAGER)
    for _ in range(2):
        losses = [call(x(2, 3, 8)).square().mean() for call in (compiled, usual)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        for each in (model, usual):
            getattr(each, name).copy_(later)
    torch.testing.assert_close(model.projections.weight.grad, usual.projections.weight.grad)
    (report,) = fxpress.reports()
    assert report.runner == "eager"
