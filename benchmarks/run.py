"""Measures fxpress beside its peers on several workloads and writes benchmarks/RESULTS.md.

    .venv/bin/python benchmarks/run.py                    every workload and candidate, 5 rounds
    .venv/bin/python benchmarks/run.py --only minilm      one workload; rewrites its section alone
    .venv/bin/python benchmarks/run.py --only minilm --only fxpress --shapes 1x128 --quick      only prints

RESULTS.md is written when a workload was measured whole: all of its candidates and shapes, not --quick.

How it measures (measure.py, worker.py): every candidate (candidates.py) runs in a process of its own, on one thread,
with the same inputs (workloads.py). Preparing is not timed. Then the candidates take turns, A B C A B C: in each round
each of them runs each shape for half a second, after a run that is not counted, or once if that takes longer than a
second, and gives the median. The report (report.py) is the median of the rounds' medians, and the spread: their
largest less their smallest. The matmul floor (floor.py) is measured in the same turns.

A workload in fewer bits (minilm-int8: peers_int8.py, our points.py) is also judged by what its embeddings are good for
(corpus.py, batches.py, quality.py), against targets (targets_int8.py), in a section and a plot of its own
(report_int8.py, plot_int8.py). It needs: pip install 'fxpress[bench]'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from candidates import named
from lineup import CANDIDATES
from measure import Measurement
from plot_int8 import plot
from report import section, summary_rows, update
from report_int8 import PLOT, quantized_section
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from workloads import WORKLOADS

RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 short rounds; does not write RESULTS.md")
    parser.add_argument("--only", action="append", choices=[*WORKLOADS, *CANDIDATES], metavar="NAME", default=[],
                        help="only this workload or candidate (again for more): "
                        + ", ".join([*WORKLOADS, *CANDIDATES]))  # fmt: skip
    parser.add_argument("--shapes", nargs="+", metavar="BxL", default=[], help="only these shapes, such as 1x128")
    options = parser.parse_args()
    workloads = [WORKLOADS[name] for name in WORKLOADS if name in options.only] or list(WORKLOADS.values())
    wanted = [name for name in CANDIDATES if name in options.only] or list(CANDIDATES)
    rounds, seconds = (2, 0.1) if options.quick else (5, 0.5)
    console = Console()
    for workload in workloads:
        names = [name for name in workload.candidates if name in wanted]
        shapes = [shape for shape in workload.shapes if not options.shapes or named(shape) in options.shapes]
        if not names or not shapes:
            continue
        whole = len(names) == len(workload.candidates) and len(shapes) == len(workload.shapes) and not options.quick
        memory = list(workload.memory) if not options.shapes else [s for s in workload.memory if s in shapes]
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with (
            tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder,
            Progress(*columns, console=console, transient=True) as progress,
        ):
            step = progress.add_task("")

            def tell(text: str, progress: Progress = progress, step: object = step, name: str = workload.name) -> None:
                progress.update(step, description=f"{name}: {text}")  # type: ignore[arg-type]
                if not console.is_terminal:
                    console.print(f"{name}: {text}")

            measurement = Measurement(workload, shapes, names, Path(folder), tell)
            measurement.prepare(memory)
            measurement.time(rounds, seconds)
            if memory:
                measurement.measure_memory(memory)
            if workload.quantized:
                measurement.measure_quality()
        old = RESULTS.read_text(encoding="utf-8") if whole and RESULTS.exists() else ""
        results, settings = measurement.results, f"{rounds} rounds of {seconds} s"
        if workload.quantized:
            text = update(old, workload.name, quantized_section(workload, results, settings), [])
        else:
            text = update(old, workload.name, section(workload, results, settings), summary_rows(workload, results))
        console.print(Markdown(text))
        if whole:
            RESULTS.write_text(text, encoding="utf-8")
            if workload.quantized:
                try:
                    plot(results, RESULTS.with_name(PLOT))
                except ImportError:
                    console.print("no plot without matplotlib: pip install 'fxpress[bench]'")
            console.print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
