"""What was measured on this machine, remembered on disk between runs: a small JSON file in the user's cache folder.

Any fault of the disk costs a new measurement and one warning, never a wrong answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """fxpress's own folder in the user's cache home ($XDG_CACHE_HOME, else ~/.cache)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fxpress"


def processor() -> str:
    """The processor's name, part of every key: a measurement holds for one kind of machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"{platform.machine()} {platform.processor()} x{os.cpu_count()}"


KEEP = 0.97  # another candidate must be at least this much faster than the one before it


def fastest(times: Mapping[str, float | None]) -> str:
    """The candidate of the shortest time; of those within 3%, the first. None: a candidate that failed."""
    known = {name: time for name, time in times.items() if time is not None}
    best, *others = known
    for name in others:
        if known[name] < KEEP * known[best]:
            best = name
    return best


class Memory:
    """A dictionary of measurements on disk. `name` is the file; every write replaces it whole."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self._path = (folder or cache_folder()) / f"{name}.json"
        self._warned = False

    def read(self) -> dict[str, Any]:
        """What is remembered; empty where nothing is, or where the file cannot be trusted or read."""
        try:
            if not self._path.exists():
                return {}
            check_owner(self._path.parent)
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("not a table")
            return found
        except (OSError, ValueError, RecursionError) as error:
            self._warn(error)
            return {}

    def write(self, entries: dict[str, Any]) -> None:
        """Remember these entries besides what is there."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_owner(self._path.parent)
            merged = {**self.read(), **entries}
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(merged, file, indent=1, sort_keys=True)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise
        except (OSError, ValueError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"measurements are not remembered in {self._path}: {error}", RuntimeWarning, stacklevel=4)


def check_owner(folder: Path) -> None:
    """Refuse a folder that another user owns or may write: what it holds decides what we run."""
    found = folder.stat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise OSError(f"{folder} is owned by or writable for others")
