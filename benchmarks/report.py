"""Writes what was measured as Markdown: a section for each workload, and one table that sums them up."""

from __future__ import annotations

import os
import re
import statistics
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from measure import LOADS, Results, Row
from workloads import ALL, FIXED, ONNX, ONNX_23, OTHERS, OURS, WORKLOADS, Shape, Target, Workload

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "fxpress")
INTRODUCTION = """# Benchmarks on one thread

Written by `make bench` (benchmarks/run.py), each section on its own date. Every candidate runs in its own process on
one thread, in turn; ms is the median of the rounds' medians, spread their largest less their smallest. Peers are
compiled or exported anew for each shape with fixed sizes; fxpress is compiled once, with dynamic sizes, from one small
example, saved and loaded.

- fxpress, fixed sizes, OpenVINO: one artefact too, of the openvino backend, loaded for each shape's sizes.
- torch.compile: dynamic=False; max-autotune with freezing.
- ONNX Runtime: torch.onnx.export(dynamo=True), in the default opset and in opset 23.
- ONNX Runtime + optimizer: onnxruntime.transformers.optimizer as it fuses most, on what the older exporter
  (dynamo=False, opset 17) makes of eager attention, with opt_level=0; what it fused is listed.
- OpenVINO: on the default export, for latency; in float32, unless bfloat16 is said.
- Matmul floor: the model's matmul operations, attention included, at the best sgemm rate measured in the same run.
- Error: last_hidden_state at tokens that are not padding, against eager PyTorch in fp64.
- In fewer bits (minilm-int8), with fewer heads and neurons (minilm-pruned, bert-pruned), with zeros among the weights
  (sparsity, which is not timed), and with other kinds of attention (attention-scaling, and attention-quality, which is
  not timed): what is compared, and on which texts, stands in that section.
"""
SUMMARY = """## Summary

The faster of fxpress for any size and, where measured, at fixed sizes in OpenVINO (marked "fixed"). Best peer and ONNX
Runtime (the better of its two plain exports): their time over fxpress's. Besides its targets, fxpress is to be faster
than every peer.

| workload | batch, length | fxpress ms | best peer | ONNX Runtime | share of floor | targets | met | measured |
|---|---|---:|---|---:|---:|---|---|---|
"""


# --- the file --------------------------------------------------------------------------------------------------


def update(old: str, name: str, body: str, lines: list[str]) -> str:
    """The file with the section and the summary's lines of one workload replaced; the others stay as they are."""
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", old, re.MULTILINE | re.DOTALL))
    rows = {name: re.findall(rf"^\| {name} \|.*\n", sections.get("Summary", ""), re.MULTILINE) for name in WORKLOADS}
    sections[name], rows[name] = body, lines
    summary = SUMMARY + "".join(row for name in WORKLOADS for row in rows[name])
    parts = [f"## {name}\n{sections[name]}".strip() for name in (*WORKLOADS, *OTHERS) if name in sections]
    return "\n".join([INTRODUCTION, summary, "\n\n".join(parts)]) + "\n"


def summary_rows(workload: Workload, results: Results) -> list[str]:
    """A line of the summary for each shape."""
    lines: list[str] = []
    for shape, rows in results.rows.items():
        start = f"| {workload.name} | {shape[0]}, {shape[1]} |"
        ours = ours_of(rows)
        peers = peers_of(rows)
        if ours is None or not peers:
            lines.append(f"{start} not measured | | | | | | {datetime.now(UTC):%Y-%m-%d} |\n")
            continue
        best = min(peers, key=lambda row: row.ms)
        exports = [row.ms / ours.ms for row in peers if row.name in (ONNX, ONNX_23)]
        share = results.floors[shape] / ours.ms
        target = workload.targets.get(shape, Target())
        failures = missed(target, ours, best, share, min(exports, default=0.0))
        lines.append(
            f"{start} {ours.ms:.2f}{', fixed' if ours.name == FIXED else ''} | {best.name}, {best.ms / ours.ms:.2f} "
            f"| {f'{min(exports):.2f}' if exports else '-'} | {share:.0%} | {wanted(target)} "
            f"| {'no: ' + ', '.join(failures) if failures else 'yes'} | {datetime.now(UTC):%Y-%m-%d} |\n"
        )
    return lines


def wanted(target: Target) -> str:
    """The target as text."""
    parts = [f"{target.over_onnx:.2f} over ONNX Runtime"] if target.over_onnx else []
    parts += [f"{target.floor_share:.0%} of floor"] if target.floor_share else []
    return ", ".join(parts) or "-"


def missed(target: Target, ours: Row, best: Row, share: float, over_onnx: float) -> list[str]:
    """What is not reached."""
    failures = {
        "not faster than every peer": ours.ms >= best.ms,
        "over ONNX Runtime": over_onnx < target.over_onnx,
        "share of floor": share < target.floor_share,
    }
    return [name for name, failed in failures.items() if failed]


# --- a section -------------------------------------------------------------------------------------------------


def section(workload: Workload, results: Results, settings: str) -> str:
    """The section of a workload, without its heading."""
    lines = opening(workload, settings)
    for shape in results.rows:
        lines += table(shape, results)
    lines += [f"- {note}" for note in sorted(set(results.notes))] + ([""] if results.notes else [])
    if results.memory:
        lines += memory_table(results)
    if results.compile is not None:
        lines += compile_lines(results.compile, results.loads)
    return "\n".join(lines)


def opening(workload: Workload, settings: str) -> list[str]:
    """What was measured, when, how and with what."""
    return [
        "",
        f"{workload.title[0].upper()}{workload.title[1:]}. fxpress's example: batch {workload.example[0]}, length "
        f"{workload.example[1]}.",
        "",
        environment(settings, workload.packages),
        "",
    ]


def environment(settings: str, packages: tuple[str, ...] = ()) -> str:
    """When, how and with what, in a line."""
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {settings}. {cpu_model()}, {os.cpu_count()} CPUs, "
        f"Python {sys.version.split()[0]}, "
        + ", ".join(f"{name} {installed(name)}" for name in (*PACKAGES, *packages))
        + "."
    )


def table(shape: Shape, results: Results) -> list[str]:
    """The candidates at one shape, and a verdict."""
    rows, floor = results.rows[shape], results.floors[shape]
    ours = row_of(rows, OURS)
    lines = [
        f"### batch {shape[0]}, length {shape[1]}",
        "",
        "| candidate | ms | spread | times fxpress | floor/ms | max error | SQNR |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row.measured:
            lines.append(f"| {row.name} | failed: {cell(row.failure or 'not run')} | | | | | |")
            continue
        ratio = f"{row.ms / ours.ms:.2f}" if ours else "-"
        lines.append(
            f"| {row.name} | {row.ms:.2f} | {row.spread:.2f} | {ratio} | {floor / row.ms:.0%} "
            f"| {row.max_abs:.1e} | {row.sqnr_db:.1f} dB |"
        )
    return [*lines, f"| *matmul floor* | {floor:.2f} | | | | | |", "", verdict(rows), ""]


def peers_of(rows: list[Row]) -> list[Row]:
    """Others' candidates in float32."""
    return [row for row in rows if row.measured and row.name in ALL and row.name != OURS]


def ours_of(rows: list[Row]) -> Row | None:
    """The faster of ours in float32: for any size, and at fixed sizes, which all peers have."""
    found = [row for name in (OURS, FIXED) if (row := row_of(rows, name)) is not None]
    return min(found, key=lambda row: row.ms, default=None)


def verdict(rows: list[Row]) -> str:
    """One line: is fxpress faster than every peer?"""
    ours = ours_of(rows)
    peers = peers_of(rows)
    if ours is None or not peers:
        return "fxpress faster than every peer: not measured"
    best = min(peers, key=lambda row: row.ms)
    answer = "yes" if ours.ms < best.ms else "no"
    near = abs(ours.ms - best.ms) <= max(ours.spread, best.spread)
    note = ", a difference within the spread" if near else ""
    name = "fxpress at fixed sizes" if ours.name == FIXED else "fxpress"
    return f"{name} faster than every peer: **{answer}** (best peer: {best.name}, {best.ms / ours.ms:.2f}x{note})"


def memory_table(results: Results) -> list[str]:
    """How much memory each candidate takes at each length."""
    columns = list(next(iter(results.memory.values())))
    lines = [
        "### Memory",
        "",
        "MB by which the peak of resident memory during a run exceeds what was resident before the model was loaded "
        "(weights and buffers included, libraries not), by batch x length.",
        "",
        f"| candidate | {' | '.join(columns)} | last/first |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for name, found in results.memory.items():
        cells = [f"{found[key]:.0f}" if isinstance(found[key], float) else cell(str(found[key])) for key in columns]
        first, last = found[columns[0]], found[columns[-1]]
        growth = f"{last / first:.1f}" if isinstance(first, float) and isinstance(last, float) else "-"
        lines.append(f"| {name} | {' | '.join([*cells, growth])} |")
    return [*lines, ""]


def compile_lines(made: dict[str, float], loads: list[dict[str, float]]) -> list[str]:
    """Times of compiling and loading."""
    load, imports = (statistics.median(item[key] for item in loads) for key in ("load", "imports"))
    torch_free = "without torch" if not any(item["torch"] for item in loads) else "torch was imported"
    return [
        "### Compiling and loading",
        "",
        f"- cold compile, from compile() to ready, fresh process, empty cache: {made['compile']:.1f} s "
        f"(apart: imports and loading the model {made['imports']:.1f} s)",
        f"- load of the artefact, median of {LOADS} fresh processes, {torch_free}: {load:.2f} s "
        f"(apart: imports {imports:.2f} s)",
        "",
    ]


def row_of(rows: list[Row], name: str) -> Row | None:
    """The candidate's row, if it was measured."""
    return next((row for row in rows if row.name == name and row.measured), None)


def cell(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "/").replace("\n", " ")


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
