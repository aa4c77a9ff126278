"""The report of a compilation: what each pass did, refused and cost; size, error, time; as a table and plain data."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
    sparsity: list[dict[str, Any]] = field(default_factory=list)  # what pruning left: layer, numbers, zeros, sqnr_db


@dataclass
class Report:
    """What was compiled and how far it is from the model. Seconds, bytes, dB."""

    model: str
    backend: str = ""
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
    fixed: list[str] = field(default_factory=list)  # axes that cannot vary, as torch.export's graph is wrong there
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    # Numbers of weights, zeros too: tied ones once, without masks and the scales of quantization; None: not counted.
    parameters_before: int | None = None
    parameters_after: int | None = None
    # Multiplications of one run of the example in matmuls (of integers too), convolutions and attention, all scores of
    # which count, those that a mask hides too; those by element do not. None: the program was not run.
    macs_before: int | None = None
    macs_after: int | None = None
    zeros: float | None = None  # their share in the weights that linear layers have now; None: nothing was pruned
    masked: bool = False  # whether weights are still multiplied by masks, for training
    reshaped: dict[str, list[list[int]]] = field(default_factory=dict)  # outputs of another shape: [before, after]
    precision: dict[str, Any] = field(default_factory=dict)  # half precision: dtype, and sqnr_db and cosine of its loss
    # What the triton backend launches: operators, by ("generated", or why PyTorch's own kernel), launches, megabytes.
    launches: list[dict[str, Any]] = field(default_factory=list)
    # Results of its kernels at the example's sizes: results, bytes; in so many pieces, of planned bytes, in which they
    # take turns; bytes that are alive at once.
    memory: dict[str, int] = field(default_factory=dict)
    # How it runs products and attention, once they have run on a GPU: operator, sizes (<=64: from 33 on), chosen,
    # milliseconds of each candidate, calls (that differ in their sizes).
    tuned: list[dict[str, Any]] = field(default_factory=list)

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
            timed = any(choice["milliseconds"] for choice in self.choices)
            title = "lowerings, by measured time (ms at the example's sizes)" if timed else "lowerings"
            choices = Table(title=title, title_justify="left")
            for column in ("operator", "nodes", "chosen", "candidates"):
                choices.add_column(column, justify="right" if column == "nodes" else "left")
            for choice in self.choices:
                times = ", ".join(f"{name} {ms:.3f}" for name, ms in choice["milliseconds"].items()) or "-"
                choices.add_row(choice["operator"], str(choice["nodes"]), choice["chosen"], times)
            parts.append(choices)
        if self.launches:
            parts.append(_launch_table(self.launches))
        if self.tuned:
            parts.append(_tuned_table(self.tuned))
        pruned = [item for item in self.passes if item.sparsity]
        parts += [_sparsity_table(item, f": {item.name}" if len(pruned) > 1 else "") for item in pruned]
        parts += [_attention_table(item) for item in self.passes if item.name.startswith("replace_attention")]
        parts.append(self.summary())
        return Group(*parts)

    def summary(self) -> str:
        """Size, error and time in a line each; what pruning did to the number of multiplications."""
        lines = [f"size: {self.bytes_before / 1e6:.1f} MB of weights -> {self.bytes_after / 1e6:.1f} MB"]
        lines += self._pruning()
        if self.memory:
            lines.append(
                "results of kernels: {results} of {bytes} in {pieces} pieces of memory of {planned} "
                "({alive} alive at once)".format(**_megabytes(self.memory))
            )
        if self.equal is None:
            lines.append("error: not measured")
        else:
            verdict = "equal to eager PyTorch" if self.equal else "NOT equal to eager PyTorch"
            error = "not measured"
            if self.max_abs is not None:
                error = f"{decibels(self.sqnr_db)}, max {self.max_abs:.2g}"
            lines.append(f"error against fp64: {error} ({verdict})")
            lines += [f"  {reason}" for reason in self.reasons]
        if self.precision:
            lost = f"{decibels(self.precision['sqnr_db'])}, cosine {self.precision['cosine']:.5f}"
            lines.append(f"{self.precision['dtype']} against the model in its own precision: {lost}")
        if self.reshaped:
            lines.append(f"outputs {self._reshaped()}")
        if self.fixed:
            lines.append("fixed at the example's sizes, where torch.export's graph is not the model's at another:")
            lines += [f"  {axis}" for axis in self.fixed]
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        lines.append(f"compile time: {sum(self.seconds.values()):.1f} s ({stages})")
        return "\n".join(lines)

    def _pruning(self) -> list[str]:
        """What the passes did to the multiplications and parameters, where it is worth a line; and why not more."""
        macs, numbers = _share(self.macs_before, self.macs_after), _share(self.parameters_before, self.parameters_after)
        changed = any(share is not None and abs(share - 1) >= _NOTICED for share in (macs, numbers))
        if self.zeros is None and not changed:
            return []
        parts = []
        if macs is not None:
            parts.append(
                f"multiplications: {_changed(self.macs_before, self.macs_after)} ({macs:.0%}) at the example's sizes"
            )
        if numbers is not None:
            parts.append(f"parameters: {_changed(self.parameters_before, self.parameters_after)}")
        lines = ["; ".join(parts)] if parts else []
        compressed = sum(choice["nodes"] for choice in self.choices if choice["chosen"].startswith("sparse24_linear"))
        if compressed:
            layers = sum(choice["nodes"] for choice in self.choices)
            lines.append(f"2:4 sparse: {compressed} of {layers} linear layers with so many zeros read them compressed")
        elif self.zeros is not None and self.zeros >= _NOTICED:
            fewer = macs if macs is not None else numbers
            further = "further " if fewer is not None and fewer <= 1 - _NOTICED else ""
            text = f"no {further}speed-up here, masks kept: {self.zeros:.0%} of the weights are zero"
            hint = "fold cuts heads and neurons that are masked" if self.masked else "pattern='neurons' or 'heads' cuts"
            lines.append(f"{text}, but the {self.backend} backend multiplies them all; {hint}")
        return lines

    def _reshaped(self) -> str:
        """The outputs of another shape, in one line: those that changed alike together."""
        alike: dict[str, list[str]] = {}
        for name, (before, after) in self.reshaped.items():
            alike.setdefault(f"{before} -> {after}", []).append(name)
        parts = [f"{_listed(names)}: {sizes}" for sizes, names in alike.items()]
        heads = all(before[:1] + before[2:] == after[:1] + after[2:] for before, after in self.reshaped.values())
        return f"{'with fewer heads' if heads else 'of another shape'}: {'; '.join(parts)}"

    def save_heatmap(self, path: str | os.PathLike[str]) -> None:
        """Draw what pruning left of each layer, by block, as a new .png or .svg file; needs matplotlib.

        Raises:
            InputError: nothing was pruned, the file exists or cannot be written, or matplotlib is missing.
        """
        from .heatmap import heatmap

        heatmap(self, Path(path))

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


_NOTICED = 0.005  # a change of less is no per cent


def _attention_table(report: PassReport) -> Table:
    """What each attention is now, and why others are exact."""
    table = Table(title=escape(f"attention: {report.name}"), title_justify="left")
    for column in ("attention", "is now"):
        table.add_column(column, overflow="fold")
    for item in report.matches:
        table.add_row(escape(item["node"]), escape(item["detail"]))
    for item in report.refusals:
        table.add_row(escape(item["node"]), escape(f"not {item['rule']}: {item['reason']}"))
    return table


def _megabytes(memory: Mapping[str, int]) -> dict[str, Any]:
    sizes = {name: f"{memory[name] / 1e6:.1f} MB" for name in ("bytes", "planned", "alive")}
    return {**memory, **sizes}


def _tuned_table(tuned: list[dict[str, Any]]) -> Table:
    table = Table(title="products and attention, by measured time (ms, when first met)", title_justify="left")
    for column in ("operator", "sizes", "chosen", "candidates"):
        table.add_column(column)
    for item in tuned:
        measured = item["milliseconds"].items()
        times = "; ".join(f"{name} failed" if ms is None else f"{name} {ms:.4f}" for name, ms in measured) or "-"
        table.add_row(*map(escape, (item["operator"], item["sizes"], item["chosen"], times)))
    return table


def _launch_table(launches: list[dict[str, Any]]) -> Table:
    table = Table(title="launches of a run (megabytes read and written at the example's sizes)", title_justify="left")
    for column in ("operators", "kernel", "launches", "MB"):
        table.add_column(column, justify="right" if column in ("launches", "MB") else "left")
    for item in launches:
        megabytes = "-" if item["megabytes"] is None else f"{item['megabytes']:.2f}"
        table.add_row(escape(item["operators"]), escape(item["by"]), str(item["launches"]), megabytes)
    return table


def _sparsity_table(report: PassReport, which: str) -> Table:
    """The layers that a pass pruned, and all of them together."""
    table = Table(title=escape(f"what pruning left{which}"), title_justify="left", show_footer=True)
    numbers, zeros = (sum(item[key] for item in report.sparsity) for key in ("numbers", "zeros"))
    table.add_column("layer", "all", overflow="fold")
    for name, footer in (("numbers", f"{numbers:,}"), ("zero or cut", _percent(zeros, numbers)), ("error", "")):
        table.add_column(name, footer, justify="right")
    for item in report.sparsity:
        error = "-" if item["sqnr_db"] is None else decibels(item["sqnr_db"])
        table.add_row(escape(item["layer"]), f"{item['numbers']:,}", _percent(item["zeros"], item["numbers"]), error)
    return table


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _share(before: int | None, after: int | None) -> float | None:
    """What is left of a number; None: unknown."""
    return after / before if before and after is not None else None


def _changed(before: int | None, after: int | None) -> str:
    return f"{_short(before or 0)} -> {_short(after or 0)}"


def _short(number: float) -> str:
    """Three digits and a unit: `22.7 M`."""
    units = ("", " k", " M", " G", " T", " P")
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"


def _listed(names: list[str]) -> str:
    """Names, of many the first and the last."""
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} to {names[-1]} ({len(names)})"


def decibels(value: float | None) -> str:
    """An SQNR as text; an infinite one is no error at all."""
    return "no error" if value is None or value == math.inf else f"{value:.1f} dB"


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
