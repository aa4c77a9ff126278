"""Measures fxpress beside its peers on the real MiniLM and writes benchmarks/RESULTS.md.

    .venv/bin/python benchmarks/run.py            every candidate, 5 rounds; writes RESULTS.md
    .venv/bin/python benchmarks/run.py --quick    2 short rounds; only prints
    .venv/bin/python benchmarks/run.py --only NAME [--only NAME]    only prints

How it measures: every candidate (candidates.py) runs in a process of its own, on one thread, with the same token ids
of a real text. Preparing is not timed. Then the candidates take turns, A B C A B C: in each round each of them runs
each shape for half a second (at least 3 runs after one that is not counted) and gives the median. The report is the
median of the rounds' medians, and the spread: their largest less their smallest. PyTorch and ONNX models are made
anew for each shape with fixed sizes; fxpress runs one saved artefact with dynamic sizes for all.

The floor, measured in the same turns: matmul operations of the model over the best sgemm rate of ONNX Runtime and
torch at the same number of rows. The error is that of last_hidden_state at tokens that are not padding, against eager
PyTorch in fp64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
from candidates import CANDIDATES, ENVIRONMENT, SHAPES, read_inputs, work_on
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "fxpress")
LOADS = 5  # fresh processes that load the artefact
OURS, TUNES = "fxpress", "torch.compile max-autotune"


class Worker:
    """A process that runs one candidate or task."""

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self._log = work / f"{name}.log"
        caches = {"XDG_CACHE_HOME": f"{work}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor"}  # new in each run
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--worker", name, os.fspath(work)],
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

    def close(self) -> None:
        """Let the process end by itself: there are no more questions."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self) -> str:
        """End the process; its last words if it failed."""
        self.close()
        self._process.wait()
        if self._process.returncode == 0:
            return ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit status {self._process.returncode}: {lines[-1] if lines else ''}"[:200]


@dataclass
class Row:
    """What was found for one candidate at one shape."""

    name: str
    medians: list[float] = field(default_factory=list)
    failure: str | None = None
    max_abs: float = 0.0
    sqnr_db: float = 0.0

    @property
    def ms(self) -> float:
        return statistics.median(self.medians)

    @property
    def spread(self) -> float:
        return max(self.medians) - min(self.medians)


@dataclass
class Results:
    """Rows of each shape, floors and single times."""

    rows: list[list[Row]]
    floors: list[float]  # ms
    compile: dict[str, float] | None = None
    loads: list[dict[str, float]] = field(default_factory=list)


def measure(names: list[str], rounds: int, seconds: float, work: Path, console: Console) -> Results:
    """Prepare everything, then take the candidates in turn."""
    results = Results([[Row(name) for name in names] for _ in SHAPES], [float("inf")] * len(SHAPES))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        step = progress.add_task("")

        def tell(text: str) -> None:
            progress.update(step, description=text)
            if not console.is_terminal:
                console.print(text)

        tell("inputs and fp64 reference")
        single("reference", work)
        if OURS in names:
            tell("fxpress: compile, save, load")
            results.compile = single("compile", work)
            results.loads = [single("load", work) for _ in range(LOADS)]
        started: dict[str, Worker] = {}
        for group in groups([*names, "floor"]):
            tell("prepare: " + " and ".join(group))
            started.update({name: Worker(name, work) for name in group})
            for name in group:
                ready = started[name].hear() or {"errors": [started[name].end() or "the process ended"] * len(SHAPES)}
                for index, error in enumerate(ready["errors"] if name in names else []):
                    row = results.rows[index][names.index(name)]
                    row.failure = error
                    if error is None:
                        row.max_abs, row.sqnr_db = error_of(work, name, index)
        workers = [started[name] for name in (*names, "floor")]
        for turn in range(rounds):
            for index, shape in enumerate(SHAPES):
                tell(f"round {turn + 1} of {rounds}, shape {shape}")
                for place, worker in enumerate(workers):
                    row = results.rows[index][place] if place < len(names) else None
                    if row is not None and row.failure is not None:
                        continue
                    answer = worker.ask([index, seconds])
                    if row is None:
                        results.floors[index] = min(results.floors[index], answer["ms"] if answer else float("inf"))
                    elif answer is None:
                        row.failure = worker.end() or "the process ended"
                    else:
                        row.medians.append(answer["ms"])
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.end()
    return results


def groups(names: list[str]) -> list[list[str]]:
    """Two workers prepare at a time, but the one that tunes itself by measuring does so alone."""
    alone = [name for name in names if name == TUNES]
    rest = [name for name in names if name != TUNES]
    return [[name] for name in alone] + [rest[start : start + 2] for start in range(0, len(rest), 2)]


def single(name: str, work: Path) -> Any:
    """Run a task to its end in a fresh process; what it says."""
    worker = Worker(name, work)
    answer = worker.hear()
    failure = worker.end()
    if failure:
        raise SystemExit(f"{name}: {failure}")
    return answer


def error_of(work: Path, name: str, index: int) -> tuple[float, float]:
    """Largest absolute error and SQNR in dB, at the tokens that are not padding."""
    valid = read_inputs(work, index)["attention_mask"].astype(bool)
    truth = numpy.load(work / f"reference-{index}.npy")[valid]
    error = numpy.load(work / f"{name}-{index}.npy").astype(numpy.float64)[valid] - truth
    return float(abs(error).max()), float(10 * numpy.log10((truth**2).sum() / (error**2).sum()))


# --- the report ------------------------------------------------------------------------------------------------


def report(results: Results, rounds: int, seconds: float) -> str:
    """The results as Markdown."""
    lines = [
        "# Benchmark: all-MiniLM-L6-v2 on one thread",
        "",
        f"Written by `make bench` (benchmarks/run.py) on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. "
        f"{cpu_model()}, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}, "
        + ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
        + ".",
        "",
        f"Every candidate in its own process on one thread, in turn; median of the medians of {rounds} rounds of "
        f"{seconds} s, spread: largest less smallest median. Inputs: token ids of a real text with an attention mask; "
        "at (8, 128) half of the rows are padded in the last third. Peers are compiled or exported anew for each "
        "shape with fixed sizes (max-autotune with freezing; ONNX Runtime: torch.onnx.export(dynamo=True) in the "
        "default opset, as it is and through onnxruntime.transformers' optimizer, and in opset 23); fxpress is "
        "compiled once, with dynamic sizes, saved and loaded. Floor: the model's matmul operations at the best sgemm "
        "rate measured in this run. Error: last_hidden_state at valid tokens against fp64.",
        "",
    ]
    for index, (batch, length) in enumerate(SHAPES):
        rows = results.rows[index]
        ours = next((row.ms for row in rows if row.name == OURS and row.medians and row.failure is None), None)
        lines += [
            f"## batch {batch}, length {length}",
            "",
            "| candidate | ms | spread | times fxpress | floor/ms | max error | SQNR |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            if row.failure is not None:
                lines.append(f"| {row.name} | failed: {row.failure.replace('|', '/')} | | | | | |")
                continue
            ratio = f"{row.ms / ours:.2f}" if ours else "-"
            share = f"{results.floors[index] / row.ms:.0%}"
            lines.append(
                f"| {row.name} | {row.ms:.2f} | {row.spread:.2f} | {ratio} | {share} "
                f"| {row.max_abs:.1e} | {row.sqnr_db:.1f} dB |"
            )
        lines += [f"| *matmul floor* | {results.floors[index]:.2f} | | | | | |", "", verdict(rows), ""]
    if results.compile is not None:
        loads = statistics.median(item["load"] for item in results.loads)
        imports = statistics.median(item["imports"] for item in results.loads)
        torch_free = "without torch" if not any(item["torch"] for item in results.loads) else "torch was imported"
        made = results.compile
        lines += [
            "## Compiling and loading",
            "",
            f"- cold compile, from compile() to ready, fresh process, empty cache: {made['compile']:.1f} s "
            f"(apart: imports and loading the model {made['imports']:.1f} s)",
            f"- load of the artefact, median of {LOADS} fresh processes, {torch_free}: {loads:.2f} s "
            f"(apart: imports {imports:.2f} s)",
            "",
        ]
    return "\n".join(lines)


def verdict(rows: list[Row]) -> str:
    """One line: is fxpress not slower than every peer?"""
    measured = [row for row in rows if row.medians and row.failure is None]
    ours = next((row for row in measured if row.name == OURS), None)
    peers = [row for row in measured if row.name != OURS]
    if ours is None or not peers:
        return "fxpress not slower than every peer: not measured"
    best = min(peers, key=lambda row: row.ms)
    answer = "yes" if ours.ms <= best.ms else "no"
    near = abs(ours.ms - best.ms) <= max(ours.spread, best.spread)
    note = ", a difference within the spread" if near else ""
    return f"fxpress not slower than every peer: **{answer}** (best peer: {best.name}, {best.ms / ours.ms:.2f}x{note})"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown CPU"
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return f"{found.get('model name', '?')} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work_on(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 short rounds; does not write RESULTS.md")
    parser.add_argument("--only", action="append", choices=list(CANDIDATES), metavar="NAME",
                        help="measure this candidate only (again for more): " + ", ".join(CANDIDATES))  # fmt: skip
    options = parser.parse_args()
    console = Console()
    rounds, seconds = (2, 0.1) if options.quick else (5, 0.5)
    with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder:
        results = measure(options.only or list(CANDIDATES), rounds, seconds, Path(folder), console)
    text = report(results, rounds, seconds)
    console.print(Markdown(text))
    if not options.quick and not options.only:
        RESULTS.write_text(text, encoding="utf-8")
        console.print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
