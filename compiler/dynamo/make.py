"""A Program of dynamo's graph, rewritten, lowered, judged and measured: what no earlier process left on the disk."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.equality import compare, run_float64
from ...ir.errors import InputError, LoweringError, TraceError, VerifyError, one_line
from ...ir.graph import Program
from ...ir.rewrite import Context
from ..calibration import track
from ..pipeline import Passed, counted, run_passes
from ..precision import loss
from ..report import Report
from ..runners import OnnxRunner, Runner, best_backend, make_runner
from .binding import Binding
from .cache import Cache, known_sizes
from .check import agree, sharing
from .graph import WEIGHT, Captured, has_branches, random_calls
from .options import Options
from .program import cast_weights, make_program, owner
from .run import Made, Product, on_session
from .work import Stays, Work

# A graph below it stays with PyTorch: what a call of ONNX Runtime and the making of a session cost is not earned back.
_SMALL_SECONDS = 5e-4
_SECONDS_OF_AN_OPERATOR, _MULTIPLICATIONS_A_SECOND = 4e-6, 2e10  # in PyTorch on one thread of a CPU, roughly


def make_product(
    work: Work, captured: Captured, values: Sequence[Any], first: bool = True
) -> tuple[Product, Sequence[int]]:
    """What runs the graph with the weights that `values` hold, and the arguments that are those weights.

    Raises:
        Stays, FxpressError: nothing of ours does, with the reason.
    """
    asked, report = work.asked, work.report
    known = known_sizes(captured.fake_mode.shape_env)
    with _alone(), torch.no_grad():
        program, binding = make_program(captured, values)
        cast_weights(program)
        flat = binding.tensors(values)
        random = [str(node.target) for node in random_calls(program.graph)]
        backend = _backend(work.asked, values, random)
        with work.clock("eager"):
            measurable = not (random or has_branches(program.graph))
            if measurable:
                before, report.multiplications = counted(program, flat)
            else:
                before = list(program.run(flat))
            if first:
                _check_trace(work, program, binding, before, values, seeded=bool(random))
        if (
            first
            and asked.backend == "auto"
            and backend == "onnx"
            and asked.exact
            and _is_small(program, report.multiplications)
        ):
            raise Stays(f"it is small: {_work(program, report.multiplications)}")
        expected = (before, run_float64(program, flat)) if measurable else None
        with work.clock("passes"):
            context = Context(flat, calibration(work.asked, binding, captured, values), track=track, elsewhere=None)
            if backend == "onnx":
                from ...backends.onnx.measure import seconds

                context.seconds = functools.partial(seconds, threads=torch.get_num_threads())
            passed = run_passes(program, asked.passes, context, None if asked.exact else expected)
        report.passes = passed.reports
        if random != [str(node.target) for node in random_calls(program.graph)]:
            raise TraceError("the passes would change which random numbers it draws")
        if not first and known != known_sizes(captured.fake_mode.shape_env):
            raise TraceError("made again it would hold at fewer sizes, which dynamo is not told any more")
        runner = _runner(work, program, backend)
        if isinstance(runner, OnnxRunner):
            leaves = [(leaf.index, leaf.constant) for leaf in runner.leaves]
            run = on_session(runner.session, program.signature, leaves)
        else:
            run = in_pytorch(program, runner.run)
        if expected is not None:
            _judge(work, program, passed, run(flat), *expected)
        elif not random and asked.exact and not all(map(agree, run(flat), before, repeat(asked.dtype))):
            raise VerifyError("the result is not that of the graph")
        product = Made(binding, run, work.usual, report)
        report.runner = runner.name
        if first and asked.dtype is not None and not random:
            _measure_loss(work, product, values, binding)
        if first and asked.backend == "auto" and asked.exact and (runner.name != "eager" or asked.dtype is not None):
            _race(work, runner.name, product, values, binding)
        settled = binding.finish.views is None and known == known_sizes(captured.fake_mode.shape_env)
        if isinstance(runner, OnnxRunner) and first and settled:
            _store(work, runner, program, binding)
    return product, tuple(binding.weights.values())


def _backend(asked: Options, values: Sequence[Any], random: Sequence[str]) -> str:
    """The backend that was asked for, as far as it may take a graph at all.

    Raises:
        LoweringError: it may not.
    """
    best = best_backend([value for value in values if isinstance(value, Tensor)])
    if asked.backend == "onnx" and best == "triton":
        raise LoweringError("it is on CUDA, and the ONNX backend runs on the CPU")
    if not random:
        if asked.dtype is not None and asked.backend == "auto" and best == "onnx":
            return "eager"  # ONNX Runtime's CPU kernels are of float32
        return best if asked.backend == "auto" else asked.backend
    if asked.backend in ("onnx", "triton") or (asked.backend == "auto" and asked.exact):
        raise TraceError(f"it draws random numbers ({random[0]}), as only PyTorch draws them")
    return "eager"


def _runner(work: Work, program: Program, backend: str) -> Runner:
    """What runs a rewritten program."""
    if backend != "eager":
        try:
            return make_runner(backend, program, torch.get_num_threads(), work.clock)
        except (LoweringError, InputError) as error:
            if work.asked.backend != "auto" or work.asked.exact:
                raise
            work.report.reason = one_line(error)
    return make_runner("eager", program, None, work.clock)


def _store(work: Work, runner: OnnxRunner, program: Program, binding: Binding) -> None:
    if work.key is None:
        return
    report = work.report
    said = {name: getattr(report, name) for name in ("multiplications", "milliseconds", "reason")}
    said["sqnr_db"] = report.sqnr_db if report.sqnr_db is not None and math.isfinite(report.sqnr_db) else None
    saved = Report(report.source, "onnx", passes=report.passes)
    leaves = [{"index": leaf.index, "constant": leaf.constant} for leaf in runner.leaves]
    with work.clock("cache"):
        if Cache().store(work.key, runner.files, binding, saved, leaves, program.signature, said):
            report.cache = "stored"


def calibration(asked: Options, binding: Binding, captured: Captured, values: Sequence[Any]) -> list[list[Tensor]]:
    """Batches in the order of the program's inputs; those that are weights are as in `values`.

    Raises:
        TraceError: a batch does not name an input.
    """
    batches = []
    for batch in asked.calibration:
        found = []
        for place in binding.inputs:
            name = captured.arguments[place].name
            key = next((key for key in batch if name == key or name.endswith(f"_{key}")), None)
            if key is not None:
                found.append(batch[key])
            elif captured.arguments[place].kind == WEIGHT:
                found.append(values[place])
            else:
                raise TraceError(f"the calibration data has no {name!r}, which is an input of this graph")
        batches.append(found)
    return batches


def _check_trace(
    work: Work, program: Program, binding: Binding, before: Sequence[Any], values: Sequence[Any], seeded: bool
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
        truth = work.tried(theirs, work.asked.dtype)
    pairs = [*zip(found, truth, strict=True), *((own[place], theirs[place]) for place, _ in binding.finish.changed)]
    for index, (value, usual) in enumerate(pairs):
        if not agree(value, usual, work.asked.dtype):
            raise VerifyError(f"the traced graph gives another output {index} than dynamo's")
    if sharing(found, own) != sharing(truth, theirs):
        raise VerifyError("its outputs share memory in a way that fxpress does not follow")


def _judge(
    work: Work, program: Program, passed: Passed, found: Sequence[Any], before: Sequence[Any], judge: Sequence[Any]
) -> None:
    """Refuse what is not equal to the graph, where it should be; what lossy passes make of padding is no loss.

    Raises:
        VerifyError: says what differs.
    """
    if not work.asked.exact:
        found, before, judge = map(passed.real, (found, before, judge))
    try:
        verdict = compare(found, before, judge, program.signature.outputs)
    except RuntimeError as error:  # outputs of other shapes, as those of fewer heads are
        raise VerifyError(f"the result cannot be compared: {one_line(error)}") from error
    work.report.sqnr_db = verdict.sqnr_db
    if work.asked.exact and not verdict.equal:
        raise VerifyError(f"the result is not that of the graph: {verdict.reasons[0]}")


def _measure_loss(work: Work, product: Product, values: Sequence[Any], binding: Binding) -> None:
    """How far half precision is from the graph in its own: the worst output's SQNR, and cosine."""
    found = loss(product(binding.copies(values)), work.tried(binding.copies(values)))
    work.report.precision = {"dtype": str(work.asked.dtype).removeprefix("torch."), **found}


def _race(work: Work, name: str, product: Product, values: Sequence[Any], binding: Binding) -> None:
    """Measure whether a backend is faster than PyTorch.

    Raises:
        Stays: it is not.
    """
    own = binding.copies(values)
    with work.clock("race"):
        ours, usual = best_milliseconds([lambda: product(own), lambda: work.tried(own)])
    work.report.milliseconds = {name: round(ours, 3), "pytorch": round(usual, 3)}
    if ours >= usual:
        raise Stays("PyTorch was measured to be faster")


def in_pytorch(
    program: Program, runner: Callable[[Sequence[Tensor]], list[Any]]
) -> Callable[[Sequence[Tensor]], list[Any]]:
    """A program run by PyTorch; its outputs have memory of their own, as those of the graph that it is made of."""
    outputs = next(iter(reversed(program.graph.nodes))).args[0]
    owners = [owner(node) if isinstance(node, fx.Node) else None for node in outputs]
    shared = [
        place
        for place, node in enumerate(owners)
        if node is not None and (node.op != "call_function" or node in owners[:place])
    ]

    def run(tensors: Sequence[Tensor]) -> list[Any]:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # casts are part of the program
            found = list(runner(tensors))
        for place in shared:
            found[place] = found[place].clone()
        return found

    return run


def best_milliseconds(calls: Sequence[Callable[[], Any]], seconds: float = 0.15) -> list[float]:
    """The best time of each call; they take turns, three at least.

    On one thread the clock is the thread's own, so that other programs on the machine do not decide.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    clock = time.thread_time if alone else time.perf_counter
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(50):
        for place, call in enumerate(calls):
            start = clock()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            best[place] = min(best[place], (clock() - start) * 1e3)
        if turn >= 2 and time.perf_counter() > end:
            break
    return best


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


def _is_small(program: Program, multiplications: int | None) -> bool:
    if multiplications is None:
        return False
    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    seconds = operators * _SECONDS_OF_AN_OPERATOR + multiplications / _MULTIPLICATIONS_A_SECOND
    return bool(seconds < _SMALL_SECONDS)


def _work(program: Program, multiplications: int | None) -> str:
    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    return f"{operators} operators, {(multiplications or 0) / 1e6:.3g} million multiplications"
