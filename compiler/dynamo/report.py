"""What `fxpress.reports()` lists: every graph that torch.compile gave to fxpress in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..report import PassReport, render


@dataclass
class GraphReport:
    """One graph: where it came from, who runs it and why, what was rewritten, what happened since.

    Attributes:
        graph: dynamo's number of it, "frame/recompilation"; more graphs of one frame (graph breaks) have it too.
        source: the first line of the user's code in it.
        inputs: its tensors that are no weights, and its sizes.
        training: whether gradients flow through it.
        runner: "onnx", "eager" (our rewritten graph in PyTorch), "pytorch" (the graph as it was) or "inductor".
        reason: why it is not (or, after a measurement, why it is) another; empty where that was asked for.
        recompiled: what made dynamo compile this frame once more; empty for its first graph.
        passes: what each pass rewrote and refused.
        cache: "", "stored", or "loaded" from the disk.
        seconds: of each stage of the compilation.
        milliseconds: measured, by runner.
        precision: with the option dtype, that and the SQNR and cosine of the worst output with the graph in its own.
        sqnr_db: against the graph in fp64, the worst output; None: not measured.
        calls, weight_changes: how often it ran; how often a weight was found changed.
        notes: what happened to it since, in order.
    """

    graph: str
    source: str
    operators: int
    weights: int
    inputs: list[str] = field(default_factory=list)
    training: bool = False
    runner: str = "pytorch"
    reason: str = ""
    recompiled: str = ""
    passes: list[PassReport] = field(default_factory=list)
    cache: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    multiplications: int | None = None
    precision: dict[str, Any] = field(default_factory=dict)
    sqnr_db: float | None = None
    calls: int = 0
    weight_changes: int = 0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def rewrites(self) -> dict[str, int]:
        """How often each rule rewrote."""
        found: dict[str, int] = {}
        for item in self.passes:
            for rule, count in item.rewrites.items():
                found[rule] = found.get(rule, 0) + count
        return found

    def note(self, text: str) -> None:
        """Remember what happened, a thing that happens again and again only once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        return render(Reports([self]))


class Reports(list[GraphReport]):
    """The reports of graphs; printed as a table."""

    def as_dicts(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [item.as_dict() for item in self]

    def __rich__(self) -> Group:
        table = Table(title="graphs that torch.compile gave to fxpress", title_justify="left")
        for column in ("graph", "from", "operators", "runs on", "rewritten", "why, and what happened since"):
            table.add_column(column, justify="right" if column == "operators" else "left", overflow="fold")
        for item in self:
            rewritten = ", ".join(f"{count} {rule}" for rule, count in item.rewrites.items()) or "-"
            table.add_row(
                item.graph, escape(item.source), str(item.operators), item.runner, rewritten, escape(_story(item))
            )
        return Group(table)

    def __str__(self) -> str:
        return render(self, width=140)


def _story(item: GraphReport) -> str:
    recompiled = f"compiled again: {item.recompiled}" if item.recompiled else ""
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in item.milliseconds.items())
    from_disk = "from the cache" if item.cache == "loaded" else ""
    half = "{dtype}: {sqnr_db:.1f} dB, cosine {cosine:.6f}".format(**item.precision) if item.precision else ""
    return "; ".join(filter(None, [item.reason, times, half, recompiled, from_disk, *item.notes])) or "-"


_GRAPHS: list[GraphReport] = []  # of this process, in the order of their compilation


def remember(report: GraphReport) -> None:
    """Add a report to those that `reports` gives."""
    _GRAPHS.append(report)


def reports(clear: bool = False) -> Reports:
    """Every graph that torch.compile gave to fxpress in this process, in the order of compilation.

    Args:
        clear: forget them afterwards.
    """
    found = Reports(_GRAPHS)
    if clear:
        _GRAPHS.clear()
    return found


def described(inputs: Iterable[tuple[str, Any]]) -> list[str]:
    """`x: f32[2, s0]` of each input that is no weight."""
    from ...ir.graph import describe_value

    return [f"{name}: {describe_value(value)}" for name, value in inputs]
