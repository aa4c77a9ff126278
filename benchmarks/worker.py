"""What runs in the processes that measure.py starts: `python worker.py '{"task": ..., "workload": ..., ...}'`.

A worker answers one JSON object a line on stdout; whatever libraries print goes to stderr. `serve` and `floor` then
take requests on stdin, `[batch, length, seconds]`, and answer `{"ms": median}`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from batches import EVALUATION_SHAPE, load
from candidates import Run, named, saved_inputs, tensors_of
from lineup import CANDIDATES
from quality import states_of
from workloads import WORKLOADS, Inputs, Shape, Workload


@dataclass(frozen=True)
class Job:
    """A workload at some shapes in a folder that all of its workers share."""

    workload: Workload
    work: Path
    shapes: list[Shape]
    candidate: str
    say: Callable[[Any], None]

    def inputs(self, shape: Shape) -> Inputs:
        return saved_inputs(self.work, shape)


# --- before anything is measured -------------------------------------------------------------------------------


def reference(job: Job) -> None:
    """Inputs for all; what the eager model gives for them in fp64, and the matmul operations it needs."""
    import torch
    from floor import count_operations, linear_sizes

    evaluated = [EVALUATION_SHAPE] if job.workload.calibration else []
    for shape in {*job.shapes, *job.workload.memory, *evaluated, job.workload.example}:
        numpy.savez(job.work / f"inputs-{named(shape)}.npz", **job.workload.tokens(shape))
    model = job.workload.build().double()
    operations: dict[str, int] = {}
    for shape in job.shapes:
        tensors = tensors_of(job.inputs(shape))

        def run(tensors: dict[str, Any] = tensors) -> Any:
            with torch.inference_mode():
                return model(**tensors).last_hidden_state.numpy()

        truth, operations[named(shape)] = count_operations(run, shape[1], job.workload.window)
        numpy.save(job.work / f"reference-{named(shape)}.npy", truth)
    if job.workload.calibration:
        import batches

        batches.save(job.work / "calibration.npz", batches.calibration(job.workload.calibration))
        batches.save(job.work / "evaluation.npz", batches.evaluation())
        for shape in job.shapes:
            batches.save(job.work / f"samples-{named(shape)}.npz", batches.samples(shape))
    facts = {"operations": operations, "linears": linear_sizes(model)}
    (job.work / "facts.json").write_text(json.dumps(facts))
    job.say({})


def build(job: Job) -> None:
    """Write the files that the candidate reads, for each shape."""
    make = CANDIDATES[job.candidate].build
    assert make is not None
    errors: dict[str, str | None] = {}
    notes: list[str] = []
    for shape in job.shapes:
        try:
            notes.append(make(job.workload, job.work, shape, job.inputs(shape)))
            errors[named(shape)] = None
        except Exception as error:  # noqa: BLE001 - a peer that fails is listed with its error
            errors[named(shape)] = error_text(error)
    job.say({"errors": errors, "notes": sorted({note for note in notes if note})})


def compile_artifact(job: Job) -> None:
    """Compile with fxpress and save; imports and the making of the model are timed apart."""
    start = time.perf_counter()
    from fxpress import compile
    from fxpress.backends.onnx import choose, export, session  # noqa: F401 - compile() would import them

    model = job.workload.build()
    imported = time.perf_counter()
    example = tensors_of(job.inputs(job.workload.example))
    compiled = compile(model, example_inputs=example, threads=1)
    ready = time.perf_counter()
    compiled.save(job.work / "artifact")
    job.say({"imports": imported - start, "compile": ready - imported})


def load_artifact(job: Job) -> None:
    """Load what fxpress saved; no torch."""
    start = time.perf_counter()
    from fxpress import load

    imported = time.perf_counter()
    load(job.work / "artifact", threads=1)
    loaded = time.perf_counter()
    job.say({"imports": imported - start, "load": loaded - imported, "torch": "torch" in sys.modules})


# --- measuring -------------------------------------------------------------------------------------------------


def median_ms(run: Run, seconds: float) -> float:
    """Median of the runs that fit into `seconds`, after one that is not counted unless it takes twice the time.

    A run as long as that hardly feels the cold caches that the others leave behind.
    """

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    times = [timed()]
    if times[0] < 2 * seconds:
        times.clear()
        while sum(times) < seconds:
            times.append(timed())
    return statistics.median(times) * 1000


def serve(job: Job) -> None:
    """Prepare the candidate at each shape, save what it gives, tell what failed, then measure as asked."""
    runs: dict[Shape, Run] = {}
    errors: dict[str, str | None] = {}
    prepare = None
    for shape in job.shapes:
        try:
            prepare = prepare or CANDIDATES[job.candidate].open(job.workload, job.work)
            run = prepare(shape, job.inputs(shape))
            numpy.save(job.work / f"{job.candidate}-{named(shape)}.npy", numpy.asarray(run()))
        except Exception as error:  # noqa: BLE001 - a peer that fails is listed with its error
            errors[named(shape)] = error_text(error)
        else:
            runs[shape] = run
            errors[named(shape)] = None
    job.say({"errors": errors})
    for line in sys.stdin:
        batch, length, seconds = json.loads(line)
        job.say({"ms": median_ms(runs[batch, length], seconds)})


def serve_floor(job: Job) -> None:
    """The floor at a shape: the model's matmul operations over the best rate of its linear layers."""
    import torch
    from floor import products

    torch.set_num_threads(1)
    facts = json.loads((job.work / "facts.json").read_text())
    found = {shape: products(shape, facts["linears"]) for shape in job.shapes}
    job.say({"errors": {}})
    for line in sys.stdin:
        batch, length, seconds = json.loads(line)
        parts = found[batch, length]
        rate = max(operations / median_ms(run, seconds / len(parts)) for operations, run in parts)
        job.say({"ms": facts["operations"][named((batch, length))] / rate})


# --- quality ---------------------------------------------------------------------------------------------------


def embed(job: Job) -> None:
    """Token states of the samples of each shape and, as the last, of the evaluation's texts."""
    parts = {f"samples-{named(shape)}": shape for shape in job.shapes} | {"evaluation": EVALUATION_SHAPE}
    prepare = CANDIDATES[job.candidate].open(job.workload, job.work)
    errors: dict[str, str | None] = {}
    for part, shape in parts.items():
        texts = load(job.work / f"{part}.npz")
        arrays = {name: array.copy() for name, array in texts[0].items()}
        try:
            states, _ = states_of(partial(run_on, prepare(shape, arrays), arrays), texts)
            numpy.save(job.work / f"{job.candidate}-{part}.npy", states)
            errors[part] = None
        except Exception as error:  # noqa: BLE001 - a peer that fails is listed with its error
            errors[part] = error_text(error)
    job.say({"errors": errors})


def run_on(run: Run, arrays: Inputs, batch: Inputs) -> Any:
    """A run on another batch, written into the arrays that it was prepared with."""
    for name, array in batch.items():
        arrays[name][...] = array
    return run()


# --- memory ----------------------------------------------------------------------------------------------------


def memory(job: Job) -> None:
    """By how much a run's peak of resident memory exceeds what was resident before the model was loaded.

    The first shape is done twice and counted once: whatever libraries load and keep at first is not the shape's.
    Compilers have done their work, and ONNX Runtime has its arena, when the peak is taken.
    """
    found: dict[str, float | str] = {}
    for shape in (job.shapes[0], *job.shapes):
        inputs = job.inputs(shape)
        start = resident("VmRSS")
        try:
            run = CANDIDATES[job.candidate].open(job.workload, job.work)(shape, inputs)
            run()
        except Exception as error:  # noqa: BLE001 - a peer that fails is listed with its error
            found[named(shape)] = error_text(error)
            continue
        release()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
        run()
        found[named(shape)] = resident("VmHWM") - start
        del run
        release()
    job.say({"megabytes": found})


def resident(name: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process, in megabytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def release() -> None:
    """Give freed memory back to the system (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


# --- the process -----------------------------------------------------------------------------------------------


def error_text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def private_stdout() -> Callable[[Any], None]:
    """What writes a JSON line to the parent; stdout itself becomes stderr, for libraries that print."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=stream, flush=True)

    return say


TASKS: dict[str, Callable[[Job], None]] = {
    "reference": reference,
    "build": build,
    "compile": compile_artifact,
    "load": load_artifact,
    "serve": serve,
    "floor": serve_floor,
    "embed": embed,
    "memory": memory,
}


def main() -> None:
    order = json.loads(sys.argv[1])
    shapes = [(batch, length) for batch, length in order["shapes"]]
    job = Job(WORKLOADS[order["workload"]], Path(order["work"]), shapes, order["candidate"], private_stdout())
    TASKS[order["task"]](job)


if __name__ == "__main__":
    main()
