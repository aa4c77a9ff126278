"""Measures fxpress beside its peers on several workloads and writes benchmarks/RESULTS.md.

    .venv/bin/python benchmarks/run.py                    every workload and candidate, 5 rounds
    .venv/bin/python benchmarks/run.py --only minilm      one workload; rewrites its section alone
    .venv/bin/python benchmarks/run.py --only minilm --only fxpress --shapes 1x128 --quick      only prints
    .venv/bin/python benchmarks/run.py --only sparsity    a section that is no workload (attention-scaling, ...)
    .venv/bin/python benchmarks/run.py --into xeon        another processor's RESULTS.md, and plots, in benchmarks/xeon

RESULTS.md is written when a workload was measured whole: all of its candidates and shapes, not --quick.

How it measures (measure.py, worker.py): every candidate (candidates.py) runs in a process of its own, on one thread,
with the same inputs (workloads.py). Preparing is not timed. Then the candidates take turns, A B C A B C: in each round
each of them runs each shape for half a second, after a run that is not counted, or once if that takes longer than a
second, and gives the median. The report (report.py) is the median of the rounds' medians, and the spread: their
largest less their smallest. The matmul floor (floor.py) is measured in the same turns.

A workload in fewer bits (minilm-int8: peers_int8.py, our points.py) is also judged by what its embeddings are good for
(corpus.py, batches.py, quality.py), against targets (targets_int8.py), in a section and a plot of its own
(report_int8.py, plot_int8.py). It needs: pip install 'fxpress[bench]'.

A workload with fewer heads and neurons (minilm-pruned, bert-pruned) has points of points.py too, and a section of its
own (report_pruned.py). "sparsity" is a table of what single zeros do, by method, without any timing (sparsity.py).

"attention-scaling" measures time and memory of each kind of attention by length, with a plot (attention_scaling.py,
attention_worker.py, report_scaling.py, plot_attention.py); "attention-quality" what the kinds do to trained models,
without any timing (attention_quality.py). "torch-compile" is MiniLM through torch.compile (through_dynamo.py),
"generation" the writing of tokens by decoders with their cache (generation.py).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from candidates import named
from lineup import CANDIDATES
from measure import Measurement
from plot_int8 import plot
from report import section, summary_rows, update
from report_int8 import PLOT, quantized_section
from report_pruned import pruned_section
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from workloads import GENERATION, OTHERS, REPLACED, SCALING, SPARSITY, THROUGH, TRANSLATION, WORKLOADS, Shape, Workload

HERE = Path(__file__).parent
SECTIONS = {"exact": section, "quantized": quantized_section, "pruned": pruned_section}
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 short rounds; does not write RESULTS.md")
    names = [*WORKLOADS, *OTHERS, *CANDIDATES]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", default=[],
                        help="only this workload or candidate (again for more): "
                        + ", ".join(names).replace("%", "%%"))  # fmt: skip
    parser.add_argument("--shapes", nargs="+", metavar="BxL", default=[], help="only these shapes, such as 1x128")
    parser.add_argument("--into", type=Path, metavar="FOLDER", default=Path(),
                        help="of the results, within benchmarks/: a processor of its own")  # fmt: skip
    options = parser.parse_args()
    folder = HERE / options.into
    candidates = [name for name in CANDIDATES if name in options.only]
    every = list(WORKLOADS) if candidates or options.shapes else [*WORKLOADS, *OTHERS]
    measures = {
        SPARSITY: measure_sparsity, SCALING: measure_scaling, REPLACED: measure_replaced, THROUGH: measure_through,
        GENERATION: partial(measure_generation, name=GENERATION),
        TRANSLATION: partial(measure_generation, name=TRANSLATION),
    }  # fmt: skip
    for name in [name for name in (*WORKLOADS, *OTHERS) if name in options.only] or every:
        if name in measures:
            measures[name](folder, options.quick)
            continue
        workload = WORKLOADS[name]
        wanted = [name for name in workload.candidates if name in (candidates or CANDIDATES)]
        shapes = [shape for shape in workload.shapes if not options.shapes or named(shape) in options.shapes]
        if wanted and shapes:
            measure(folder, workload, wanted, shapes, options.quick)


def measure(into: Path, workload: Workload, names: list[str], shapes: list[Shape], quick: bool) -> None:
    """Measure a workload and print its section; write it, and the plot, if it was measured whole."""
    rounds, seconds = (2, 0.1) if quick else (5, 0.5)
    whole = len(names) == len(workload.candidates) and len(shapes) == len(workload.shapes) and not quick
    memory = [shape for shape in workload.memory if shape in shapes or len(shapes) == len(workload.shapes)]
    with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder, progress(workload.name) as tell:
        measurement = Measurement(workload, shapes, names, Path(folder), tell)
        measurement.prepare(memory)
        measurement.time(rounds, seconds)
        if memory:
            measurement.measure_memory(memory)
        if workload.calibration:
            measurement.measure_quality()
    results = measurement.results
    text = SECTIONS[workload.kind](workload, results, f"{rounds} rounds of {seconds} s")
    publish(into, workload.name, text, summary_rows(workload, results) if workload.kind == "exact" else [], whole)
    if whole and workload.kind == "quantized":
        draw(lambda: plot(results, into / PLOT))


def measure_sparsity(into: Path, quick: bool) -> None:
    """Judge every setting of sparsity.py and print the section; write it if it was judged whole."""
    import sparsity

    cases = sparsity.cases(quick)  # training shows a progress of its own
    with progress(SPARSITY) as tell:
        found = {case.name: (case, sparsity.measure(case, tell)) for case in cases}
    publish(into, SPARSITY, sparsity.section(found), [], whole=not quick)


def measure_scaling(into: Path, quick: bool) -> None:
    """Every kind of attention at every length, and the plot."""
    import attention_scaling
    import plot_attention
    import report_scaling

    with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder, progress(SCALING) as tell:
        found = attention_scaling.measure(tell, Path(folder), quick)
    publish(into, SCALING, report_scaling.section(found), [], whole=not quick)
    if not quick:
        draw(lambda: plot_attention.plot(found, into / report_scaling.PLOT))


def measure_replaced(into: Path, quick: bool) -> None:
    """Judge every kind of attention and print the section; write it if it was judged whole."""
    import attention_quality

    tasks = attention_quality.tasks(quick)  # training shows a progress of its own
    with progress(REPLACED) as tell:
        found = [(task, attention_quality.measure(task, tell)) for task in tasks]
    publish(into, REPLACED, attention_quality.section(found), [], whole=not quick)


def measure_through(into: Path, quick: bool) -> None:
    """MiniLM through torch.compile's backends, and the first calls of processes."""
    import through_dynamo

    with progress(THROUGH) as tell:
        found = through_dynamo.measure(tell, quick)
    publish(into, THROUGH, through_dynamo.section(found), [], whole=not quick)


def measure_generation(into: Path, quick: bool, name: str) -> None:
    """Models with their cache, in 32, 8 and 4 bits."""
    import generation

    with progress(name) as tell:
        found = generation.measure(tell, quick, name)
    publish(into, name, "" if quick else generation.section(found, name), [], whole=not quick)
    if quick:
        CONSOLE.print(found)


@contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """What shows, or where nobody watches prints, what happens."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE, transient=True) as shown:
        step = shown.add_task("")

        def tell(text: str) -> None:
            shown.update(step, description=f"{name}: {text}")
            if not CONSOLE.is_terminal:
                CONSOLE.print(f"{name}: {text}")

        yield tell


def publish(into: Path, name: str, body: str, summary: list[str], whole: bool) -> None:
    """Print a section, and put it into the file if it is whole."""
    file = into / "RESULTS.md"
    old = file.read_text(encoding="utf-8") if whole and file.exists() else ""
    text = update(old, name, body, summary)
    CONSOLE.print(Markdown(text))
    if whole:
        into.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        CONSOLE.print(f"written: {file}")


def draw(write: Callable[[], None]) -> None:
    """A plot, if there is what draws it."""
    try:
        write()
    except ImportError:
        CONSOLE.print("no plot without matplotlib: pip install 'fxpress[bench]'")


if __name__ == "__main__":
    main()
