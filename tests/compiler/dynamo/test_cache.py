"""Compiled graphs on disk: a second process starts warm, and no fault of the disk gives a wrong answer."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dynamo
import pytest
import torch
from torch import Tensor, nn

import fxpress

ONNX = {"backend": "onnx", "passes": []}  # without passes nothing is measured


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fxpress.compiler.dynamo.cache._warned", set())
    with dynamo.fresh():
        yield


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()


def graphs(folder: Path) -> list[Path]:
    found = folder / "fxpress" / "graphs"
    return sorted(found.iterdir()) if found.is_dir() else []


def run(model: Any = None, given: Any = None, options: Any = None) -> str:
    """Compile and run, as a new process would; how the cache was used."""
    torch._dynamo.reset()
    fxpress.reports(clear=True)
    model = layers() if model is None else model
    given = (x(),) if given is None else given
    compiled = torch.compile(model, backend="fxpress", options={**ONNX, **(options or {})})
    with torch.no_grad():
        for value in given:
            torch.testing.assert_close(compiled(value), model(value))
    reports = fxpress.reports()
    assert all(report.runner == "onnx" for report in reports), str(reports)
    return ", ".join(report.cache for report in reports)


def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    assert run(options={"passes": "fuse"}) == "stored"
    report = fxpress.reports()[0]
    rewrites, error = report.rewrites, report.sqnr_db
    assert run(options={"passes": "fuse"}) == "loaded"
    report = fxpress.reports()[0]
    assert (report.rewrites, report.sqnr_db) == (rewrites, pytest.approx(error))
    assert "lower" not in report.seconds
    (folder,) = graphs(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert not [file for file in folder.iterdir() if file.suffix in (".pkl", ".pt")]


def test_dynamic_sizes_and_changed_inputs_are_stored_too() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, v: Tensor) -> Tensor:
            self.count.add_(1)
            return self.layers(v) * self.count

    for expected in ("stored, stored", "loaded, loaded"):
        torch._dynamo.reset()
        fxpress.reports(clear=True)
        model, same = Counter().eval(), Counter().eval()
        compiled = torch.compile(model, backend="fxpress", options=ONNX)
        with torch.no_grad():
            for rows in (3, 4, 6):
                torch.testing.assert_close(compiled(x(rows)), same(x(rows)))
        assert int(model.count) == 3
        assert ", ".join(report.cache for report in fxpress.reports()) == expected


def test_weights_changed_after_a_warm_start_are_noticed() -> None:
    run()
    torch._dynamo.reset()
    model = layers()
    compiled = torch.compile(model, backend="fxpress", options=ONNX)
    with torch.no_grad():
        compiled(x())
        model[0].weight.mul_(2)  # type: ignore[operator]
        for _ in range(3):
            torch.testing.assert_close(compiled(x()), model(x()))
    report = fxpress.reports()[-1]
    assert report.cache == "loaded"
    assert "weights changed: remade" in report.notes


def test_what_a_product_depends_on_is_in_the_key(tmp_path: Path) -> None:
    assert run() == "stored"
    other = layers()
    with torch.no_grad():
        other[0].bias[3] += 1e-3  # type: ignore[index]
    assert run(other) == "stored"
    assert run(given=(x(4),)) == "stored"
    assert run(options={"passes": ["canonicalize"]}) == "stored"
    assert run(nn.Sequential(*layers(), nn.ReLU())) == "stored"
    assert len(graphs(tmp_path)) == 5
    assert run() == "loaded"


def test_branches_are_in_the_key(tmp_path: Path) -> None:
    def branching(number: float) -> Any:
        def function(v: Tensor) -> Tensor:
            found: Tensor = torch.cond(v.sum() > 0, lambda u: u * number, lambda u: u + number, (v,))
            return found

        return function

    assert run(branching(2.0)) == "stored"
    assert run(branching(3.0)) == "stored"
    assert run(branching(2.0)) == "loaded"


def test_that_pytorch_is_faster_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.compiler.dynamo.backend._WORTH_SECONDS", 0.0)
    monkeypatch.setattr("fxpress.compiler.dynamo.make._SMALL_SECONDS", 0.0)
    monkeypatch.setattr("fxpress.compiler.dynamo.make.best_milliseconds", lambda calls: [2.0, 1.0])
    for cache in ("", "loaded"):
        torch._dynamo.reset()
        fxpress.reports(clear=True)
        compiled = torch.compile(layers(), backend="fxpress")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x()), layers()(x()))
        (report,) = fxpress.reports()
        assert (report.runner, report.reason, report.cache) == ("pytorch", "PyTorch was measured to be faster", cache)
        assert report.milliseconds == {"onnx": 2.0, "pytorch": 1.0}


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def removed(file: Path) -> None:
    file.unlink()


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("model.onnx", truncated), ("model.onnx", flipped), ("manifest.json", truncated), ("manifest.json", flipped),
        ("graph.json", flipped), ("graph.json", removed), ("report.json", folder_instead),
    ],
)  # fmt: skip
def test_damaged_files_are_not_used(name: str, fault: Callable[[Path], None], tmp_path: Path) -> None:
    run()
    fault(graphs(tmp_path)[0] / name)
    with pytest.warns(RuntimeWarning, match="a compiled graph in"):
        assert run() == "stored"


def test_an_entry_that_names_what_is_not_there_is_not_used(tmp_path: Path) -> None:
    """As the code of another version might have written it."""
    run()
    (folder,) = graphs(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"] = [{"index": 7, "constant": None}]
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    from fxpress.compiler.artifact import _digest_of

    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": _digest_of(body)}))
    with pytest.warns(RuntimeWarning, match="a compiled graph in"):
        assert run() == "stored"


def test_a_folder_of_others_is_not_used(tmp_path: Path) -> None:
    run()
    os.chmod(tmp_path / "fxpress" / "graphs", 0o777)
    with pytest.warns(RuntimeWarning):
        assert run() in ("", "stored")


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "fxpress").mkdir()
    (tmp_path / "fxpress" / "graphs").write_text("")
    with pytest.warns(RuntimeWarning, match="not stored"):
        assert run() == ""


def test_code_that_is_not_pytorchs_is_not_stored(tmp_path: Path) -> None:
    @torch._dynamo.allow_in_graph
    def doubled(v: Tensor) -> Tensor:
        return v * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()

        def forward(self, v: Tensor) -> Tensor:
            return doubled(self.layers(v))  # type: ignore[no-any-return]

    assert run(Model().eval()) == ""
    assert graphs(tmp_path) == []


def test_the_oldest_graphs_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    (first,) = graphs(tmp_path)
    monkeypatch.setattr("fxpress.compiler.dynamo.cache.LIMIT", 1)
    os.utime(first, (0, 0))
    run(given=(x(5),))
    (left,) = graphs(tmp_path)
    assert left != first


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    code = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
compiled = torch.compile(model, backend="fxpress", options={"backend": "onnx"})
with torch.no_grad():
    torch.testing.assert_close(compiled(torch.ones(3, 8)), model(torch.ones(3, 8)))
"""
    running = [subprocess.Popen([sys.executable, "-P", "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(graphs(tmp_path)) == 1
