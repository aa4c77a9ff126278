"""Saved models of the triton backend: the same kernels again, and every fault found before use or compiled around."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from build import module, normal
from torch import Tensor, nn

import fxpress
from fxpress.backends.triton.machine_code import Code
from fxpress.backends.triton.runner import TritonRunner, triton_version
from fxpress.compiler.driver import Compiled
from fxpress.compiler.triton_files import read_code
from fxpress.ir.errors import ArtifactError, InputError

KEY = "0123abcd" * 8


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return fxpress.compile(tiny.bert(), example_inputs=tiny.text(), backend="triton")


@pytest.fixture(scope="module")
def saved(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With machine code that no GPU would run: how it is made is tested in tests/backends/triton."""
    folder = tmp_path_factory.mktemp("artifact") / "bert"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonRunner, "machine_code", lambda *_: {90: {KEY: Code('{"name": "kernel"}', b"\x7fELF")}})
        compiled.save(folder, archs=[90])
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "bert"))


def test_what_is_loaded_runs_the_same_kernels(compiled: Compiled, saved: Path) -> None:
    loaded = fxpress.load(saved)
    assert loaded.source == compiled.source
    for batch, length in ((2, 6), (3, 9), (1, 1)):
        given = tiny.text(batch, length)
        expected, found = compiled(**given), loaded(**given)
        assert type(found) is type(expected)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.pooler_output, expected.pooler_output)
    assert loaded.report.as_dict() == compiled.report.as_dict()


def test_arrays_are_taken_too(saved: Path) -> None:
    loaded, given = fxpress.load(saved), tiny.text()
    found = loaded(**{name: numpy.asarray(item) for name, item in given.items()})
    assert torch.equal(found.last_hidden_state, loaded(**given).last_hidden_state)


def test_inputs_are_checked(saved: Path) -> None:
    with pytest.raises(InputError, match="missing input 'attention_mask'"):
        fxpress.load(saved)(input_ids=tiny.text()["input_ids"])


def test_the_files_are_those_that_the_manifest_lists(saved: Path) -> None:
    names = {file.name for file in saved.iterdir()} - {"manifest.json"}
    assert names == json.loads((saved / "manifest.json").read_text())["files"].keys()
    assert names == {
        "model.safetensors", "program.json", "program.txt", "report.json",
        f"{KEY}.sm_90.cubin", f"{KEY}.sm_90.cubin.json",
    }  # fmt: skip


@pytest.mark.slow
def test_a_new_process_gives_the_same(compiled: Compiled, saved: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import tiny, fxpress\n"
        "print(fxpress.load(sys.argv[1])(**tiny.text()).last_hidden_state.double().sum().item())"
    )
    support = str(Path(__file__).parents[1] / "support")
    command = [sys.executable, "-P", "-c", code, str(saved), support]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == compiled(**tiny.text()).last_hidden_state.double().sum().item()
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "InputError: a model of the triton backend needs a GPU" in ran.stderr.splitlines()[-1]


# --- weights ----------------------------------------------------------------------------------------------------------


def again(model: nn.Module, folder: Path, *examples: Tensor, **options: Any) -> tuple[Compiled, Any]:
    compiled = fxpress.compile(model, example_inputs=examples, backend="triton", **options)
    compiled.save(folder)
    return compiled, fxpress.load(folder)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    weight = normal(5, 5)

    def function(self: Any, x: Tensor) -> Tensor:
        return (x @ self.first).relu() @ self.second

    x = normal(3, 5, seed=1)
    compiled, loaded = again(module(function, first=weight, second=weight), tmp_path / "tied", x)
    assert torch.equal(compiled(x), loaded(x))
    weights = loaded.runner.weights()
    assert len({id(item) for item in weights.values()}) == 1
    assert (tmp_path / "tied" / "model.safetensors").stat().st_size < 200 + weight.numel() * 4


@pytest.mark.parametrize(
    "weight",
    [normal(6, 4).t(), normal(4, 1).expand(4, 6), normal(9, 9)[2:6, 1:7], normal(4, 6)[:0], normal(24).view(4, 6)],
    ids=["transposed", "expanded", "a part", "empty", "contiguous"],
)
def test_strides_are_kept(weight: Tensor, tmp_path: Path) -> None:
    model = module(lambda self, x: x[: self.weight.shape[0]] * self.weight)
    model.register_buffer("weight", weight)
    x = normal(4, 6, seed=1)
    compiled, loaded = again(model, tmp_path / "strided", x)
    assert loaded.source == compiled.source
    assert torch.equal(compiled(x), loaded(x))


def test_floats_are_cast_as_before(tmp_path: Path) -> None:
    model = nn.Linear(8, 8).eval()
    x = normal(3, 8)
    compiled, loaded = again(model, tmp_path / "half", x, dtype="float16")
    assert loaded(x).dtype == torch.float16
    assert torch.equal(compiled(x), loaded(x))


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "program.json", "report.json", "program.txt"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "altered"])
def test_a_damaged_file_is_found(folder: Path, name: str, fault: str) -> None:
    file = folder / name
    data = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if fault == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name} is (missing|truncated or altered|altered)"):
        fxpress.load(folder)


def sign(folder: Path) -> None:
    """A manifest whose digests fit the files and itself: what someone writes who alters on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def alter(folder: Path, change: Callable[[Any], Any]) -> None:
    """Alter the program, with digests that fit."""
    data = json.loads((folder / "program.json").read_text())
    change(data)
    (folder / "program.json").write_text(json.dumps(data))
    sign(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["program"]["nodes"][-2].update(op="call_function", target="posix.system"), "calls"),
        (lambda data: data["weights"].popitem(), "reads a weight"),
        (lambda data: next(iter(data["weights"].values())).update(tensor="none"), "another form: KeyError"),
        (lambda data: next(iter(data["weights"].values())).update(shape=[1]), "its program says"),
        (lambda data: next(iter(data["weights"].values())).update(stride=[2**40, 1]), "has no such strides"),
        (lambda data: data.update(dtype="float7"), "another form: KeyError"),
        (lambda data: data.pop("program"), "another form: KeyError"),
    ],
)  # fmt: skip
def test_a_program_that_was_altered_on_purpose_is_refused(folder: Path, change: Any, match: str) -> None:
    alter(folder, change)
    with pytest.raises(ArtifactError, match=match):
        fxpress.load(folder)


def code_of(folder: Path, arch: int | None = 90) -> dict[str, Code]:
    """What a GPU would be given."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return read_code(folder, files, json.loads((folder / "program.json").read_text()), [], arch)


def test_machine_code_is_found_for_its_architecture(saved: Path) -> None:
    assert code_of(saved) == {KEY: Code('{"name": "kernel"}', b"\x7fELF")}


def test_without_a_gpu_machine_code_is_not_looked_at(folder: Path) -> None:
    (folder / f"{KEY}.sm_90.cubin").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_of(folder, None) == {}
        fxpress.load(folder)


def test_machine_code_of_no_use_is_one_warning(saved: Path, folder: Path) -> None:
    with pytest.warns(UserWarning, match="kernels are compiled when first used: it is for sm_90, this is sm_80"):
        assert code_of(saved, 80) == {}
    alter(folder, lambda data: data.update(triton="2.0"))
    with pytest.warns(UserWarning, match=f"it is of triton 2.0, this is {triton_version()}"):
        assert code_of(folder) == {}


def test_damaged_machine_code_is_one_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{KEY}.sm_90.cubin").write_bytes(b"\x7fELG")
    (folder / f"{KEY}.sm_90.cubin.json").unlink()
    monkeypatch.setattr("fxpress.compiler.triton_files.arch_here", lambda *_: 90)
    with pytest.warns(UserWarning, match="the machine code saved in .* is not used") as found:
        loaded = fxpress.load(folder)
    assert len(found) == 1
    assert loaded(**tiny.text()).last_hidden_state.shape == (2, 6, 16)


# --- options ----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing is known of the architecture 91 \(valid: 80, 86"):
        compiled.save(tmp_path / "new", archs=[91])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_before_kernels_are_compiled(compiled: Compiled, saved: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        compiled.save(saved, archs=[90])


def test_options_of_another_backend_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whose work is not the CPU's; give no threads"):
        fxpress.load(saved, threads=2)
    with pytest.raises(InputError, match="'nowhere' is no device"):
        fxpress.load(saved, device="nowhere")
    other = fxpress.compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="onnx", verify=False)
    with pytest.raises(InputError, match="archs and examples are for kernels of the triton backend, this is 'onnx'"):
        other.save(tmp_path / "onnx", archs=[90])
    other.save(tmp_path / "onnx")
    with pytest.raises(InputError, match="of the onnx backend, which runs on the CPU; give no device"):
        fxpress.load(tmp_path / "onnx", device="cuda")


def test_examples_are_of_the_programs_inputs(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing input"):
        compiled.save(tmp_path / "new", archs=[90], examples=[{"input_ids": tiny.text()["input_ids"]}])
