"""Statistics of calibration in a file: tensors alone, written whole under a temporary name and then renamed."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ir.calibration.statistics import Statistics
from ..ir.errors import ArtifactError, InputError, one_line

FORMAT = "fxpress-statistics-1"
SECONDS = 30.0  # between two writings (more where they take long): so much work is lost if the process is killed


@contextmanager
def statistics_file(path: str, belongs: Mapping[str, str]) -> Iterator[Statistics]:
    """What a file holds, to be read and added to; it is written every 30 seconds and at the end, an error's too.

    Args:
        path: of a safetensors file, which may not exist yet.
        belongs: fingerprints of what the statistics are of, by what they are called in errors.

    Raises:
        InputError: the file is of something else, or cannot be written.
        ArtifactError: it is damaged, or no file of statistics.
    """
    file = _File(Path(path), belongs)
    try:
        yield file
    finally:
        file.write()


class _File:
    def __init__(self, path: Path, belongs: Mapping[str, str]) -> None:
        self.path, self.belongs = path, {**belongs}
        self._groups: dict[str, dict[str, Tensor]] = {}
        self._changed, self._written, self._pause = False, time.monotonic(), SECONDS
        if path.exists():
            self._read()
        else:
            self._changed = True
            self.write()  # a place that cannot be written is found out at once

    def get(self, name: str) -> Mapping[str, Tensor] | None:
        """The tensors that were put under a name."""
        return self._groups.get(name)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        self._groups[name] = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        self._changed = True
        if time.monotonic() - self._written > self._pause:
            self.write()

    def write(self) -> None:
        """Write everything, if anything is new."""
        if not self._changed:
            return
        start = time.monotonic()
        tensors = {f"{name}/{key}": value for name, group in self._groups.items() for key, value in group.items()}
        try:
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
            os.close(handle)
            try:
                save_file(tensors, temporary, {"format": FORMAT, **self.belongs})
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write statistics to {str(self.path)!r}: {one_line(error)}") from error
        self._changed, self._written = False, time.monotonic()
        self._pause = max(SECONDS, 20 * (self._written - start))

    def _read(self) -> None:
        name = repr(str(self.path))
        try:
            with safe_open(self.path, "pt") as file:
                found = file.metadata() or {}
                if found.get("format") != FORMAT:
                    raise ArtifactError(f"{name} holds no statistics of calibration; give another name")
                other = [what for what, digest in self.belongs.items() if found.get(what) != digest]
                if other:
                    raise InputError(
                        f"the statistics in {name} are of another {' and other '.join(other)}; "
                        "give another name, or remove the file to collect them anew"
                    )
                for key in file.keys():  # noqa: SIM118  # no mapping
                    group, _, leaf = key.rpartition("/")
                    self._groups.setdefault(group, {})[leaf] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"the statistics in {name} are truncated or altered: {one_line(error)}") from error
