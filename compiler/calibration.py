"""Calibration data: what is checked of it before any work is done, and the progress of that work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..ir.errors import InputError
from ..ir.signature import describe, leaves
from .steps import CACHES
from .trace import Arguments


def check_batches(batches: Sequence[Any], example: Arguments, bind: Callable[[Any], Arguments]) -> None:
    """Refuse calibration data that the model cannot be run on, or that no statistics can be taken from.

    Args:
        batches: each a dict of named or a tuple of positional inputs.
        example: the example inputs, bound to the model's parameters.
        bind: binds a batch to them.

    Raises:
        InputError: names the batch and the input: another kind, dtype or rank than the example's, an empty tensor, NaN
            or infinity.
    """
    wanted = _named(example[0], example[1])
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping | tuple | list):
            raise InputError(f"calibration batch {index} must be a dict or a tuple, found {describe(batch)}")
        try:
            bound = bind(batch)
        except InputError as error:
            raise InputError(f"calibration batch {index}: {error}") from error
        for path, value in _named(*bound).items():
            if isinstance(value, Tensor) and isinstance(wanted.get(path), Tensor):
                _check(index, path, value, wanted[path])


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    return {path: leaf for name, value in named.items() for path, leaf in leaves(value, name)}


def _check(index: int, path: str, value: Tensor, example: Tensor) -> None:
    place = f"calibration batch {index}, input {path!r}"
    if value.dtype != example.dtype:
        raise InputError(f"{place}: dtype {value.dtype}, the example has {example.dtype}".replace("torch.", ""))
    if value.dim() != example.dim():
        raise InputError(f"{place}: shape {list(value.shape)}, the example has {list(example.shape)}")
    if value.numel() == 0 and not path.startswith(CACHES):  # a cache may be empty
        raise InputError(f"{place} is empty: shape {list(value.shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(f"{place} has NaN or infinity; leave that batch out")


def track(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar on a terminal's stderr while they are worked on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    with Progress(console=console, transient=True) as progress:
        yield from progress.track(items, description=title)
