"""The picture of speed against error: one marker a candidate, a line through the best of ours."""

from __future__ import annotations

from pathlib import Path

from measure import Results
from report import row_of
from workloads import EAGER, OURS, POINTS, Shape

SHAPE: Shape = (1, 128)
SMALLEST = 1e-5  # fp32 candidates have less error than a logarithmic axis has use for


def plot(results: Results, file: Path) -> None:
    """Write the picture: times as fast as eager at SHAPE, and 1 - pooled cosine on the corpus.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results.rows[SHAPE]
    eager = row_of(rows, EAGER)
    assert eager is not None
    places: dict[str, tuple[float, float]] = {}
    for row in rows:
        found = results.quality[row.name].closeness
        if row.measured and found is not None:
            places[row.name] = (eager.ms / row.ms, max(1 - found.pooled_mean, SMALLEST))
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    ours = [places[name] for name in (OURS, *POINTS) if name in places]
    axes.plot(
        *zip(*_best(ours), strict=True),
        color="tab:red",
        linewidth=1,
        zorder=1,
    )
    for number, (name, place) in enumerate(sorted(places.items(), key=lambda item: item[1]), 1):
        own = name in (OURS, *POINTS)
        color, marker = ("tab:red", "o") if own else ("tab:blue", "s")
        axes.scatter(*place, color=color, marker=marker, zorder=2, label=f"{number}  {name}")
        height = (7, -14)[number % 2]  # neighbours' numbers do not cover each other
        axes.annotate(str(number), place, (0, height), textcoords="offset points", ha="center", fontsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    axes.set_yscale("log")
    axes.invert_yaxis()  # better is further right and further up
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(f"times as fast as eager fp32 at batch {SHAPE[0]}, length {SHAPE[1]}, one thread")
    axes.set_ylabel(f"1 − cosine of pooled embeddings with fp32 (at least {SMALLEST:.0e})")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _best(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, slowest first, than which none is both faster and closer."""
    found: list[tuple[float, float]] = []
    for place in sorted(places, key=lambda item: (-item[0], item[1])):
        if not found or place[1] < found[-1][1]:
            found.append(place)
    return found[::-1]
