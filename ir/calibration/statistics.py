"""What calibration found so far: kept by name, so that a run that was interrupted goes on where it stopped.

Where it is kept is the driver's matter; `Statistics` is what a pass sees of it. What it belongs to is told by
fingerprints: those of the program with its weights, of the batches, and of the pass's options.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..graph import Program
from ..printer import print_program


class Statistics(Protocol):
    """Named groups of tensors."""

    def get(self, name: str) -> Mapping[str, Tensor] | None:
        """The tensors that were put under a name; None: there are none."""

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""


Open = Callable[[str, Mapping[str, str]], AbstractContextManager[Statistics]]
"""Opens what is kept at a path, given the fingerprints of what it has to belong to."""


class Nothing:
    """Keeps nothing: everything is computed."""

    def get(self, name: str) -> None:
        """There is nothing."""
        return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Forget them."""


def refused(path: str, belongs: Mapping[str, str]) -> AbstractContextManager[Statistics]:
    """The `Open` of a driver that keeps nothing.

    Raises:
        InputError: always.
    """
    raise InputError(f"statistics ({path!r}) are kept by fxpress.compile() and the command line alone; leave them out")


def fingerprints(program: Program, batches: Sequence[Sequence[Tensor]], options: str) -> dict[str, str]:
    """SHA-256 of a model, that is its graph and weights, of calibration data, and of options."""
    weights = sorted(program.module.state_dict().items())
    return {
        "model": _digest(print_program(program), *(part for item in weights for part in item)),
        "calibration data": _digest(*(part for batch in batches for part in (f"batch of {len(batch)}", *batch))),
        "options": _digest(options),
    }


def _digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            value = part.detach().cpu().contiguous()
            found.update(f"{value.dtype} {list(value.shape)}\n".encode())
            data: Any = value.reshape(-1).view(torch.uint8).numpy()
            found.update(data)
        else:
            found.update(f"{part}\n".encode())
    return found.hexdigest()
