"""Values beyond a budget of memory, kept in files that no folder shows."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import RewriteError, one_line

LIMIT = 2**31  # bytes
_LEAST = 2**12  # smaller values are not worth a file


class Spill:
    """Holds tensors in memory up to a budget; the rest is mapped from files, which the system pages in as it is read.

    A file is deleted as soon as it is mapped, so that nothing is left whatever happens; its space is free when the last
    tensor over it goes.

    Args:
        limit: bytes of memory.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.used = limit, 0
        self._held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def hold(self, value: Any, *sources: Any) -> Any:
        """The value, or the same in a file; views of `sources` stay views, and what is no tensor of the CPU stays.

        Raises:
            RewriteError: there is no room for the file.
        """
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout is not torch.strided:
            return value
        size = value.numel() * value.element_size()
        storage = value.untyped_storage()
        known = id(value) in self._held or storage.filename is not None
        if known or size < _LEAST or any(storage.data_ptr() == place for place in _places(sources)):
            return value
        if self.used + size > self.limit:
            return _mapped(value)
        self.used += size
        self._held[id(value)] = value
        weakref.finalize(value, self._let_go, size)
        return value

    def _let_go(self, size: int) -> None:
        self.used -= size


def _places(sources: Any) -> list[int]:
    return [item.untyped_storage().data_ptr() for item in sources if isinstance(item, Tensor)]


def _mapped(value: Tensor) -> Tensor:
    size = value.numel() * value.element_size()
    handle, path = tempfile.mkstemp(prefix="fxpress-")
    try:
        os.posix_fallocate(handle, 0, size)  # a full disk is an error here, not a crash when the mapping is written
        found = torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype)
    except OSError as error:
        folder = tempfile.gettempdir()
        raise RewriteError(
            f"no room in {folder!r} for {size} bytes of calibration: {one_line(error)}; set TMPDIR to a larger disk, "
            "or give less data"
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)
    return found.view(value.shape).copy_(value)
