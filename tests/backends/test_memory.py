"""The memory of measurements: kept between runs, and never trusted or fatal where the disk is at fault."""

import os
import stat
import warnings
from pathlib import Path

import pytest

from fxpress.backends.memory import Memory, cache_folder


def test_what_is_written_is_read_by_another(tmp_path: Path) -> None:
    Memory("times", tmp_path / "cache").write({"a": {"x": 1.5}})
    assert Memory("times", tmp_path / "cache").read() == {"a": {"x": 1.5}}


def test_writing_adds_to_what_is_there(tmp_path: Path) -> None:
    Memory("times", tmp_path).write({"a": 1, "b": 1})
    Memory("times", tmp_path).write({"b": 2})
    assert Memory("times", tmp_path).read() == {"a": 1, "b": 2}


def test_nothing_is_remembered_at_first(tmp_path: Path) -> None:
    assert Memory("times", tmp_path / "missing").read() == {}


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    Memory("times", tmp_path).write({"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["times.json"]


def test_the_folder_is_private(tmp_path: Path) -> None:
    Memory("times", tmp_path / "cache").write({"a": 1})
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_the_folder_is_in_the_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fxpress"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "fxpress"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_not_read(tmp_path: Path, mode: int) -> None:
    Memory("times", tmp_path).write({"a": 1})
    tmp_path.chmod(mode)
    with pytest.warns(RuntimeWarning, match="owned by or writable for others"):
        assert Memory("times", tmp_path).read() == {}


def test_a_folder_that_others_may_write_is_not_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="owned by or writable for others"):
        Memory("times", tmp_path).write({"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_user_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory("times", tmp_path).write({"a": 1})
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="owned by or writable for others"):
        assert Memory("times", tmp_path).read() == {}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b'{"a": 1'])
def test_a_damaged_file_is_one_warning_and_nothing_remembered(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "times.json").write_bytes(data)
    memory = Memory("times", tmp_path)
    with pytest.warns(RuntimeWarning, match="measurements are not remembered"):
        assert memory.read() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.read() == {}


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text("{")
    with pytest.warns(RuntimeWarning, match="measurements are not remembered"):
        Memory("times", tmp_path).write({"a": 1})
    assert Memory("times", tmp_path).read() == {"a": 1}


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = Memory("times", tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="measurements are not remembered") as caught:
        memory.write({"a": 1})
        assert memory.read() == {}
        memory.write({"b": 1})
    assert len(caught) == 1


def test_a_file_name_that_is_a_folder_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "times.json").mkdir()
    with pytest.warns(RuntimeWarning, match="measurements are not remembered"):
        Memory("times", tmp_path).write({"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["times.json"]
