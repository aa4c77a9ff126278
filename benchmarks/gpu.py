"""Measures fxpress's Triton kernels beside PyTorch's best on one GPU and writes benchmarks/RESULTS_GPU.md.

    python benchmarks/gpu.py            all rows, in less than --minutes (8)
    python benchmarks/gpu.py --only attention

It needs torch, triton, transformers and fxpress, nothing else. Times are medians by CUDA events, candidates in turn;
each row has the share of a ceiling measured in the same run: the copy of a large tensor, or the product of two 8192 x
8192 matrices in bfloat16. What time does not suffice for is listed as not measured. Without a GPU the table says so,
unless it has figures of one, which stay.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from gpu_kernels import bench_attention, bench_linears
from gpu_measure import Bench, Row
from gpu_models import bench_models

LATER = 1.03  # times as long as another is slower: what a generated kernel is given when ways are chosen
RESULTS = Path(__file__).with_name("RESULTS_GPU.md")
MEASURED = "Ceilings of this run"  # which a table without figures does not have


def ceilings(bench: Bench, dry: bool) -> tuple[float, float]:
    """TFLOP/s of a large product in bfloat16, and GB/s of a copy, on random data."""
    size = 64 if dry else 8192
    dtype = torch.float32 if dry else torch.bfloat16
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**10 if dry else 2**29, device=bench.device)
    target = torch.empty_like(source)
    for run in (lambda: a @ b, lambda: target.copy_(source)):
        run()
    bench.synchronize()
    product = statistics.median(bench.in_a_row(lambda: a @ b, 100.0) for _ in range(3))
    copy = statistics.median(bench.in_a_row(lambda: target.copy_(source), 100.0) for _ in range(3))
    return 2e-9 * size**3 / product, 2e-6 * source.numel() * 4 / copy


def report(bench: Bench, found: tuple[float, float], seconds: float) -> str:
    """The table as Markdown."""
    import triton

    device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "the interpreter"
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    lines = [
        "# Benchmarks on a GPU", "",
        f"Written by benchmarks/gpu.py on {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s:",
        f"{device}, {versions}.",
        f"{MEASURED}: {found[0]:.0f} TFLOP/s (8192^3, bfloat16), {found[1]:.0f} GB/s (copy, bytes read and",
        "written). Milliseconds are medians; single layers are CUDA graphs and find an empty L2 cache, models are",
        "called one time after the other. `share` is of the ceiling that is nearer, of 8-bit products too in bfloat16;",
        "`speed` is the fastest other candidate's time over fxpress's. `error`: RMSE of fxpress in bfloat16 against",
        "fp32, over that of eager PyTorch. Where fxpress is slower, the last column says why, of models where the time",
        "of both goes.",
    ]  # fmt: skip
    for section in dict.fromkeys(row.section for row in bench.rows):
        head = "| workload | milliseconds | TFLOP/s | GB/s | share | speed | error | notes |"
        lines += ["", f"## {section.capitalize()}", "", head]
        lines.append("|---|---|---:|---:|---:|---:|---:|---|")
        lines += [line(row, found) for row in bench.rows if row.section == section]
    return "\n".join(lines) + "\n"


def line(row: Row, found: tuple[float, float]) -> str:
    """A row of the table."""
    times = ", ".join(f"{name} {value:.3f}" for name, value in row.milliseconds.items())
    notes = [f"{name}: {note}" for name, note in row.notes.items()]
    for name, milliseconds in row.parts.items():
        notes.append(f"{name}: " + ", ".join(f"{part} {value:.3f} ms" for part, value in milliseconds.items()))
    own = row.milliseconds.get("fxpress")
    if row.why and own and own > LATER * min(row.milliseconds.values()):
        notes.append(f"why: {row.why}")
    others = [value for name, value in row.milliseconds.items() if name != "fxpress"]
    cells = ["-"] * 4
    if own:
        tflops, gigabytes = 1e-9 * row.flops / own, 1e-6 * row.bytes / own
        share = max(tflops / found[0], gigabytes / found[1])
        cells = [f"{tflops:.1f}", f"{gigabytes:.0f}" if row.bytes else "-", f"{share:.0%}"]
        cells.append(f"{min(others) / own:.2f}" if others else "-")
    error = "-" if row.error is None else f"{row.error:.2f}"
    return f"| {row.name} | {times} | {' | '.join(cells)} | {error} | {'; '.join(notes)} |"


NO_GPU = """# Benchmarks on a GPU

No GPU was at hand on {date}: nothing was measured, and nothing is claimed of the Triton backend's speed. Its kernels
are tested in Triton's interpreter and compiled ahead of time (docs/triton.md). `python benchmarks/gpu.py` on a machine
with a GPU, torch, triton and transformers writes this file anew, in less than 8 minutes.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"linear": bench_linears, "attention": bench_attention, "models": bench_models}
    parser.add_argument("--only", choices=list(sections), help="one section; RESULTS_GPU.md is not written")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin no candidate later than that")
    parser.add_argument("--into", type=Path, default=RESULTS, help="where to write instead, after each row")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, in the interpreter where there is no GPU")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    gpu = torch.cuda.is_available()
    if not gpu and not given.dry:
        if given.into.exists() and MEASURED in given.into.read_text(encoding="utf-8"):
            print(f"no GPU: {given.into.name} stays as it was measured")
            return
        given.into.write_text(NO_GPU.format(date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"), encoding="utf-8")
        print(f"no GPU: {given.into.name} says so")
        return
    bench = Bench(start + 60 * given.minutes, torch.device("cuda" if gpu else "cpu"))
    torch._inductor.config.autotune_num_choices_displayed = 0  # it would list them all
    found = ceilings(bench, given.dry)

    def write() -> None:
        if not (given.dry or given.only):
            given.into.write_text(report(bench, found, time.monotonic() - start), encoding="utf-8")

    bench.after = write
    for name, run in sections.items():
        if given.only in (None, name):
            run(bench, given.dry)
    write()
    print(report(bench, found, time.monotonic() - start))


if __name__ == "__main__":
    main()
