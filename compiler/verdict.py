"""What the compiler's own check says of a run, and how the report has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ir.equality import Comparison, compare
from .pipeline import Passed
from .report import Report


def judged(
    found: Sequence[Any],
    eager: Sequence[Any],
    judge: Sequence[Any],
    names: Sequence[str],
    passed: Passed,
    whole: bool,
) -> Comparison:
    """`compare` without the outputs that passes gave the shape that they have; unless `whole`, without padding."""
    reshaped = passed.reshaped
    kinds = [list(value.shape) if isinstance(value, Tensor) else None for value in found]
    if not whole:
        found, eager, judge = map(passed.real, (found, eager, judge))
    rows = zip(found, eager, judge, names, kinds, strict=True)
    kept = [row[:4] for row in rows if row[3] not in reshaped or row[4] != reshaped[row[3]][1]]
    if not kept:
        return Comparison()
    return compare(*map(list, zip(*kept, strict=True)))


def record(report: Report, verdict: Comparison) -> None:
    """Write a verdict into the report."""
    report.equal, report.reasons = verdict.equal and not report.reshaped, list(verdict.reasons)
    if verdict.errors or not report.reshaped:
        report.sqnr_db, report.cosine, report.max_abs = verdict.sqnr_db, verdict.cosine, verdict.max_abs
