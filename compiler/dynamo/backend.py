"""The backend of torch.compile: `torch.compile(model, backend="fxpress", options={...})`.

Dynamo gives a graph; it becomes the Program that `fxpress.compile` makes of a model, and ONNX Runtime or PyTorch runs
it. What fxpress does not take runs as before, and `fxpress.reports()` says why.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module

from ...backends.memory import Memory
from ...ir.equality import compare, run_float64
from ...ir.errors import FxpressError, InputError, LoweringError, TraceError, VerifyError, one_line
from ...ir.graph import Program
from ...ir.rewrite import Context
from ..calibration import track
from ..pipeline import Passed, counted, run_passes
from ..report import Report
from ..runners import Clock, OnnxRunner, Runner, best_backend, make_runner
from . import training
from .cache import Cache, key_of, known_sizes
from .check import agree, sharing
from .graph import (
    Argument,
    Captured,
    autocasting,
    calls,
    capture,
    check_graph,
    concrete,
    first_line,
    has_branches,
    keeps_statistics,
    kept_tensors,
    random_calls,
    read_arguments,
)
from .options import Options, read_options
from .program import Binding, make_program
from .report import GraphReport, described, remember
from .run import Call, Counted, Made, Product, Watched, best_milliseconds, in_pytorch, on_session

# A graph below it stays with PyTorch: what a call of ONNX Runtime and the making of a session cost is not earned back.
_SMALL_SECONDS = 5e-4
_WORTH_SECONDS = 1.0  # of a compilation, whose outcome is then worth remembering even if it is PyTorch
_SECONDS_OF_AN_OPERATOR, _MULTIPLICATIONS_A_SECOND = 4e-6, 2e10  # in PyTorch on one thread of a CPU, roughly


class Stays(Exception):
    """A graph that stays with PyTorch because that is the better choice; the text is the reason."""


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
    if mode is not None:
        report.note(f"mode={mode!r} is for other backends and was not used")
    remember(report)
    return _Compilation(gm, list(inputs), asked, report)()


class _Compilation:
    """The compilation of one graph."""

    def __init__(self, gm: fx.GraphModule, inputs: list[Any], asked: Options, report: GraphReport) -> None:
        self._gm, self._inputs, self._asked, self._report = gm, inputs, asked, report
        forward: Any = gm.forward
        self._forward: Call = forward
        self._count = len(inputs)
        self._autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self._attributes: list[str] = []
        self._key: str | None = None
        self._clock = Clock()
        report.seconds = self._clock.seconds
        report.recompiled = _recompilation()
        report.training = _needs_gradients(gm, inputs)

    def __call__(self) -> Call:
        """What runs the graph."""
        try:
            return self._taken()
        except Stays as choice:
            return self._left(str(choice))
        except FxpressError as error:
            if self._asked.fallback == "error":
                raise
            return self._left(one_line(error))
        except Exception as error:
            if self._asked.fallback == "error":
                raise
            reason = f"fxpress failed on it ({type(error).__name__}: {one_line(error)})"
            warnings.warn(f"{reason}; PyTorch runs it; please report this", RuntimeWarning, stacklevel=2)
            return self._left(reason)
        finally:
            self._inputs.clear()  # the compiled graph keeps no argument alive

    def _left(self, reason: str) -> Call:
        """The graph as PyTorch, or Inductor, runs it."""
        self._report.reason, self._report.passes = reason, []
        if self._asked.fallback == "inductor":
            from torch._inductor.compile_fx import compile_fx

            self._report.runner = "inductor"
            compiled: Any = compile_fx(self._gm, self._inputs)
            return Counted(compiled, self._report)
        self._report.runner = "pytorch"
        if self._report.training and training.recomputes(self._gm):
            self._report.note("its checkpoints are kept by AOTAutograd")
            return Counted(training.checkpointed(self._gm, self._inputs), self._report)
        return Counted(self._forward, self._report)

    def _taken(self) -> Call:
        """The graph as fxpress runs it.

        Raises:
            Stays, FxpressError: it does not, with the reason.
        """
        asked, report = self._asked, self._report
        found, mode = read_arguments(self._gm, self._inputs)
        report.weights = sum(argument.kind == "weight" for argument in found)
        report.inputs = described((item.name, item.fake) for item in found if item.kind != "weight")
        if report.training:
            if asked.backend == "onnx":
                raise LoweringError("gradients flow through it, and ONNX Runtime computes none")
            if asked.backend == "auto" and asked.exact:
                raise Stays(
                    "gradients flow through it: on a CPU PyTorch trains it as it is; backend='eager' rewrites it"
                )
        check_graph(self._gm)
        kept = kept_tensors(self._gm, found)
        self._attributes = [argument.attribute for argument in found if argument.attribute is not None]
        values = [*map(concrete, self._inputs), *kept]
        capturing = functools.cache(lambda: self._captured(found, mode))
        if report.training:
            if autocasting(self._gm):
                raise TraceError("autocast is on: while it trains PyTorch chooses the dtype of each operator")
            captured = capturing()
            return training.compiled(
                self._inputs,
                values,
                captured,
                asked,
                report,
                self._clock,
                lambda binding: self._calibration(binding, captured),
            )
        try:
            product, weights = self._from_disk(found, values) or self._product(capturing(), values)
        except (Stays, LoweringError) as reason:
            if self._key is not None and asked.backend == "auto" and sum(self._clock.seconds.values()) > _WORTH_SECONDS:
                Memory("graphs").write({self._key: {"reason": str(reason), "milliseconds": report.milliseconds}})
            raise

        def remake(values: Sequence[Any]) -> Product:
            return self._product(capturing(), values, first=False)[0]

        return Watched(product, weights, values, remake, self._forward, report, kept, at_once=not asked.exact)

    def _captured(self, found: Sequence[Argument], mode: FakeTensorMode) -> Captured:
        with self._clock("trace"):
            captured = capture(self._gm, found, mode)
        if (node := keeps_statistics(captured.module.graph)) is not None:
            raise TraceError(f"{node.target} changes its running statistics in training mode")
        return captured

    def _from_disk(self, found: Sequence[Argument], values: Sequence[Any]) -> tuple[Product, Sequence[int]] | None:
        """The graph as an earlier process compiled it; None: none did.

        Raises:
            Stays: an earlier process found out that PyTorch is the better choice.
        """
        if self._asked.backend not in ("auto", "onnx") or any(
            isinstance(value, Tensor) and value.is_cuda for value in values
        ):
            return None
        with self._clock("cache"):
            self._key = key_of(self._gm, found, values, self._asked)
            entry = Cache().load(self._key, torch.get_num_threads()) if self._key is not None else None
            known = Memory("graphs").read().get(self._key or "") if entry is None else None
        if isinstance(known, dict) and self._asked.backend == "auto" and isinstance(known.get("reason"), str):
            self._report.cache, self._report.milliseconds = "loaded", known.get("milliseconds", {})
            raise Stays(known["reason"])
        if entry is None:
            return None
        report = self._report
        for name in ("multiplications", "sqnr_db", "milliseconds", "reason"):
            setattr(report, name, entry.report[name])
        report.passes, report.runner, report.cache = entry.model.report.passes, "onnx", "loaded"
        run = on_session(entry.model.session, entry.model.signature, entry.model.leaves)
        return Made(entry.binding, run, self._usual, report), tuple(entry.binding.weights.values())

    def _usual(self, values: Sequence[Any]) -> Any:
        enabled, dtype = self._autocast
        with torch.autocast("cpu", dtype, enabled):
            return self._forward(*values[: self._count])

    def _tried(self, values: Sequence[Any]) -> Any:
        """What dynamo's graph gives; the tensors that it keeps are read from `values` too, so that no other changes."""
        kept = dict(zip(self._attributes, values[self._count :], strict=True))
        with _reparametrize_module(self._gm, kept):
            return self._usual(values)

    def _product(self, captured: Captured, values: Sequence[Any], first: bool = True) -> tuple[Product, Sequence[int]]:
        """What runs the graph with the weights that `values` hold, and the arguments that are those weights.

        Raises:
            Stays, FxpressError: nothing of ours does, with the reason.
        """
        asked, report = self._asked, self._report
        known = known_sizes(captured.fake_mode.shape_env)
        with _alone(), torch.no_grad():
            program, binding = make_program(captured, values)
            flat = binding.tensors(values)
            random = [str(node.target) for node in random_calls(program.graph)]
            backend = self._backend(values, random)
            with self._clock("eager"):
                measurable = not (random or has_branches(program.graph))
                if measurable:
                    before, report.multiplications = counted(program, flat)
                else:
                    before = list(program.run(flat))
                if first:
                    self._check_trace(program, binding, before, values, seeded=bool(random))
            if (
                first
                and asked.backend == "auto"
                and backend == "onnx"
                and asked.exact
                and _is_small(program, report.multiplications)
            ):
                raise Stays(f"it is small: {_work(program, report.multiplications)}")
            expected = (before, run_float64(program, flat)) if measurable else None
            with self._clock("passes"):
                context = Context(flat, self._calibration(binding, captured), track=track)
                if backend == "onnx":
                    from ...backends.onnx.measure import seconds

                    context.seconds = functools.partial(seconds, threads=torch.get_num_threads())
                passed = run_passes(program, asked.passes, context, None if asked.exact else expected)
            report.passes = passed.reports
            if random != [str(node.target) for node in random_calls(program.graph)]:
                raise TraceError("the passes would change which random numbers it draws")
            if not first and known != known_sizes(captured.fake_mode.shape_env):
                raise TraceError("made again it would hold at fewer sizes, which dynamo is not told any more")
            runner = self._runner(program, backend)
            if isinstance(runner, OnnxRunner):
                leaves = [(leaf.index, leaf.constant) for leaf in runner.leaves]
                run = on_session(runner.session, program.signature, leaves)
            else:
                run = in_pytorch(program, runner.run)
            if expected is not None:
                self._judge(program, passed, run(flat), *expected)
            elif not random and asked.exact and not all(map(agree, run(flat), before)):
                raise VerifyError("the result is not that of the graph")
            product = Made(binding, run, self._usual, report)
            report.runner = runner.name
            if first and asked.backend == "auto" and asked.exact and runner.name != "eager":
                self._race(runner.name, product, values, binding)
            settled = binding.finish.views is None and known == known_sizes(captured.fake_mode.shape_env)
            if isinstance(runner, OnnxRunner) and first and settled:
                self._store(runner, program, binding)
        return product, tuple(binding.weights.values())

    def _backend(self, values: Sequence[Any], random: Sequence[str]) -> str:
        """The backend that was asked for, as far as it may take a graph at all.

        Raises:
            LoweringError: it may not.
        """
        asked = self._asked
        best = best_backend([value for value in values if isinstance(value, Tensor)])
        if asked.backend == "onnx" and best == "triton":
            raise LoweringError("it is on CUDA, and the ONNX backend runs on the CPU")
        if not random:
            return best if asked.backend == "auto" else asked.backend
        if asked.backend in ("onnx", "triton") or (asked.backend == "auto" and asked.exact):
            raise TraceError(f"it draws random numbers ({random[0]}), as only PyTorch draws them")
        return "eager"

    def _runner(self, program: Program, backend: str) -> Runner:
        """What runs a rewritten program."""
        if backend != "eager":
            try:
                return make_runner(backend, program, torch.get_num_threads(), self._clock)
            except (LoweringError, InputError) as error:
                if self._asked.backend != "auto" or self._asked.exact:
                    raise
                self._report.reason = one_line(error)
        return make_runner("eager", program, None, self._clock)

    def _store(self, runner: OnnxRunner, program: Program, binding: Binding) -> None:
        if self._key is None:
            return
        report = self._report
        said = {name: getattr(report, name) for name in ("multiplications", "milliseconds", "reason")}
        said["sqnr_db"] = report.sqnr_db if report.sqnr_db is not None and math.isfinite(report.sqnr_db) else None
        saved = Report(report.source, "onnx", passes=report.passes)
        leaves = [{"index": leaf.index, "constant": leaf.constant} for leaf in runner.leaves]
        with self._clock("cache"):
            if Cache().store(self._key, runner.files, binding, saved, leaves, program.signature, said):
                report.cache = "stored"

    def _calibration(self, binding: Binding, captured: Captured) -> list[list[Tensor]]:
        """Batches in the order of the program's inputs.

        Raises:
            TraceError: a batch does not name an input.
        """
        names = [captured.arguments[place].name for place in binding.inputs]
        batches = []
        for batch in self._asked.calibration:
            found = []
            for name in names:
                key = next((key for key in batch if name == key or name.endswith(f"_{key}")), None)
                if key is None:
                    raise TraceError(f"the calibration data has no {name!r}, which is an input of this graph")
                found.append(batch[key])
            batches.append(found)
        return batches

    def _check_trace(
        self, program: Program, binding: Binding, before: Sequence[Any], values: Sequence[Any], seeded: bool
    ) -> None:
        """Refuse a program that does not give what dynamo's graph gives, or shares memory otherwise.

        Raises:
            VerifyError: says which output.
        """
        if binding.shares_changed(values):
            raise TraceError("an input that it changes shares memory with another input")
        own, theirs = binding.copies(values), binding.copies(values)
        with torch.random.fork_rng(devices=()):
            if seeded:
                torch.manual_seed(0)
                before = program.run(binding.tensors(own))
            found = binding.finish(before, own)
            if seeded:
                torch.manual_seed(0)
            truth = self._tried(theirs)
        pairs = [*zip(found, truth, strict=True), *((own[place], theirs[place]) for place, _ in binding.finish.changed)]
        for index, (value, usual) in enumerate(pairs):
            if not agree(value, usual):
                raise VerifyError(f"the traced graph gives another output {index} than dynamo's")
        if sharing(found, own) != sharing(truth, theirs):
            raise VerifyError("its outputs share memory in a way that fxpress does not follow")

    def _judge(
        self, program: Program, passed: Passed, found: Sequence[Any], before: Sequence[Any], judge: Sequence[Any]
    ) -> None:
        """Refuse what is not equal to the graph, where it should be; what lossy passes make of padding is no loss.

        Raises:
            VerifyError: says what differs.
        """
        if not self._asked.exact:
            found, before, judge = ([passed.real(value) for value in side] for side in (found, before, judge))
        try:
            verdict = compare(found, before, judge, program.signature.outputs)
        except RuntimeError as error:  # outputs of other shapes, as those of fewer heads are
            raise VerifyError(f"the result cannot be compared: {one_line(error)}") from error
        self._report.sqnr_db = verdict.sqnr_db
        if self._asked.exact and not verdict.equal:
            raise VerifyError(f"the result is not that of the graph: {verdict.reasons[0]}")

    def _race(self, name: str, product: Product, values: Sequence[Any], binding: Binding) -> None:
        """Measure whether a backend is faster than PyTorch.

        Raises:
            Stays: it is not.
        """
        own = binding.copies(values)
        with self._clock("race"):
            ours, usual = best_milliseconds([lambda: product(own), lambda: self._tried(own)])
        self._report.milliseconds = {name: round(ours, 3), "pytorch": round(usual, 3)}
        if ours >= usual:
            raise Stays("PyTorch was measured to be faster")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without dynamo's context, which torch.export inside would take for its own; numbers drawn are drawn again."""
    with (
        torch._guards.tracing(None),
        torch._guards.compile_context(None),
        torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def _needs_gradients(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the graph's outputs would require gradients."""
    wanted = any(isinstance(value, Tensor) and value.requires_grad for value in [*inputs, *gm.parameters()])
    return wanted and (torch.is_grad_enabled() or any(_enables(node) for node in gm.graph.nodes))


def _enables(node: fx.Node) -> bool:
    return node.target is torch._C._set_grad_enabled and bool(node.args[0])


def _is_small(program: Program, multiplications: int | None) -> bool:
    if multiplications is None:
        return False
    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    seconds = operators * _SECONDS_OF_AN_OPERATOR + multiplications / _MULTIPLICATIONS_A_SECOND
    return bool(seconds < _SMALL_SECONDS)


def _work(program: Program, multiplications: int | None) -> str:
    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    return f"{operators} operators, {(multiplications or 0) / 1e6:.3g} million multiplications"


def _compile_id() -> str:
    found = torch._guards.CompileContext.current_compile_id()
    return str(found) if found is not None else "-"


def _recompilation() -> str:
    """Why dynamo compiles this frame again; empty: it does not."""
    from torch._dynamo.utils import get_metrics_context

    context = get_metrics_context()
    reason = context._metrics.get("recompile_reason") if context.in_progress() else None
    return one_line(ValueError(reason)) if reason else ""
