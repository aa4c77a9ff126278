"""The report of a compilation: what each pass did, refused and cost; size, error, time; as a table and plain data."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table


@dataclass
class PassReport:
    """One pass: rewrites by rule, where rules matched or refused, the seconds it took, the error that it introduced."""

    name: str
    changes: int
    rewrites: dict[str, int]
    refusals: list[dict[str, str]]  # rule, node, reason
    seconds: float
    sqnr_db: float | None  # of the program's outputs against those before the pass; None: not measured
    matches: list[dict[str, str]] = field(default_factory=list)  # rule, node, detail


@dataclass
class Report:
    """What was compiled and how far it is from the model. Seconds, bytes, dB."""

    model: str
    backend: str
    passes: list[PassReport] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)  # lowerings: operator, sizes, chosen, milliseconds
    bytes_before: int = 0  # of the model's weights
    bytes_after: int = 0  # of the product: the files for ONNX, the weights for eager
    equal: bool | None = None  # to eager PyTorch, in the sense of docs/design.md; None: not checked
    reasons: list[str] = field(default_factory=list)  # why not equal
    sqnr_db: float | None = None  # against the model in fp64, the worst output
    cosine: float | None = None
    max_abs: float | None = None
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # sizes the program is valid for
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage

    def as_dict(self) -> dict[str, Any]:
        """Plain data; infinities become None, as JSON has none."""
        return _plain(asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `as_dict`."""
        passes = [PassReport(**item) for item in data["passes"]]
        ranges = {name: (low, high) for name, (low, high) in data["ranges"].items()}
        return cls(**{**data, "passes": passes, "ranges": ranges})

    def __rich__(self) -> Group:
        passes = Table(title=f"{self.model} on {self.backend}", title_justify="left")
        for column in ("pass", "rewrites", "refused", "error introduced", "seconds"):
            passes.add_column(column, justify="left" if column in ("pass", "rewrites") else "right")
        for item in self.passes:
            rewrites = ", ".join(f"{count} {rule}" for rule, count in item.rewrites.items()) or "-"
            error = "-" if item.sqnr_db is None else decibels(item.sqnr_db)
            passes.add_row(item.name, rewrites, str(len(item.refusals)), error, f"{item.seconds:.2f}")
        parts: list[Any] = [passes]
        if self.choices:
            choices = Table(title="lowerings, by measured time (ms at the example's sizes)", title_justify="left")
            for column in ("operator", "nodes", "chosen", "candidates"):
                choices.add_column(column, justify="right" if column == "nodes" else "left")
            for choice in self.choices:
                times = ", ".join(f"{name} {ms:.3f}" for name, ms in choice["milliseconds"].items()) or "-"
                choices.add_row(choice["operator"], str(choice["nodes"]), choice["chosen"], times)
            parts.append(choices)
        parts.append(self.summary())
        return Group(*parts)

    def summary(self) -> str:
        """Size, error and time in three lines."""
        lines = [f"size: {self.bytes_before / 1e6:.1f} MB of weights -> {self.bytes_after / 1e6:.1f} MB"]
        if self.equal is None:
            lines.append("error: not measured")
        else:
            verdict = "equal to eager PyTorch" if self.equal else "NOT equal to eager PyTorch"
            assert self.max_abs is not None and self.cosine is not None
            lines.append(f"error against fp64: {decibels(self.sqnr_db)}, max {self.max_abs:.2g} ({verdict})")
            lines += [f"  {reason}" for reason in self.reasons]
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        lines.append(f"compile time: {sum(self.seconds.values()):.1f} s ({stages})")
        return "\n".join(lines)

    def __str__(self) -> str:
        return render(self)


def explain(report: PassReport) -> Group:
    """What a pass matched, and each refusal or near miss with its reason."""
    rewrites = ", ".join(f"{count} {rule}" for rule, count in report.rewrites.items()) or "none"
    parts: list[Any] = [f"{report.name}: rewrites: {rewrites}"]
    for title, entries, last in (("matched", report.matches, "detail"), ("not rewritten", report.refusals, "reason")):
        table = Table(title=title, title_justify="left")
        for column in ("rule", "node", last):
            table.add_column(column, overflow="fold")
        for entry in entries:
            table.add_row(*(escape(entry[column]) for column in ("rule", "node", last)))
        parts += [table] if entries else []
    return Group(*parts)


def decibels(value: float | None) -> str:
    """An SQNR as text; an infinite one is no error at all."""
    return "no error" if value is None or math.isinf(value) else f"{value:.1f} dB"


def render(item: Any, width: int = 110) -> str:
    """A rich table (or group of them) as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(item)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
