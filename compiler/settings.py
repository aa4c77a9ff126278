"""What compile() was asked for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import checks
from ..ir.errors import InputError, nearest
from ..ir.rewrite import Pass
from ..ir.signature import describe
from .pipeline import parse_passes
from .runners import check_installed

BACKENDS = ("auto", "eager", "onnx", "openvino", "triton")


@dataclass
class Settings:
    """The options of compile() that hold for all that it makes."""

    passes: list[Pass]
    dynamic_shapes: Any
    backend: str
    calibration: Sequence[Any]
    verify: bool
    max_rewrites: int | None
    threads: int | None
    dtype: torch.dtype | None = None
    inside: str | None = None  # the dtype that openvino computes in
    tune: bool = True
    elsewhere: Sequence[str] = ()  # see Context


def batches_of(calibration: Any) -> list[Any]:
    """Calibration data as a list of batches.

    Raises:
        InputError: it has none to give.
    """
    if not isinstance(calibration, Iterable):
        raise InputError(
            f"calibration must be a list of inputs, found {describe(calibration)}; write calibration=[inputs, ...], or "
            "leave it out"
        )
    # A tokenizer's output is a mapping but no dict, and torch's pytrees do not look into it.
    return [dict(batch) if isinstance(batch, Mapping) else batch for batch in calibration]


def checked(
    passes: Any,
    dynamic_shapes: Any,
    backend: str,
    calibration: Any,
    verify: bool,
    max_rewrites: Any,
    threads: int | None,
) -> Settings:
    """Options as settings.

    Raises:
        InputError: names what is unknown, out of range, missing or not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}: {nearest(backend, BACKENDS)}")
    check_installed(backend)
    checks.of_kind("max_rewrites", max_rewrites, int, None)
    if max_rewrites is not None and max_rewrites < 0:
        raise InputError(f"max_rewrites must be 0 or more, found {max_rewrites}")
    checks.threads(threads)
    chosen, batches = parse_passes(passes), batches_of(calibration)
    needed = next((item for item in chosen if item.needs_calibration), None)
    if needed is not None and not batches:
        raise InputError(f"pass {needed}: {needed.needs_calibration} needs calibration data; give calibration=batches")
    return Settings(chosen, dynamic_shapes, backend, batches, verify, max_rewrites, threads)
