"""The section of a workload with less of heads and neurons: speed over the dense model, quality, the targets."""

from __future__ import annotations

from collections.abc import Iterator

from batches import EVALUATION_SHAPE
from measure import Results, Row
from report import cell, opening, row_of
from report_quality import quality_table
from targets import Target, loss, speed, target_table
from workloads import CUT50, CUT70, OURS, Shape, Workload

CUT = """Heads, or dimensions inside all heads, and neurons are cut out of the weights (benchmarks/points.py), so that
fewer numbers are multiplied without a sparse kernel. Multiplications: what is left of those in matmuls and attention,
as the report of the compiled model counts them at fxpress's example.
"""
CORPUS = f"""Calibrated on {{calibration}} texts; what stays is fitted to them, and nothing is trained. Cosines are with
eager fp32: of the states of tokens that are not padding, and of mean-pooled embeddings; mean and smallest. Texts are
docstrings and functions of Python's standard library (benchmarks/corpus.py), none in two parts; the evaluation's are
cut to {EVALUATION_SHAPE[1]} tokens.
"""
SPEEDS = {CUT70: (0.7, 1.3), CUT50: (0.5, 1.75)}  # share of the multiplications, times as fast
SPEARMAN = {CUT70: 0.02}  # loss


def pruned_section(workload: Workload, results: Results, settings: str) -> str:
    """The section, without its heading."""
    lines = [*opening(workload, settings), CUT]
    if results.quality:
        lines.append(CORPUS.format(calibration=workload.calibration))
    for shape, rows in results.rows.items():
        lines += speed_table(shape, rows, results)
    if results.quality:
        lines += quality_table(results)
    lines += target_table(targets(results), f"Speed is over {OURS}, dense, at each shape.")
    lines += [f"- {note}" for note in sorted(set(results.notes))]
    return "\n".join(lines)


def speed_table(shape: Shape, rows: list[Row], results: Results) -> list[str]:
    """Time of each candidate at one shape, beside what it multiplies."""
    dense = row_of(rows, OURS)
    lines = [
        f"### batch {shape[0]}, length {shape[1]}",
        "",
        f"| candidate | ms | spread | times {OURS} dense | multiplications |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row.measured:
            lines.append(f"| {row.name} | failed: {cell(row.failure or 'not run')} | | | |")
            continue
        times = f"{dense.ms / row.ms:.2f}" if dense else "-"
        share = results.multiplications.get(row.name)
        left = "-" if share is None else f"{share:.1%}"
        lines.append(f"| {row.name} | {row.ms:.2f} | {row.spread:.2f} | {times} | {left} |")
    return [*lines, f"| *matmul floor of the dense model* | {results.floors[shape]:.2f} | | | |", ""]


def targets(results: Results) -> Iterator[Target]:
    """Every target, in the order of the points."""
    for point, (share, times) in SPEEDS.items():
        yield multiplications(results, point, share)
        yield speed(results, point, times, (OURS,), f"at least {times}x the speed of {OURS} dense")
        if point in SPEARMAN and results.quality:
            yield loss(results, point, "Spearman of pairwise similarities", "spearman", SPEARMAN[point])


def multiplications(results: Results, point: str, most: float) -> Target:
    """The point is what its name says, in whole per cent."""
    wish = f"at most {most:.0%} of the multiplications"
    share = results.multiplications.get(point)
    if share is None:
        return Target(point, wish, "", None)
    return Target(point, wish, f"{share:.1%}", round(share, 2) <= most)
