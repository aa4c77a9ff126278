"""How torch.compile finds fxpress, what it may be told, who runs what it does not take, and what is reported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import dynamo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpress
from fxpress.compiler.dynamo.options import read_options
from fxpress.ir.errors import InputError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with dynamo.fresh():
        yield


def x(*sizes: int) -> Tensor:
    return torch.randn(sizes or (3, 8), generator=torch.Generator().manual_seed(sum(sizes)))


def layers(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).eval()


def test_it_is_found_without_an_import() -> None:
    code = """
import sys, torch
assert "fxpress" in torch._dynamo.list_backends()
assert "fxpress" not in sys.modules
model = torch.nn.Linear(4, 4)
with torch.no_grad():
    torch.compile(model, backend="fxpress")(torch.ones(2, 4))
import fxpress
(report,) = fxpress.reports()
print(report.runner, report.reason)
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("pytorch it is small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pases": "fuse"}, "did you mean 'passes'?"),
        ({"backend": "onx"}, "did you mean 'onnx'?"),
        ({"fallback": "egaer"}, "did you mean 'eager'?"),
        ({"passes": "fuze"}, "did you mean 'fuse'?"),
        ({"dtype": "float61"}, "did you mean 'float16'?"),
        ({"dtype": "bfloat16", "backend": "onnx"}, "kernels are of float32"),
        ({"passes": "quantize(int8, mode=static)"}, "calibration"),
        ({"calibration": [(x(),)]}, "dicts of inputs by the names"),
        ({"calibration": 5}, "dicts of inputs by the names"),
        ("fuse", "must be a dict"),
    ],
    ids=[
        "option",
        "backend",
        "fallback",
        "pass",
        "dtype",
        "dtype of onnx",
        "no data",
        "data",
        "a number",
        "no options",
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?").replace("(", r"\(")):
        read_options(options)


def test_a_wrong_option_reaches_the_user() -> None:
    compiled = torch.compile(layers(), backend="fxpress", options={"fallbak": "eager"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'fallback'"), torch.no_grad():
        compiled(x())


def test_default_options() -> None:
    options = read_options(None)
    assert [item.pass_name() for item in options.passes] == ["canonicalize", "fuse"]
    assert (options.backend, options.fallback) == ("auto", "eager")


def test_fallback_error_says_why() -> None:
    compiled = torch.compile(lambda v: v * 2, backend="fxpress", options={"fallback": "error"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="has complex numbers"):
        compiled(x().to(torch.complex64))


def test_fallback_error_is_no_error_for_a_small_graph() -> None:
    compiled = torch.compile(layers(), backend="fxpress", options={"fallback": "error"})
    with torch.no_grad():
        compiled(x())
    (report,) = fxpress.reports()
    assert report.reason.startswith("it is small: ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what Inductor imports
@pytest.mark.parametrize("train", [False, True])
def test_fallback_inductor(train: bool) -> None:
    reports = dynamo.assert_equal(
        layers(), (x(),), (x(5, 8),), options={"backend": "auto", "fallback": "inductor"}, train=train
    )
    assert all(report.runner == "inductor" and report.reason for report in reports)


def test_a_mode_is_said_to_be_unused() -> None:
    compiled = torch.compile(layers(), backend="fxpress", mode="reduce-overhead")
    with torch.no_grad():
        compiled(x())
    assert "reduce-overhead" in fxpress.reports()[0].notes[0]


def test_report_says_where_a_graph_came_from_and_what_was_rewritten() -> None:
    def function(v: Tensor) -> Tensor:
        return F.gelu(model(v))

    model = layers()
    compiled = torch.compile(function, backend="fxpress", options={"backend": "eager"})
    with torch.no_grad():
        for size in (2, 3, 4):
            compiled(x(size, 8))
    first, second = fxpress.reports()
    assert first.source.startswith("test_options.py:") and "return F.gelu(model(v))" in first.source
    assert (first.graph, second.graph) == ("0/0", "0/1")
    assert first.rewrites == second.rewrites == {"linear_gelu": 2}
    assert first.recompiled == ""
    assert "size mismatch at index 0. expected 2, actual 3" in second.recompiled
    assert (first.calls, second.calls) == (1, 2)
    assert first.sqnr_db is not None and first.sqnr_db > 100
    assert first.weights == 4
    assert first.inputs == ["v: f32[2, 8]"]
    text = str(fxpress.reports())
    assert "compiled again" in text
    assert "linear_gelu" in text
    assert str(first).count("0/0") == 1
    assert fxpress.reports().as_dicts()[1]["runner"] == "eager"
    fxpress.reports(clear=True)
    assert fxpress.reports() == []


def test_calibration_by_the_names_of_arguments() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()

        def forward(self, v: Tensor) -> Tensor:
            return self.layers(v)  # type: ignore[no-any-return]

    model = Model().eval()
    options = {"passes": "quantize(int8, mode=static)", "backend": "eager"}
    compiled = torch.compile(model, backend="fxpress", options={**options, "calibration": [{"v": x()}]})
    same = fxpress.compile(model, options["passes"], (x(),), backend="eager", calibration=[(x(),)], dynamic_shapes=None)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x()), same(x()), rtol=0, atol=0)
        torch._dynamo.reset()
        other = torch.compile(model, backend="fxpress", options={**options, "calibration": [{"w": x()}]})
        torch.testing.assert_close(other(x()), model(x()))
    assert "the calibration data has no 'v'" in fxpress.reports()[-1].reason


class Counted(nn.Module):
    """A linear layer beside a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.up(v) + self.calls


def test_calibration_data_need_not_have_what_the_model_keeps() -> None:
    options = {"backend": "eager", "passes": "quantize(int8, mode=static)", "calibration": [{"v": x()}]}
    compiled = torch.compile(Counted().eval(), backend="fxpress", options=options)
    with torch.no_grad():
        compiled(x())
    (report,) = fxpress.reports()
    assert report.runner == "eager", report.reason


@pytest.mark.parametrize("passes", ["quantize(int8), fuse", "mask_weights(0.5), fuse"])
def test_lossy_passes_lose_what_they_lose_through_compile(passes: str) -> None:
    model = layers(32)
    compiled = torch.compile(model, backend="fxpress", options={"passes": passes})
    same = fxpress.compile(model, passes, (x(4, 32),), backend="onnx", dynamic_shapes=None)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x(4, 32)), same(x(4, 32)), rtol=0, atol=0)
    (report,) = fxpress.reports()
    assert report.runner == "onnx"
    assert report.sqnr_db == pytest.approx(same.report.sqnr_db, abs=0.5)


def test_lossy_graph_that_onnx_runtime_cannot_take_runs_in_pytorch() -> None:
    model = layers().bfloat16()
    compiled = torch.compile(model, backend="fxpress", options={"passes": "mask_weights(0.5), fuse"})
    with torch.no_grad():
        compiled(x().bfloat16())
    (report,) = fxpress.reports()
    assert report.runner == "eager"
    assert "bfloat16" in report.reason


def test_onnx_is_taken_where_it_is_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(256)
    for times, runner in (([1.0, 2.0], "onnx"), ([2.0, 1.0], "pytorch")):
        torch._dynamo.reset()
        fxpress.reports(clear=True)
        monkeypatch.setattr("fxpress.compiler.dynamo.make.best_milliseconds", lambda calls, times=times: times)
        compiled = torch.compile(model, backend="fxpress")
        with torch.no_grad():
            compiled(x(64 + len(runner), 256))
        (report,) = fxpress.reports()
        assert report.runner == runner, report
        assert report.milliseconds == dict(zip(("onnx", "pytorch"), times, strict=True))


def test_triton_backend() -> None:
    """In Triton's interpreter, or on a GPU."""
    pytest.importorskip("triton")
    reports = dynamo.assert_equal(layers(), (x(),), (x(4, 8),), (x(5, 8),), options={"backend": "triton"})
    assert [report.runner for report in reports] == ["triton", "triton"], str(reports)


def test_a_failure_of_ours_is_said_and_pytorch_runs_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("fxpress.compiler.dynamo.make.make_program", fail)
    compiled = torch.compile(layers(), backend="fxpress", options={"backend": "eager"})
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="planted"):
        torch.testing.assert_close(compiled(x()), layers()(x()))
    assert "fxpress failed on it (KeyError" in fxpress.reports()[0].reason


def test_a_wrong_rewrite_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fxpress.compiler.dynamo.make.in_pytorch", lambda program, runner: lambda tensors: [tensors[0] * 0 + 1]
    )
    compiled = torch.compile(layers(), backend="fxpress", options={"backend": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x()), layers()(x()))
    assert "the result is not that of the graph" in fxpress.reports()[0].reason
