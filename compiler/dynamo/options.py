"""The options of `torch.compile(model, backend="fxpress", options={...})`, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.errors import InputError, nearest
from ...ir.rewrite import Pass
from ...ir.signature import describe
from ..pipeline import parse_passes

BACKENDS = ("auto", "eager", "onnx", "triton")
FALLBACKS = ("eager", "error", "inductor")
NAMES = ("backend", "calibration", "dtype", "fallback", "passes")


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        passes: the passes, canonical spelling first.
        backend: "auto": ONNX Runtime, or on a GPU generated Triton kernels, where that is measured to be faster than
            PyTorch, else PyTorch; "onnx", "triton", "eager": that one, wherever it can take the graph.
        fallback: who runs a graph that fxpress does not take: PyTorch ("eager"), "inductor", or nobody ("error").
        calibration: dicts of inputs by the names of the function's arguments.
    """

    passes: tuple[Pass, ...]
    backend: str = "auto"
    fallback: str = "eager"
    calibration: tuple[Mapping[str, Any], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the result is that of the model."""
        return all(item.exact for item in self.passes)


def read_options(given: Any) -> Options:
    """The options that a user gave to torch.compile.

    Raises:
        InputError: an unknown option or value, with the nearest valid one; what is not built, with the reason.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise InputError(f"options must be a dict, found {describe(given)}")
    for name in given:
        if name not in NAMES:
            raise InputError(f"unknown option {name!r} of the backend 'fxpress': {nearest(str(name), NAMES)}")
    dtype = given.get("dtype")
    if dtype is not None:
        raise InputError(
            f"option dtype={str(dtype).removeprefix('torch.')!r} is not built: a graph runs in the dtypes that the "
            "model has; change the model (model.half(), model.float()) or quantize it with the option passes"
        )
    passes = tuple(parse_passes(given.get("passes")))
    calibration = _batches(given.get("calibration"))
    needed = next((item for item in passes if item.needs_calibration), None)
    if needed is not None and not calibration:
        raise InputError(
            f"pass {needed}: {needed.needs_calibration} needs calibration data; give the option calibration"
        )
    return Options(
        passes,
        _chosen("backend", given.get("backend", "auto"), BACKENDS),
        _chosen("fallback", given.get("fallback", "eager"), FALLBACKS),
        calibration,
    )


def _chosen(name: str, value: Any, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}: {nearest(str(value), valid)}")
    return str(value)


def _batches(given: Any) -> tuple[Mapping[str, Any], ...]:
    if given is None:
        return ()
    batches = []
    for batch in given:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"calibration must give dicts of inputs by the names of the model's arguments, found {describe(batch)}"
            )
        batches.append(dict(batch))
    return tuple(batches)
