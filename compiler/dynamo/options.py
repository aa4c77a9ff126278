"""The options of `torch.compile(model, backend="fxpress", options={...})`, checked before any work is done."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import InputError, nearest
from ...ir.rewrite import Pass
from ...ir.signature import describe

BACKENDS = ("auto", "eager", "onnx", "triton")
FALLBACKS = ("eager", "error", "inductor")
NAMES = ("backend", "calibration", "dtype", "fallback", "passes")


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        given: the passes that were named, canonical spelling first; None: none, so that the default runs.
        backend: "auto": ONNX Runtime, or on a GPU generated Triton kernels, where that is measured to be faster than
            PyTorch, else PyTorch; "onnx", "triton", "eager": that one, wherever it can take the graph.
        fallback: who runs a graph that fxpress does not take: PyTorch ("eager"), "inductor", or nobody ("error").
        calibration: dicts of inputs by the names of the function's arguments.
        dtype: of matrix products, convolutions and attention (mixed.py); None: that of the model.
    """

    given: tuple[Pass, ...] | None = None
    backend: str = "auto"
    fallback: str = "eager"
    calibration: tuple[Mapping[str, Any], ...] = ()
    dtype: torch.dtype | None = None

    @functools.cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The passes that run."""
        return self.given if self.given is not None else tuple(_parsed(None))

    @property
    def exact(self) -> bool:
        """Whether the result is that of the model, at padding too; what runs by default is exact."""
        return self.given is None or all(item.exact and item.keeps_padding for item in self.given)


def _parsed(given: Any) -> list[Pass]:
    from ..pipeline import parse_passes  # with all passes, which a process that finds its graphs on the disk can spare

    return parse_passes(given)


def read_options(given: Any) -> Options:
    """The options that a user gave to torch.compile.

    Raises:
        InputError: an unknown option or value, with the nearest valid one; or one that another excludes.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise InputError(f"options must be a dict, found {describe(given)}")
    for name in given:
        if name not in NAMES:
            raise InputError(f"unknown option {name!r} of the backend 'fxpress': {nearest(str(name), NAMES)}")
    passes = tuple(_parsed(given["passes"])) if given.get("passes") is not None else None
    calibration = _batches(given.get("calibration"))
    needed = next((item for item in passes or () if item.needs_calibration), None)
    if needed is not None and not calibration:
        raise InputError(
            f"pass {needed}: {needed.needs_calibration} needs calibration data; give the option calibration"
        )
    backend = _chosen("backend", given.get("backend", "auto"), BACKENDS)
    dtype = given.get("dtype")
    if dtype is not None:
        from ..precision import DTYPES

        dtype = DTYPES[_chosen("dtype", str(dtype).removeprefix("torch."), tuple(DTYPES))]
        if backend == "onnx":
            raise InputError("option dtype needs another backend: ONNX Runtime's CPU kernels are of float32")
    return Options(passes, backend, _chosen("fallback", given.get("fallback", "eager"), FALLBACKS), calibration, dtype)


def _chosen(name: str, value: Any, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}: {nearest(str(value), valid)}")
    return str(value)


def _batches(given: Any) -> tuple[Mapping[str, Any], ...]:
    if given is None:
        return ()
    try:
        batches = list(given)
    except TypeError:  # no iterable, by any protocol
        batches = [given]
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"calibration must give dicts of inputs by the names of the model's arguments, found {describe(batch)}"
            )
    return tuple(map(dict, batches))
