"""The option dtype: what runs in half precision, judged by torch.autocast, and what stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import build
import dynamo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpress
from fxpress.compiler.dynamo.program import cast_weights
from fxpress.ir.equality import sqnr_db

HALVES = ("bfloat16", "float16")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with dynamo.fresh():
        yield


class Block(nn.Module):
    """Attention with a mask in fp32, norms, a feed-forward block, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.LayerNorm(32), nn.RMSNorm(32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.where(padding, 0.0, torch.finfo(torch.float32).min)[:, None, None]
        query, key, value = self.project(self.first(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return x + self.mix(x.mT).mT


def example(length: int = 7) -> tuple[Tensor, Tensor]:
    return build.normal(2, length, 32), torch.arange(length)[None] < torch.tensor([[length], [length - 2]])


def compiled(model: Any, dtype: Any, backend: str = "eager", **options: Any) -> Any:
    given = {"dtype": dtype, "backend": backend, "fallback": "error", **options}
    return torch.compile(model, backend="fxpress", options=given)


@pytest.mark.parametrize("dtype", HALVES)
def test_result_is_as_near_as_that_of_autocast(dtype: str) -> None:
    model, inputs = Block().eval(), example()
    with torch.no_grad():
        truth = model(*inputs)
        with torch.autocast("cpu", getattr(torch, dtype)):
            usual = model(*inputs)
        found = compiled(model, dtype)(*inputs)
    assert found.dtype == torch.float32
    assert not torch.equal(found, truth)
    assert sqnr_db(found, truth) > sqnr_db(usual, truth) - 3


def test_report_says_what_it_lost() -> None:
    with torch.no_grad():
        compiled(Block().eval(), torch.bfloat16)(*example())
    (report,) = fxpress.reports()
    assert report.precision["dtype"] == "bfloat16"
    assert 35 < report.precision["sqnr_db"] < 60
    assert "bfloat16: " in str(report)


def test_rewrites_apply_as_in_full_precision() -> None:
    with torch.no_grad():
        compiled(Block().eval(), "bfloat16")(*example())
    (report,) = fxpress.reports()
    assert {"attention": 1, "linear_gelu": 1}.items() <= report.rewrites.items()


def test_other_lengths_need_one_more_compilation() -> None:
    model = Block().eval()
    run = compiled(model, "bfloat16")
    with torch.no_grad():
        for length in (7, 5, 9, 12):
            assert sqnr_db(run(*example(length)), model(*example(length))) > 35
    assert len(fxpress.reports()) == 2


class Cached(nn.Module):
    """Writes what it projects into a buffer in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        self.cache.index_copy_(0, place, self.project(x))
        return torch.cat([self.cache, self.project(x)]).cumsum(0)


def test_buffers_and_outputs_keep_their_dtype() -> None:
    model, x = Cached().eval(), build.normal(2, 8)
    with torch.no_grad():
        found = compiled(model, "bfloat16")(x, torch.tensor([1, 3]))
        expected = model.project(x)
    assert (found.dtype, model.cache.dtype) == (torch.float32, torch.float32)
    assert sqnr_db(model.cache[[1, 3]], expected) > 35


def test_slower_than_pytorch_stays_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.compiler.dynamo.make.best_milliseconds", lambda calls: [2.0, 1.0])
    model, inputs = Block().eval(), example()
    with torch.no_grad():
        found = compiled(model, "bfloat16", "auto")(*inputs)
        assert torch.equal(found, model(*inputs))
    (report,) = fxpress.reports()
    assert (report.runner, report.reason) == ("pytorch", "PyTorch was measured to be faster")


@pytest.mark.parametrize(("train", "message"), [(True, "torch.autocast, not with dtype"), (False, "autocast is on")])
def test_what_chooses_dtypes_itself_is_left_alone(train: bool, message: str) -> None:
    model, inputs = Block().train(train), example()
    run = compiled(model, "bfloat16", fallback="eager")
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=not train):
        assert torch.equal(run(*inputs), model(*inputs))
    (report,) = fxpress.reports()
    assert report.runner == "pytorch" and message in report.reason


def test_casts_of_weights_are_made_once() -> None:
    """A weight that is read in one dtype keeps its name; one that is read in two is stored twice."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        half = torch.bfloat16
        once = F.linear(x.to(half), m.once.to(half), m.bias.to(half)) + m.bias.to(half)
        return F.linear(once.float(), m.both) + F.linear(x.to(half), m.both.to(half)).float()

    weights = {"once": build.normal(6, 6), "both": build.normal(6, 6, seed=1), "bias": build.normal(6, seed=2)}
    traced = build.program(forward, build.normal(3, 6), **weights)
    before = traced.run(build.inputs(traced))
    cast_weights(traced)
    assert all(torch.equal(a, b) for a, b in zip(traced.run(build.inputs(traced)), before, strict=True))
    stored = {name: value.dtype for name, value in traced.module.state_dict().items()}
    half = torch.bfloat16
    assert stored == {"once": half, "bias": half, "both": torch.float32, "both_bfloat16": half}
    read = [user.target for node in traced.graph.nodes if node.op == "get_attr" for user in node.users]
    assert not {torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype} & {*read}


def test_the_trace_is_judged_in_the_dtype_that_was_asked_for() -> None:
    """What is left of a difference of halves is far from that in fp32, and yet what was asked for."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) - 0.999 * self.first(x))

    with torch.no_grad():
        compiled(Difference().eval(), "bfloat16")(build.normal(4, 32))
    (report,) = fxpress.reports()
    assert report.runner == "eager" and report.precision["sqnr_db"] < 20
