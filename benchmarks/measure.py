"""Starts the workers of one workload and takes the candidates in turn."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from batches import EVALUATION_SHAPE, load
from candidates import named
from lineup import CANDIDATES
from quality import Closeness, Usefulness, closeness, pooled, usefulness
from workloads import CUTS, EAGER, OURS, PADDED, POINTS, TORCHAO_TUNED, TUNED, Shape, Workload

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LOADS = 5  # fresh processes that load the artefact


@dataclass
class Row:
    """What was found for one candidate at one shape."""

    name: str
    medians: list[float] = field(default_factory=list)
    failure: str | None = None
    max_abs: float = 0.0
    sqnr_db: float = 0.0

    @property
    def measured(self) -> bool:
        return self.failure is None and bool(self.medians)

    @property
    def ms(self) -> float:
        return statistics.median(self.medians)

    @property
    def spread(self) -> float:
        return max(self.medians) - min(self.medians)


@dataclass
class Quality:
    """What was found for one candidate with many inputs: at each shape, and on the texts of the evaluation."""

    shapes: dict[Shape, Closeness] = field(default_factory=dict)
    closeness: Closeness | None = None
    usefulness: Usefulness | None = None
    megabytes: float = 0.0
    failure: str | None = None  # on the texts


@dataclass
class Results:
    """What was found for a workload."""

    rows: dict[Shape, list[Row]]
    floors: dict[Shape, float]  # ms
    notes: list[str] = field(default_factory=list)
    compile: dict[str, float] | None = None
    loads: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, dict[str, float | str]] = field(default_factory=dict)  # by candidate and shape: MB or failure
    quality: dict[str, Quality] = field(default_factory=dict)  # by candidate
    multiplications: dict[str, float] = field(default_factory=dict)  # share left, of those that fxpress compiled


class Worker:
    """A process that does one task of worker.py."""

    def __init__(self, task: str, workload: Workload, work: Path, shapes: Iterable[Shape], candidate: str = "") -> None:
        self._log = work / f"{task}-{candidate}.log"
        caches = {"XDG_CACHE_HOME": f"{work}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor"}  # new in each run
        order = {"task": task, "workload": workload.name, "work": os.fspath(work)}
        order |= {"shapes": list(shapes), "candidate": candidate}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("worker.py"), json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **ENVIRONMENT, **caches},
            )

    def hear(self) -> Any:
        """The next answer; None when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, question: Any) -> Any:
        """An answer to a question; None when the process has ended."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.hear()

    def end(self) -> str:
        """Let the process end, as there are no more questions; its last words if it failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        if self._process.returncode == 0:
            return ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit status {self._process.returncode}: {lines[-1] if lines else ''}"[:200]


@dataclass
class Measurement:
    """One workload at some shapes with some candidates; `tell` hears what happens."""

    workload: Workload
    shapes: list[Shape]
    names: list[str]
    work: Path
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        rows = {shape: [Row(name) for name in self.names] for shape in self.shapes}
        self.results = Results(rows, dict.fromkeys(self.shapes, float("inf")))

    def prepare(self, memory: list[Shape]) -> None:
        """Inputs, reference, exported files (at the shapes where memory is measured too) and fxpress's artefact."""
        self.tell("inputs and fp64 reference")
        self._single("reference")
        shapes = sorted({*self.shapes, *memory, *([EVALUATION_SHAPE] if self.workload.calibration else [])})
        built = [name for name in self.names if CANDIDATES[name].build]
        for pair in groups(built):
            self.tell("build: " + " and ".join(pair))
            for name, answer in self._answers("build", shapes, pair).items():
                self.results.notes += answer.get("notes", [])
                self._note_failures(name, answer["errors"])
        if OURS in self.names:
            self.tell("fxpress: compile, save, load")
            self.results.compile = self._single("compile")
            self.results.loads = [self._single("load") for _ in range(LOADS)]
        for name in self.names:
            file = self.work / CANDIDATES[name].artifact / "report.json"
            if CANDIDATES[name].artifact and file.exists():
                report = json.loads(file.read_text(encoding="utf-8"))
                self.results.multiplications[name] = report["macs_after"] / report["macs_before"]

    def time(self, rounds: int, seconds: float) -> None:
        """Start every candidate, then take them in turn, A B C A B C."""
        workers: dict[str, Worker] = {}
        for group in groups(self.names):
            self.tell("start: " + " and ".join(group))
            workers |= {name: Worker("serve", self.workload, self.work, self.shapes, name) for name in group}
            for name in group:
                answer = workers[name].hear() or self._ended(workers[name], self.shapes)
                self._note_failures(name, answer["errors"])
        self.tell("errors against fp64")
        for shape, rows in self.results.rows.items():
            for row in rows:
                if row.failure is None:
                    row.max_abs, row.sqnr_db = error_of(self.work, row.name, shape)
        floor = Worker("floor", self.workload, self.work, self.shapes)
        floor.hear()
        for turn in range(rounds):
            for shape in self.shapes:
                self.tell(f"round {turn + 1} of {rounds}, shape {named(shape)}")
                for row in self.results.rows[shape]:
                    if row.failure is not None:
                        continue
                    answer = workers[row.name].ask([*shape, seconds])
                    if answer is None:
                        row.failure = workers[row.name].end() or "the process ended"
                    else:
                        row.medians.append(answer["ms"])
                answer = floor.ask([*shape, seconds])
                if answer is None:
                    raise SystemExit(f"floor: {floor.end()}")
                self.results.floors[shape] = min(self.results.floors[shape], answer["ms"])
        for worker in (*workers.values(), floor):
            worker.end()

    def measure_memory(self, shapes: list[Shape]) -> None:
        """The growth of each candidate's memory, one process after the other."""
        for name in self.names:
            self.tell(f"memory: {name}")
            worker = Worker("memory", self.workload, self.work, shapes, name)
            answer = worker.hear()
            failure = worker.end()
            found = answer["megabytes"] if answer else dict.fromkeys(map(named, shapes), failure)
            self.results.memory[name] = found

    def measure_quality(self) -> None:
        """How far each candidate is from eager fp32 on many inputs, and how large its files are."""
        failures = {name: self._failure_everywhere(name) for name in self.names}
        self.results.quality = {name: Quality(failure=failure) for name, failure in failures.items()}
        for group in [[EAGER], *groups([name for name in self.names if name != EAGER and not failures[name]])]:
            self.tell("quality: " + " and ".join(group))
            for name, answer in self._answers("embed", self.shapes, group).items():
                self.results.quality[name] = self._quality(name, answer["errors"])

    def _failure_everywhere(self, name: str) -> str | None:
        """Why a candidate ran at no shape; None if it did."""
        failures = [rows[self.names.index(name)].failure for rows in self.results.rows.values()]
        return failures[0] if all(failures) else None

    def _quality(self, name: str, errors: dict[str, str | None]) -> Quality:
        found = Quality(failure=errors.get("evaluation", next(iter(errors.values()))))
        parts: dict[str, Shape | None] = {f"samples-{named(shape)}": shape for shape in self.shapes}
        for part, shape in {**parts, "evaluation": None}.items():
            file = self.work / f"{name}-{part}.npy"
            if not file.exists():
                continue
            states, truth = numpy.load(file), numpy.load(self.work / f"{EAGER}-{part}.npy")
            mask = numpy.concatenate([batch["attention_mask"] for batch in load(self.work / f"{part}.npz")])
            near = closeness(states, truth, mask)
            if shape is not None:
                found.shapes[shape] = near
            else:
                found.closeness, found.usefulness = near, usefulness(pooled(states, mask), pooled(truth, mask))
                found.megabytes = sum(path.stat().st_size for path in CANDIDATES[name].files(self.work)) / 1e6
            if name != EAGER:
                file.unlink()
        return found

    def _single(self, task: str) -> Any:
        """What a task says that must not fail."""
        worker = Worker(task, self.workload, self.work, self.shapes)
        answer = worker.hear()
        failure = worker.end()
        if failure:
            raise SystemExit(f"{self.workload.name}, {task}: {failure}")
        return answer

    def _answers(self, task: str, shapes: list[Shape], names: list[str]) -> dict[str, Any]:
        """What the task says for each of the candidates, at the same time."""
        workers = {name: Worker(task, self.workload, self.work, shapes, name) for name in names}
        answers = {name: worker.hear() or self._ended(worker, shapes) for name, worker in workers.items()}
        for worker in workers.values():
            worker.end()
        return answers

    def _ended(self, worker: Worker, shapes: list[Shape]) -> Any:
        return {"errors": dict.fromkeys(map(named, shapes), worker.end() or "the process ended")}

    def _note_failures(self, name: str, errors: dict[str, str | None]) -> None:
        """Keep the first failure of a candidate at each shape: later ones follow from it."""
        for shape in self.shapes:
            row = self.results.rows[shape][self.names.index(name)]
            row.failure = row.failure or errors[named(shape)]


def pairs(names: list[str]) -> list[list[str]]:
    return [names[start : start + 2] for start in range(0, len(names), 2)]


def groups(names: list[str]) -> list[list[str]]:
    """Two workers prepare at a time, but those that tune themselves by measuring do so alone."""
    alone = {TUNED, TORCHAO_TUNED, *POINTS, *CUTS, *PADDED}
    return [[name] for name in names if name in alone] + pairs([name for name in names if name not in alone])


def error_of(work: Path, name: str, shape: Shape) -> tuple[float, float]:
    """Largest absolute error and SQNR in dB, at the tokens that are not padding."""
    with numpy.load(work / f"inputs-{named(shape)}.npz") as inputs:
        valid = inputs["attention_mask"].astype(bool) if "attention_mask" in inputs else numpy.ones(shape, bool)
    truth = numpy.load(work / f"reference-{named(shape)}.npy")[valid]
    error = numpy.load(work / f"{name}-{named(shape)}.npy").astype(numpy.float64)[valid] - truth
    return float(abs(error).max()), float(10 * numpy.log10((truth**2).sum() / (error**2).sum()))
