"""The picture of attention-scaling: time and memory by length, a line a kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from attention_scaling import CAUSAL, EXACT, LAYER, PROJECTIONS, Scaling

COLOURS = {
    EXACT: "black",
    PROJECTIONS: "0.6",
    "sliding_window": "tab:blue",
    "random_sparse": "tab:orange",
    "dynamic_sparse": "tab:brown",
    "graph, star": "goldenrod",
    "graph, expander": "darkkhaki",
    "lsh": "tab:purple",
    "linformer": "tab:green",
    "performer": "tab:red",
    "nystrom": "tab:cyan",
    "linear": "tab:pink",
    "depthwise_conv": "yellowgreen",
}
GAP = 0.021  # between labels on the right, as a share of the height


def plot(found: Sequence[Scaling], file: Path) -> None:
    """Write the picture of the layer.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layer = next(item for item in found if item.model.name == LAYER)
    curves = {name: curve for name, curve in layer.curves.items() if curve.ms}
    figure, panels = pyplot.subplots(1, 2, figsize=(15, 7.5))
    draw(panels[0], {name: curve.time for name, curve in curves.items()}, "milliseconds")
    draw(panels[1], {name: curve.memory for name, curve in curves.items()}, "MB, peak of the first run")
    figure.suptitle(f"{layer.model.title}; batch 1, ONNX Runtime, one thread (dashed: causal)")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def draw(axes: Any, lines: Mapping[str, Mapping[int, float]], label: str) -> None:
    """One panel, with slopes to compare by."""
    sizes = sorted({size for values in lines.values() for size in values})
    every = [value for values in lines.values() for value in values.values()]
    low, high = math.log(min(every) / 1.6), math.log(max(every) * 1.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] * 0.9, sizes[-1] * 4)
    axes.set_ylim(math.exp(low), math.exp(high))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    for name, values in lines.items():
        own, strong = colour(name), colour(name) in (COLOURS[EXACT], COLOURS[PROJECTIONS])
        axes.plot(
            list(values), list(values.values()), color=own, linestyle="--" if name.endswith(CAUSAL) else "-",
            marker="o", markersize=3.5, linewidth=2.4 if strong else 1.4, zorder=3 if strong else 2,
        )  # fmt: skip
    ends = {name: (max(values), values[max(values)]) for name, values in lines.items()}
    names = sorted(ends, key=lambda name: ends[name][1])
    places = spaced([math.log(ends[name][1]) for name in names], GAP * (high - low))
    for name, place in zip(names, places, strict=True):
        line = (ends[name][0] * 1.03, sizes[-1] * 1.25), (ends[name][1], math.exp(place))
        axes.plot(*line, color=colour(name), linewidth=0.6)
        axes.text(sizes[-1] * 1.3, math.exp(place), name, color=colour(name), fontsize=9, va="center")
    for power in (1, 2):
        slope(axes, sizes, math.exp(low) * 1.15, math.exp(high), power)
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(which="major", alpha=0.3)


def colour(name: str) -> str:
    return COLOURS[name.removesuffix(CAUSAL)]


def slope(axes: Any, sizes: Sequence[int], start: float, top: float, power: int) -> None:
    """A dotted line that grows as N^power, with its name near its end."""
    end = min(sizes[-1], sizes[0] * (top / start) ** (1 / power))
    axes.plot((sizes[0], end), (start, start * (end / sizes[0]) ** power), ":", color="0.45", linewidth=1.2, zorder=1)
    near = sizes[0] * (end / sizes[0]) ** 0.9
    axes.text(
        near, start * (near / sizes[0]) ** power, "N" if power == 1 else "N²", color="0.3", ha="center", va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as is needed to leave a gap between each two (pooling neighbours)."""
    pools: list[list[float]] = []  # what the heights would be without the gaps below them
    for index, height in enumerate(heights):
        pools.append([height - index * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    flat = [fmean(pool) for pool in pools for _ in pool]
    return [height + index * gap for index, height in enumerate(flat)]
