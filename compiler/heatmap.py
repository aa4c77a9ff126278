"""The picture of what pruning left: a cell for each layer, blocks below one another, coloured by the share of zeros."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from . import artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import Report

SUFFIXES = (".png", ".svg")
ALONE = "(in no block)"  # the column of the layers without a number
_CELL = (0.8, 0.3)  # inches
_DOTS, _MOST_DOTS = 150, 20_000  # an inch; a side


def check(path: Path) -> None:
    """Refuse a file that cannot be drawn to, before there is anything to draw.

    Raises:
        InputError: another suffix, the file exists or cannot be made, or matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"a heatmap must end in {' or '.join(SUFFIXES)}, found {str(path)!r}")
    artifact.check_new(path)
    _figure_class()


def heatmap(report: Report, path: Path) -> None:
    """Draw what pruning left of each layer; where several passes pruned one, what the last of them says.

    Raises:
        InputError: no pass says what it pruned; and what `check` raises.
    """
    check(path)
    shares = {
        item["layer"]: item["zeros"] / max(1, item["numbers"]) for pruned in report.passes for item in pruned.sparsity
    }
    if not shares:
        raise InputError("no pass says which weights it pruned; compile with mask_weights")
    figure = draw(shares, report.model)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            dots = min(_DOTS, _MOST_DOTS / max(figure.get_size_inches()))
            figure.savefig(Path(folder) / path.name, format=path.suffix[1:], dpi=dots, bbox_inches="tight")
            os.rename(Path(folder) / path.name, path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def place(layer: str) -> tuple[str, str]:
    """The row and column of a layer: `encoder.layer.0` and `attention.self.query`, split behind the first number."""
    parts = layer.split(".")
    end = next((index + 1 for index, part in enumerate(parts[:-1]) if part.isdigit()), 0)
    return (".".join(parts[:end]), ".".join(parts[end:])) if end else (layer, ALONE)


def draw(shares: dict[str, float], title: str) -> Figure:
    """The picture of shares by layer."""
    places = {place(layer): share for layer, share in shares.items()}
    rows, columns = (list(dict.fromkeys(item[axis] for item in places)) for axis in (0, 1))
    if ALONE in columns:  # behind the others
        columns = [*(name for name in columns if name != ALONE), ALONE]
    grid = [[places.get((row, column)) for column in columns] for row in rows]
    figure = _figure_class()(
        figsize=(
            _CELL[0] * len(columns) + 0.08 * _longest(rows) + 1.6,
            _CELL[1] * len(rows) + 0.06 * _longest(columns) + 1,
        ),
        layout="constrained",
    )
    axes = figure.add_subplot()
    image = axes.imshow(
        [[float("nan") if share is None else share for share in line] for line in grid],
        cmap="Blues", vmin=0, vmax=1, aspect="auto",
    )  # fmt: skip
    axes.set_facecolor("0.93")
    for y, line in enumerate(grid):
        for x, share in enumerate(line):
            if share is not None:
                colour = "white" if share > 0.65 else "black"
                text = axes.text(x, y, f"{share:.1%}", ha="center", va="center", color=colour, fontsize=8)
                text.set_in_layout(False)
    style: dict[str, Any] = {"fontsize": 8, "parse_math": False}
    axes.xaxis.tick_top()
    shown = columns if columns != [ALONE] else [""]
    axes.set_xticks(range(len(columns)), shown, rotation=40, ha="left", rotation_mode="anchor", **style)
    axes.set_yticks(range(len(rows)), rows, **style)
    axes.set_xticks([x + 0.5 for x in range(len(columns) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    bar = figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share that is zero or cut", fontsize=8)
    return figure


def _longest(names: Sequence[str]) -> int:
    return max(map(len, names))


def _figure_class() -> type[Figure]:
    """matplotlib's figure, which draws without the global state that pyplot has.

    Raises:
        InputError: it is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a heatmap needs matplotlib: pip install 'fxpress[plot]'") from error
    return Figure
