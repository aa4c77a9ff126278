"""The choice between lowerings: by measured time, remembered on disk, and right whatever the disk holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.memory import Memory
from fxpress.backends.onnx import choose as module
from fxpress.backends.onnx.choose import Choice, Runtime, choose
from fxpress.backends.onnx.lowerings.lowering import STANDARD_OPSET
from fxpress.backends.onnx.lowerings.table import LOWERINGS, standard
from fxpress.backends.onnx.session import Session
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.linear import gated_linear
from fxpress.ir.ops.norm import add_rms_norm, rms_norm

NAMES = ["Attention", "MultiHeadAttention", "MatMul+Softmax"]  # for both kinds of `Two`


class Two(nn.Module):
    """Two attentions of one kind, one of another, and an operator with a single lowering."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = attention(attention(x, x, x, right=2), x, x, right=2)
        return rms_norm(attention(x, x, x, right=1), self.weight, 1e-6)


@pytest.fixture(scope="module")
def program() -> Program:
    model = Two().eval()
    batch_and_length = {"x": {0: Dim.AUTO, 2: Dim.AUTO}}
    return trace(model, bind_example(model, (torch.rand(2, 4, 6, 8),)), batch_and_length)


@pytest.fixture(scope="module")
def measured(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a first run remembers."""
    folder = tmp_path_factory.mktemp("memory")
    choose(program, memory=Memory("onnx", folder))
    found: dict[str, Any] = json.loads((folder / "onnx.json").read_text())
    return found


def remembered(folder: Path, measured: dict[str, Any], times: list[float]) -> Memory:
    """A memory in which every kind took these times."""
    memory = Memory("onnx", folder)
    memory.write({key: dict(zip(NAMES, times, strict=True)) for key in measured})
    return memory


def attentions(choices: list[Choice]) -> list[Choice]:
    return [item for item in choices if item.operator == "fxpress.attention"]


@pytest.fixture
def not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "_measure", fail)


def test_every_candidate_is_timed_once_a_kind(measured: dict[str, Any]) -> None:
    assert [sorted(times) for times in measured.values()] == [sorted(NAMES)] * 2
    assert all(ms > 0 for times in measured.values() for ms in times.values())


def test_what_a_time_depends_on_is_in_its_key(measured: dict[str, Any]) -> None:
    banded = [key for key in measured if "right=1" in key]
    assert len(banded) == 1 and "float32[2x4x6x8]" in banded[0] and "onnxruntime" in banded[0]


@pytest.mark.usefixtures("not_measured")
@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([1.0, 0.5, 2.0], NAMES[1]),
        ([1.0, 2.0, 0.5], NAMES[2]),
        ([0.5, 1.0, 2.0], NAMES[0]),
        ([1.0, 0.99, 0.98], NAMES[0]),  # within the noise: the first of the table
    ],
)
def test_the_fastest_is_chosen(
    program: Program, measured: dict[str, Any], tmp_path: Path, times: list[float], expected: str
) -> None:
    chosen, choices = choose(program, memory=remembered(tmp_path, measured, times))
    assert {item.chosen for item in attentions(choices)} == {expected}
    assert {chosen[node].name for node in program.calls(attention)} == {expected}


@pytest.mark.usefixtures("not_measured")
def test_every_node_has_a_lowering(program: Program, measured: dict[str, Any], tmp_path: Path) -> None:
    chosen, choices = choose(program, memory=remembered(tmp_path, measured, [1.0, 2.0, 3.0]))
    assert set(chosen) == set(program.calls(*LOWERINGS))
    assert [item.nodes for item in attentions(choices)] == [2, 1]


@pytest.mark.usefixtures("not_measured")
def test_one_candidate_is_not_measured(program: Program, measured: dict[str, Any], tmp_path: Path) -> None:
    _, choices = choose(program, memory=remembered(tmp_path, measured, [1.0, 2.0, 3.0]))
    (norm,) = [item for item in choices if item.operator == "fxpress.rms_norm"]
    assert norm.chosen == "RMSNormalization" and norm.milliseconds == {}


def test_a_second_run_measures_nothing(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose(program, memory=Memory("onnx", tmp_path))[1]
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured again"))
    assert choose(program, memory=Memory("onnx", tmp_path))[1] == first


def test_another_number_of_threads_is_measured(
    program: Program, measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(program: Program, nodes: Any, threads: int | None, runtime: Any) -> list[dict[str, float]]:
        asked.append((len(nodes), threads))
        return [dict.fromkeys(NAMES, 1.0) for _ in nodes]

    monkeypatch.setattr(module, "_measure", measure)
    choose(program, threads=1, memory=remembered(tmp_path, measured, [1.0, 1.0, 1.0]))
    assert asked == [(2, 1)]


class Slowest:
    """A session of another runtime, which takes longest over the first candidate."""

    def __init__(self, path: Path, threads: int | None) -> None:
        self._session = Session(path, threads)
        self.inputs = self._session.inputs
        self.passes = 9 if path.stem.startswith("probe_0_0") else 1

    def run(self, arrays: Any) -> None:
        for _ in range(self.passes):
            self._session.run(arrays)


def test_another_runtime_has_its_own_candidates_and_times(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Parameter(torch.rand(32, 16)), nn.Parameter(torch.rand(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            return gated_linear(x, self.gate, self.up, None, None, "silu")

    model = Gated().eval()
    program = trace(model, bind_example(model, (torch.rand(64, 16),)))
    runtime = Runtime("another 1.0", lambda node: (standard(node)[0][:2], []), Slowest, STANDARD_OPSET)
    chosen, (choice,) = choose(program, threads=1, memory=Memory("onnx", tmp_path), runtime=runtime)
    assert list(choice.milliseconds) == ["two MatMuls", "MatMul+Split"]
    assert choice.chosen == "MatMul+Split" and [item.name for item in chosen.values()] == ["MatMul+Split"]
    (key,) = Memory("onnx", tmp_path).read()
    assert "another 1.0" in key and "onnxruntime" not in key


def test_a_damaged_memory_is_a_warning_and_a_new_measurement(program: Program, tmp_path: Path) -> None:
    (tmp_path / "onnx.json").write_text('{"fxpress.attention(')
    with pytest.warns(RuntimeWarning, match="measurements are not remembered"):
        chosen, _ = choose(program, memory=Memory("onnx", tmp_path))
    assert set(chosen) == set(program.calls(*LOWERINGS))
    assert len(Memory("onnx", tmp_path).read()) == 2


def test_a_folder_that_cannot_be_written_is_a_warning(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="measurements are not remembered"):
        chosen, _ = choose(program, memory=Memory("onnx", tmp_path / "file" / "cache"))
    assert set(chosen) == set(program.calls(*LOWERINGS))


def test_operators_of_several_results_are_measured(tmp_path: Path) -> None:
    class Norm(Two):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return add_rms_norm(x, y, self.weight, 1e-6)

    model = Norm().eval()
    program = trace(model, bind_example(model, (torch.rand(2, 6, 8), torch.rand(2, 6, 8))))
    (choice,) = choose(program, memory=Memory("onnx", tmp_path))[1]
    assert len(choice.milliseconds) == 2


@pytest.mark.parametrize("entry", [3, None, [], {}, {NAMES[0]: "fast"}, {NAMES[0]: 0.0}], ids=repr)
def test_an_entry_that_is_no_measurement_is_measured_again(
    program: Program, measured: dict[str, Any], tmp_path: Path, entry: Any
) -> None:
    memory = Memory("onnx", tmp_path)
    memory.write(dict.fromkeys(measured, entry))
    _, choices = choose(program, memory=memory)
    assert all(time > 0 for item in attentions(choices) for time in item.milliseconds.values())


def test_a_band_of_symbolic_width_is_measured(tmp_path: Path) -> None:
    class Cross(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return attention(x, y, y, right=y.shape[2] - x.shape[2])

    model = Cross().eval()
    example = (torch.rand(2, 4, 6, 8), torch.rand(2, 4, 9, 8))
    traced = trace(model, bind_example(model, example), {"x": {2: Dim.AUTO}, "y": {2: Dim.AUTO}})
    _, (choice,) = choose(traced, memory=Memory("onnx", tmp_path))
    assert sorted(choice.milliseconds) == sorted(NAMES)
    (key,) = json.loads((tmp_path / "onnx.json").read_text())
    assert "right=size 3" in key
