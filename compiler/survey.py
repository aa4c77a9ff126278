"""The survey: every family that transformers knows, as a tiny random model, each in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import FxpressError, InputError, TraceError, one_line
from . import hf, survey_attention, survey_inputs, survey_masks, survey_models
from .driver import Compiled, compile

EXAMPLE = (2, 12)
SIZES = ((2, 12), (3, 17), (1, 9), (1, 1))
SECONDS = 90  # of processor time that a family may take, and ten times that in all
MEMORY = 10 << 30  # bytes of address space that its process may take


@dataclass
class Outcome:
    """What came of one family. `stage` is the first that failed: model, inputs, trace, compile, equal; or "ok"."""

    family: str
    model: str = ""
    inputs: tuple[str, ...] = ()
    stage: str = "ok"
    reason: str = ""
    sizes: tuple[tuple[int, int], ...] = ()  # equal to eager at these
    refused: tuple[str, ...] = ()  # sizes that the model takes and the compiled one does not, each with its reason
    sqnr_db: float = float("inf")
    present: int = 0
    found: int = 0
    read: int = 0
    unread: tuple[str, ...] = ()  # where the reading of masks ends
    tensors: tuple[str, ...] = ()  # masks that are read, but that no argument says
    misses: tuple[str, ...] = ()  # why an attention was not found
    fused: dict[str, int] | None = None
    seconds: float = 0.0  # of processor time


def examine(family: str) -> Outcome:
    """Make a family's tiny model, compile it with the default passes, compare it with eager, count its attentions."""
    outcome, start = Outcome(family), time.process_time()
    try:
        _examine(family, outcome)
    except FxpressError as error:
        outcome.reason = re.sub(r"\S*/fxpress-\w+/", "", one_line(error))  # without names of temporary folders
    outcome.seconds = round(time.process_time() - start, 1)
    return outcome


def _examine(family: str, outcome: Outcome) -> None:
    outcome.stage = "model"
    model = survey_models.tiny_model(family)
    outcome.model, outcome.stage = type(model).__name__, "inputs"
    make = survey_inputs.maker(model, *EXAMPLE)
    example = make(*EXAMPLE)
    outcome.inputs = tuple(example)
    outcome.present = survey_attention.count(model, example)
    outcome.stage = "trace"
    try:
        compiled = compile(model, example_inputs=example, backend="onnx")
    except FxpressError as error:
        if not isinstance(error, TraceError):
            outcome.stage = "equal" if "is not that of the model" in str(error) else "compile"
        raise
    outcome.stage = "equal"
    _count(compiled, [example, make(*SIZES[1])], outcome)
    for size in SIZES:
        inputs = make(*size)
        if not survey_inputs.failure_of(model, inputs):
            _compare(compiled, inputs, size, outcome)
    outcome.stage = "ok"


def _count(compiled: Compiled, batches: Sequence[dict[str, Any]], outcome: Outcome) -> None:
    given = []
    for batch in batches:
        with contextlib.suppress(InputError):  # a size that is fixed
            given.append([torch.as_tensor(value) for value in compiled.traced.signature.bind((), batch)])
    try:
        masks = survey_masks.masks(compiled.traced, compiled.program, given)
    except RuntimeError:  # the graph does not hold at the second size, which `_compare` will tell
        masks = survey_masks.masks(compiled.traced, compiled.program, given[:1])
    outcome.found, outcome.read, outcome.unread, outcome.tensors = masks.found, masks.read, masks.unread, masks.tensors
    if masks.wrong:
        raise FxpressError(f"masks are read wrongly: {'; '.join(masks.wrong)}")
    if outcome.found < outcome.present:
        outcome.misses = tuple(dict.fromkeys(
            refusal["reason"] for item in compiled.report.passes for refusal in item.refusals
            if "attention" in refusal["rule"])) or ("no rule's spelling",)  # fmt: skip
    fused = [item.rewrites for item in compiled.report.passes if item.name == "fuse"]
    outcome.fused = {rule: count for rewrites in fused for rule, count in rewrites.items()}


def _compare(compiled: Compiled, inputs: dict[str, Any], size: tuple[int, int], outcome: Outcome) -> None:
    try:
        verdict = compiled.verify(inputs)
    except InputError as error:
        outcome.refused += (f"{size}: {one_line(error)}",)
        return
    if not verdict.equal:
        raise FxpressError(f"at {size}: {'; '.join(verdict.reasons)}")
    outcome.sizes += (size,)
    outcome.sqnr_db = min(outcome.sqnr_db, verdict.sqnr_db)


# --- processes -------------------------------------------------------------------------------------------------


def run(families: Sequence[str], record: Path, workers: int = 2) -> Iterator[Outcome]:
    """Examine families, each in a process of its own, and append each outcome to a file of JSON lines as it comes."""
    _warm_up()
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once, here
    waiting, running = list(families), list[Any]()
    while waiting or running:
        while waiting and len(running) < workers:
            family = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_in_child, args=(family, sender))
            process.start()
            sender.close()
            running.append((family, process, receiver, time.monotonic()))
        time.sleep(0.02)
        for item in list(running):
            outcome = _outcome_of(*item)
            if outcome is not None:
                running.remove(item)
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
                yield outcome


def _warm_up() -> None:
    """Load, in the process that the others are forked from, what every compilation loads."""
    transformers = hf.import_transformers()
    hf.quiet(transformers)
    assert transformers.PreTrainedModel and transformers.GenerationMixin  # loaded when asked for
    torch.set_num_threads(1)
    compile(torch.nn.Linear(2, 2).eval(), example_inputs=(torch.ones(2, 2),), backend="onnx", threads=1)
    gc.freeze()


def _outcome_of(family: str, process: Any, receiver: Any, start: float) -> Outcome | None:
    """The outcome of a process if it has ended, or has had its time."""
    outcome = None
    if receiver.poll():
        with contextlib.suppress(EOFError):
            outcome = receiver.recv()
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            outcome = Outcome(family, stage="crash", reason=f"no result after {SECONDS} seconds of processor time")
        elif outcome is None:
            outcome = Outcome(family, stage="crash", reason=f"the process died with exit status {process.exitcode}")
    elif time.monotonic() - start > 10 * SECONDS:
        process.kill()
        process.join()
        outcome = Outcome(family, stage="crash", reason=f"no result after {10 * SECONDS} seconds")
    if outcome is not None:
        receiver.close()
    return outcome


def _in_child(family: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the models: they are not ours to mend
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        outcome = examine(family)
    except MemoryError:
        outcome = Outcome(family, stage="crash", reason=f"more than {MEMORY >> 30} GiB of memory")
    except Exception as error:  # noqa: BLE001  # a bug of the compiler: to be seen in the table
        outcome = Outcome(family, stage="bug", reason=f"{type(error).__name__}: {one_line(error)}")
    sender.send(outcome)
    sender.close()


def recorded(record: Path) -> dict[str, Outcome]:
    """The outcomes in a file of JSON lines, the last of each family."""
    if not record.exists():
        return {}
    lines = record.read_text(encoding="utf-8").splitlines()
    items = ({name: _frozen(value) for name, value in json.loads(line).items()} for line in lines)
    return {item["family"]: Outcome(**item) for item in items}


def keep(record: Path, outcomes: Iterable[Outcome]) -> None:
    """Write a record anew, whole or not at all: one line a family, in the order of their names."""
    lines = [json.dumps(asdict(outcome)) + "\n" for outcome in sorted(outcomes, key=lambda item: item.family)]
    temporary = record.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, record)


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
