"""Saved models: the same results in a new process, no torch needed, and every fault found before use."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import tiny
import torch

from fxpress import compile, load
from fxpress.compiler.driver import Compiled
from fxpress.ir.errors import ArtifactError, InputError

FILES = ["manifest.json", "model.onnx", "model.safetensors", "program.txt", "report.json"]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile(tiny.bert(), example_inputs=tiny.text(), backend="onnx")


@pytest.fixture(scope="module")
def saved(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "bert"
    compiled.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "bert"))


def in_new_process(code: str, *arguments: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest whose digests fit the files and itself: what someone would do who alters on purpose."""
    for name, entry in manifest.get("files", {}).items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": digest}))


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- saving and loading ----------------------------------------------------------------------------------------


def test_the_files(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == FILES


def test_nothing_else_is_left_beside_it(saved: Path) -> None:
    assert [file.name for file in saved.parent.iterdir()] == ["bert"]


def test_no_file_is_a_pickle_or_an_archive(saved: Path) -> None:
    heads = [file.read_bytes()[:2] for file in saved.iterdir()]
    assert b"PK" not in heads and not any(head.startswith(b"\x80") for head in heads)


RUN = """
import sys, numpy, fxpress
given = dict(numpy.load(sys.argv[2]))
found = fxpress.load(sys.argv[1])(**given)
numpy.savez(sys.argv[3], **found)
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_new_process_gives_the_same_result_without_torch(compiled: Compiled, saved: Path, tmp_path: Path) -> None:
    given = tiny.text(3, 7)
    numpy.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in given.items()})
    printed = in_new_process(RUN, saved, tmp_path / "in.npz", tmp_path / "out.npz")
    found, expected = numpy.load(tmp_path / "out.npz"), compiled(**given)
    assert set(found) == set(expected)
    assert all(found[name].tobytes() == expected[name].numpy().tobytes() for name in found)
    assert printed.split() == ["False", "False"]


def test_torch_inputs_give_the_class_of_the_model(compiled: Compiled, saved: Path) -> None:
    given = tiny.text(3, 7)
    found, expected = load(saved)(**given), compiled(**given)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_numpy_inputs_give_named_outputs(saved: Path) -> None:
    found = load(saved)(**{name: value.numpy() for name, value in tiny.text().items()})
    assert found.last_hidden_state.shape == (2, 6, 16) and found.last_hidden_state is found["last_hidden_state"]
    with pytest.raises(AttributeError):
        found.logits  # noqa: B018  # the attribute is what is tested


def test_inputs_of_a_loaded_model_are_checked(saved: Path) -> None:
    with pytest.raises(InputError, match="'input_ids' must have dtype int64"):
        load(saved)(input_ids=numpy.ones((2, 3), "int32"), attention_mask=numpy.ones((2, 3), "int64"))


def test_the_report_is_kept(compiled: Compiled, saved: Path) -> None:
    assert load(saved).report.as_dict() == compiled.report.as_dict()


def test_a_report_of_before_there_was_pruning_is_read(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    for name in ("parameters_before", "parameters_after", "macs_before", "macs_after", "zeros", "masked", "reshaped"):
        del report[name]
    for item in report["passes"]:
        del item["sparsity"]
    (folder / "report.json").write_text(json.dumps(report))
    sign(folder, manifest_of(folder))
    found = load(folder).report
    assert found.equal and found.macs_after is None and found.passes[0].sparsity == []


@pytest.mark.parametrize(("threads", "reason"), [(0, "must be at least 1"), ("2", "must be int or None, found '2'")])
def test_threads(threads: Any, reason: str, saved: Path) -> None:
    with pytest.raises(InputError, match=f"threads {reason}"):
        load(saved, threads=threads)


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    assert name in refusal(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7])
def test_a_flipped_bit(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(len(data) * place)] ^= 1
    (folder / name).write_bytes(data)
    assert name in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_linked_file(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    assert name in refusal(folder)


def test_a_changed_manifest(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["signature"]["inputs"][0]["dtype"] = "float32"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "is altered" in refusal(folder)


def test_another_version(folder: Path) -> None:
    sign(folder, {**manifest_of(folder), "version": 99})
    assert "has version 99; this fxpress reads 1" in refusal(folder)


def test_another_format(folder: Path) -> None:
    sign(folder, {**manifest_of(folder), "format": "zip"})
    assert "no manifest of an fxpress artefact" in refusal(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", ""])
def test_a_listed_path_outside(folder: Path, name: str) -> None:
    manifest = manifest_of(folder)
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    sign(folder, manifest)
    assert "outside the artefact" in refusal(folder)


def test_a_model_that_is_not_listed(folder: Path) -> None:
    manifest = manifest_of(folder)
    del manifest["files"]["model.onnx"]
    sign(folder, manifest)
    assert "does not list model.onnx" in refusal(folder)


@pytest.mark.parametrize("part", ["files", "signature", "outputs", "structure"])
def test_a_signed_manifest_without_a_part(folder: Path, part: str) -> None:
    manifest = manifest_of(folder)
    del manifest[part]
    sign(folder, manifest)
    assert "manifest.json" in refusal(folder)


def test_a_signed_manifest_with_an_output_that_the_model_has_not(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["outputs"][0]["index"] = 9
    sign(folder, manifest)
    assert "outputs that its model does not have" in refusal(folder)


def test_a_signed_report_of_another_form(folder: Path) -> None:
    (folder / "report.json").write_text("{}")
    sign(folder, manifest_of(folder))
    assert "report.json" in refusal(folder)


@pytest.mark.parametrize("name", ["a\0b", "n" * 300], ids=["nul", "long"])
def test_a_name_that_no_file_can_have(compiled: Compiled, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        compiled.save(tmp_path / name)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "unlisted.bin"])
def test_weights_in_an_unlisted_file(folder: Path, location: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "location")
    entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    sign(folder, manifest_of(folder))
    assert "which is not in the manifest" in refusal(folder)


def test_a_signed_file_that_is_no_model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    sign(folder, manifest_of(folder))
    assert "model.onnx" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"text"', "\xff\xfe"])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json" in refusal(folder)


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    assert "it has no manifest.json" in refusal(tmp_path)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is no directory" in refusal(tmp_path / "file")


def test_a_path_that_is_missing(tmp_path: Path) -> None:
    assert "is no directory" in refusal(tmp_path / "missing")


# --- output paths ------------------------------------------------------------------------------------------------


def _existing(place: Path) -> Path:
    (place / "out").mkdir()
    return place / "out"


def _dangling(place: Path) -> Path:
    (place / "out").symlink_to(place / "nowhere")
    return place / "out"


def _file_as_parent(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file" / "out"


def _read_only(place: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (place / "closed").mkdir(mode=0o500)
    return place / "closed" / "out"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_existing, "exists already"),
        (_dangling, "exists already"),
        (lambda place: place / "missing" / "out", "is no directory"),
        (_file_as_parent, "is no directory"),
        (_read_only, "no permission"),
    ],
)
def test_a_bad_output_path(compiled: Compiled, tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        compiled.save(path)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_fails_leaves_nothing(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        compiled.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def small_files() -> Iterator[None]:
    """Within it, no file can have more than 4000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", ["runtime", "qdq"])
def test_a_full_disk_leaves_no_onnx_file(form: str, compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*File too large"), small_files():
        compiled.to_onnx(tmp_path / "x.onnx", form=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_full_disk_for_temporary_files_is_named(backend: str) -> None:
    with pytest.raises(InputError, match=r"cannot write .*File too large.*set TMPDIR"), small_files():
        compile(tiny.bert(), [], tiny.text(), backend=backend, tune=False, verify=False)


def test_a_file_that_cannot_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(file: Any, digest: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hashlib, "file_digest", closed)  # root, as whom tests may run, reads every file
    assert re.fullmatch(r"cannot read '.*model\.onnx': Permission denied", refusal(saved))


def test_an_interrupted_save_leaves_nothing(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
