"""Values beyond a budget of memory: in files, equal, and gone with the last reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from build import normal

from fxpress.ir.calibration.spill import Spill
from fxpress.ir.errors import RewriteError


def in_file(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def test_values_within_the_budget_stay_as_they_are() -> None:
    spill, value = Spill(2**20), normal(64, 64)
    assert spill.hold(value) is value and spill.used == 64 * 64 * 4
    assert spill.hold(value) is value and spill.used == 64 * 64 * 4  # once


def test_values_beyond_it_are_equal_and_in_a_file_that_no_folder_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for value in (normal(64, 64), normal(64, 64).t(), normal(64, 64).half(), torch.arange(4096).reshape(2, 2, 1024)):
        found = Spill(0).hold(value)
        assert in_file(found) and found.dtype is value.dtype and torch.equal(found, value)
    assert os.listdir(tmp_path) == []


def test_memory_is_given_back_with_the_value() -> None:
    spill, value = Spill(2**15), normal(64, 64)
    spill.hold(value)
    assert spill.used == 2**14
    del value
    assert spill.used == 0 and not in_file(spill.hold(normal(64, 64)))


def test_views_and_small_values_and_what_is_no_tensor_stay() -> None:
    spill, value = Spill(0), normal(64, 64)
    for item, sources in ((value.t(), [value]), (torch.tensor(1.0), []), (3, []), ((value,), [])):
        assert spill.hold(item, *sources) is item


def test_a_disk_without_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RewriteError, match=r"for 16384 bytes of calibration: .*No space left.*; set TMPDIR"):
        Spill(0).hold(normal(64, 64))
    assert os.listdir(tmp_path) == []
