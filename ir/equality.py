"""What "equal" means, in one place: used by the tests, the compiler's own check, the demo and the benchmarks.

Floats are judged against a run of the model in fp64: the error may be at most twice (fp32) or three times (half) that
of eager PyTorch in the model's own precision, plus 1e-6 of the largest magnitude. NaN and infinity must stand in the
same places; everything that is no float must be identical. No fraction of the elements is exempt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import Program

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_FACTOR = {torch.float64: 2.0, torch.float32: 2.0, torch.float16: 3.0, torch.bfloat16: 3.0}
_FLOOR = 1e-6


@dataclass(frozen=True)
class Error:
    """How far one float tensor is from the truth."""

    name: str
    rmse: float
    allowed: float
    max_abs: float
    sqnr_db: float  # signal to quantization-noise ratio: 10 log10(sum truth^2 / sum error^2)
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """The verdict on one run: equal, or the reasons why not; and the error of each float output."""

    errors: tuple[Error, ...] = ()
    reasons: tuple[str, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Whether the run is equal to eager."""
        return not self.reasons

    @property
    def sqnr_db(self) -> float:
        """The lowest SQNR among the outputs, in dB; infinity if there is no error."""
        return min((error.sqnr_db for error in self.errors), default=math.inf)

    @property
    def cosine(self) -> float:
        """The lowest cosine among the outputs."""
        return min((error.cosine for error in self.errors), default=1.0)

    @property
    def max_abs(self) -> float:
        """The largest absolute error among the outputs."""
        return max((error.max_abs for error in self.errors), default=0.0)


def compare(
    actual: Sequence[Any], eager: Sequence[Any], judge: Sequence[Any], names: Sequence[str] | None = None
) -> Comparison:
    """Judge flat outputs `actual` by `eager` (the model in its own precision) and `judge` (the same in fp64)."""
    names = names or [f"output {index}" for index in range(len(eager))]
    if not len(actual) == len(eager) == len(judge):
        return Comparison(reasons=(f"{len(actual)} outputs, expected {len(eager)}",))
    errors: list[Error] = []
    reasons: list[str] = []
    for name, found, usual, truth in zip(names, actual, eager, judge, strict=True):
        if not isinstance(usual, Tensor):
            if type(found) is not type(usual) or found != usual:
                reasons.append(f"{name} is {found!r}, expected {usual!r}")
        elif not isinstance(found, Tensor):
            reasons.append(f"{name} is no tensor")
        elif found.dtype != usual.dtype or found.shape != usual.shape:
            got, want = f"{found.dtype}{list(found.shape)}", f"{usual.dtype}{list(usual.shape)}"
            reasons.append(f"{name} is {got}, expected {want}".replace("torch.", ""))
        elif not usual.dtype.is_floating_point:
            if not torch.equal(found, usual):
                reasons.append(f"{name} differs in {int((found != usual).sum())} elements; it must be identical")
        else:
            error = _error(name, found, usual, truth)
            if isinstance(error, str):
                reasons.append(error)
                continue
            errors.append(error)
            if not error.rmse <= error.allowed:
                reasons.append(f"{name} has RMSE {error.rmse:.3g}, allowed {error.allowed:.3g}")
    return Comparison(tuple(errors), tuple(reasons))


def _error(name: str, found: Tensor, usual: Tensor, truth: Tensor) -> Error | str:
    if usual.shape != truth.shape:
        return f"{name} is {list(usual.shape)} in fp32 and {list(truth.shape)} in fp64: its size depends on values"
    for kind, where in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        if not torch.equal(where(found), where(usual)):
            return f"{name} has {kind} in other places than eager"
    found, usual, truth = found.detach(), usual.detach(), truth.detach()
    finite = torch.isfinite(usual) & torch.isfinite(truth)
    value, reference, exact = (tensor.double()[finite] for tensor in (found, usual, truth))
    if exact.numel() == 0:
        return Error(name, 0.0, 0.0, 0.0, math.inf, 1.0)
    rmse = float((value - exact).square().mean().sqrt())
    eager_rmse = float((reference - exact).square().mean().sqrt())
    peak = float(exact.abs().max())
    allowed = _FACTOR[usual.dtype] * eager_rmse + _FLOOR * peak
    return Error(name, rmse, allowed, float((value - exact).abs().max()), sqnr_db(value, exact), cosine(value, exact))


def sqnr_db(value: Tensor, truth: Tensor) -> float:
    """Signal to quantization-noise ratio in dB: 10 log10(sum truth^2 / sum (value - truth)^2)."""
    value, truth = value.detach().double(), truth.detach().double()
    noise = float((value - truth).square().sum())
    signal = float(truth.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(value: Tensor, truth: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors; 1 for two zero vectors."""
    a, b = value.detach().double().flatten(), truth.detach().double().flatten()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else float(torch.equal(a, b))


def run_float64(program: Program, tensors: Sequence[Tensor]) -> list[Any]:
    """Run a program with every float tensor, weight and cast in fp64: the judge of `compare`."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Widen():  # type: ignore[no-untyped-call]
            return list(_WideInterpreter(program.module).run(*[widen(tensor) for tensor in tensors]))
    finally:
        torch.set_default_dtype(usual)


def widen(value: Any) -> Any:
    """A float tensor in fp64, a narrow float dtype as float64; anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class _WideInterpreter(fx.Interpreter):
    """Reads every weight in fp64, one at a time; the program's own weights stay as they are."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().get_attr(target, args, kwargs))


class TakenBranch(TorchDispatchMode):
    """Runs the branch of a torch.cond that its condition takes, where other modes refuse it or run both."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call an operator."""
        if func is torch.ops.higher_order.cond:
            holds, then, otherwise, operands = args
            with self:
                return (then if holds else otherwise)(*operands)
        return func(*args, **(kwargs or {}))


class _Widen(TakenBranch):
    """Turns every request for a narrower float dtype into one for float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wide = {name: widen_dtype(value) for name, value in (kwargs or {}).items()}
        return super().__torch_dispatch__(func, types, list(map(widen_dtype, args)), wide)


def widen_dtype(value: Any) -> Any:
    """float64 for a narrow float dtype; anything else, tensors included, as it is."""
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
