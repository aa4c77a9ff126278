"""The backend of torch.compile: `torch.compile(model, backend="fxpress", options={...})`.

Dynamo gives a graph; it becomes the Program that `fxpress.compile` makes of a model, and ONNX Runtime or PyTorch runs
it. What fxpress does not take runs as before, and `fxpress.reports()` says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from ...backends.memory import Memory
from ...ir.errors import FxpressError, LoweringError, TraceError, one_line
from .cache import Cache, key_of
from .graph import (
    Argument,
    Captured,
    autocasting,
    calls,
    capture,
    check_graph,
    concrete,
    first_line,
    keeps_statistics,
    kept_tensors,
    read_arguments,
)
from .options import read_options
from .report import GraphReport, described, remember
from .run import Call, Counted, Made, Product, Watched, on_session
from .work import Stays, Work

# What makes a Program (make.py, training.py) is imported where one is made: a process that finds its graphs on the disk
# starts without it, a third of a second earlier.

_WORTH_SECONDS = 1.0  # of a compilation, whose outcome is then worth remembering even if it is PyTorch


def fxpress(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Call:
    """Compile one of dynamo's graphs.

    Args:
        gm: the graph.
        inputs: the arguments of its first call.
        options: "passes", "backend", "fallback", "calibration", "dtype"; see docs/torch_compile.md.
        mode: torch.compile's; it is for other backends and changes nothing here.

    Raises:
        InputError: an option that is not valid.
        FxpressError: with fallback="error", why fxpress does not take the graph.
    """
    asked = read_options(options)
    report = GraphReport(_compile_id(), first_line(gm), sum(1 for _ in calls(gm)), 0)
    report.recompiled = _recompilation()
    report.training = _needs_gradients(gm, inputs)
    if mode is not None:
        report.note(f"mode={mode!r} is for other backends and was not used")
    remember(report)
    work = Work(gm, list(inputs), asked, report)
    try:
        return _taken(work)
    except Stays as choice:
        return _left(work, str(choice))
    except FxpressError as error:
        if asked.fallback == "error":
            raise
        return _left(work, one_line(error))
    except Exception as error:
        if asked.fallback == "error":
            raise
        reason = f"fxpress failed on it ({type(error).__name__}: {one_line(error)})"
        warnings.warn(f"{reason}; PyTorch runs it; please report this", RuntimeWarning, stacklevel=2)
        return _left(work, reason)
    finally:
        work.inputs.clear()  # the compiled graph keeps no argument alive


def _left(work: Work, reason: str) -> Call:
    """The graph as PyTorch, or Inductor, runs it."""
    report = work.report
    report.reason, report.passes = reason, []
    if work.asked.fallback == "inductor":
        from torch._inductor.compile_fx import compile_fx

        report.runner = "inductor"
        compiled: Any = compile_fx(work.gm, work.inputs)
        return Counted(compiled, report)
    report.runner = "pytorch"
    if report.training:
        from . import training

        if training.recomputes(work.gm):
            report.note("its checkpoints are kept by AOTAutograd")
            return Counted(training.checkpointed(work.gm, work.inputs), report)
    return Counted(work.forward, report)


def _taken(work: Work) -> Call:
    """The graph as fxpress runs it.

    Raises:
        Stays, FxpressError: it does not, with the reason.
    """
    asked, report = work.asked, work.report
    found, mode = read_arguments(work.gm, work.inputs)
    report.weights = sum(argument.kind == "weight" for argument in found)
    report.inputs = described((item.name, item.fake) for item in found if item.kind != "weight")
    if report.training:
        if asked.backend == "onnx":
            raise LoweringError("gradients flow through it, and ONNX Runtime computes none")
        if asked.backend == "triton":
            raise LoweringError("gradients flow through it, and generated kernels compute none")
        if asked.backend == "auto" and asked.exact:
            raise Stays("gradients flow through it: on a CPU PyTorch trains it as it is; backend='eager' rewrites it")
    check_graph(work.gm, asked.dtype)
    kept = kept_tensors(work.gm, found)
    work.attributes = [argument.attribute for argument in found if argument.attribute is not None]
    values = [*map(concrete, work.inputs), *kept]
    capturing = functools.cache(lambda: _captured(work, found, mode))
    if report.training:
        if asked.dtype is not None:
            raise TraceError("gradients flow through it; train in half precision with torch.autocast, not with dtype")
        if autocasting(work.gm):
            raise TraceError("autocast is on: while it trains PyTorch chooses the dtype of each operator")
        from .training import compiled

        return compiled(work, values, capturing())

    def made(values: Sequence[Any], first: bool) -> tuple[Product, Sequence[int]]:
        from .make import make_product

        return make_product(work, capturing(), values, first)

    try:
        product, weights = _from_disk(work, found, values) or made(values, True)
    except (Stays, LoweringError) as reason:
        if work.key is not None and asked.backend == "auto" and sum(work.clock.seconds.values()) > _WORTH_SECONDS:
            Memory("graphs").write({work.key: {"reason": str(reason), "milliseconds": report.milliseconds}})
        raise
    at_once = not asked.exact
    return Watched(product, weights, values, lambda now: made(now, False)[0], work.forward, report, kept, at_once)


def _captured(work: Work, found: Sequence[Argument], mode: FakeTensorMode) -> Captured:
    with work.clock("trace"):
        captured = capture(work.gm, found, mode, work.asked.dtype)
    if (node := keeps_statistics(captured.module.graph)) is not None:
        raise TraceError(f"{node.target} changes its running statistics in training mode")
    return captured


def _from_disk(work: Work, found: Sequence[Argument], values: Sequence[Any]) -> tuple[Product, Sequence[int]] | None:
    """The graph as an earlier process compiled it; None: none did.

    Raises:
        Stays: an earlier process found out that PyTorch is the better choice.
    """
    asked, report = work.asked, work.report
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in values)
    if asked.backend not in ("auto", "onnx") or asked.dtype is not None or on_gpu:
        return None
    with work.clock("cache"):
        work.key = key_of(work.gm, found, values, asked)
        entry = Cache().load(work.key, torch.get_num_threads()) if work.key is not None else None
        known = Memory("graphs").read().get(work.key or "") if entry is None else None
    if isinstance(known, dict) and asked.backend == "auto" and isinstance(known.get("reason"), str):
        report.cache, report.milliseconds = "loaded", known.get("milliseconds", {})
        raise Stays(known["reason"])
    if entry is None:
        return None
    for name in ("multiplications", "sqnr_db", "milliseconds", "reason"):
        setattr(report, name, entry.report[name])
    report.passes, report.runner, report.cache = entry.model.report.passes, "onnx", "loaded"
    run = on_session(entry.model.session, entry.model.signature, entry.model.leaves)
    return Made(entry.binding, run, work.usual, report), tuple(entry.binding.weights.values())


def _needs_gradients(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the graph's outputs would require gradients."""
    wanted = any(isinstance(value, Tensor) and value.requires_grad for value in [*inputs, *gm.parameters()])
    return wanted and (torch.is_grad_enabled() or any(_enables(node) for node in gm.graph.nodes))


def _enables(node: fx.Node) -> bool:
    return node.target is torch._C._set_grad_enabled and bool(node.args[0])


def _compile_id() -> str:
    found = torch._guards.CompileContext.current_compile_id()
    return str(found) if found is not None else "-"


def _recompilation() -> str:
    """Why dynamo compiles this frame again; empty: it does not."""
    from torch._dynamo.utils import get_metrics_context

    context = get_metrics_context()
    reason = context._metrics.get("recompile_reason") if context.in_progress() else None
    return one_line(ValueError(reason)) if reason else ""
