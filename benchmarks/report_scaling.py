"""The section of attention-scaling: time and memory by length, how they grow, the targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from attention_scaling import CAUSAL, EXACT, FROM, LAYER, PROJECTIONS, Curve, Model, Scaling, Setting, exponent
from report import cell, environment
from targets import Target, target_table

PLOT = "attention_scaling.png"
AT = 8192  # tokens, where speed is compared
GROWTH = 1.15
GROWTH_OF = {
    **dict.fromkeys(
        ("sliding_window", "random_sparse", "linformer", "performer", "nystrom", "linear", "depthwise_conv"), GROWTH
    ),
    "lsh": 1.3,
}
SPEED = {"sliding_window": 8.0, "linformer": 4.0, "performer": 4.0, "nystrom": 4.0, "linear": 4.0}
ABOUT = f"""Attention of each kind in the place of exact attention (`replace_attention` with force=True, then `fuse`;
benchmarks/attention_scaling.py), batch 1, no padding, in ONNX Runtime on one thread. Every kind is compiled once,
with a dynamic length; exact is what fxpress makes of exact attention (`fuse`). Each length of each kind runs in a
process of its own: MB is by how much the peak of resident memory in its first run exceeds what was resident before
it, the model loaded and the input made; ms is the median of runs once that memory no longer grows, and of the
rounds. Alone: how many times as fast as exact attention where the time of the projections is taken off both.
Growth: the exponent p of N^p, by least squares of the logarithms from {FROM} tokens on. Spread: the largest
distance between rounds as a share of their median, of all lengths.

What the kinds are good for without training is in attention-quality.
"""
TARGETS = f"""Of the layer. Growth is of time; speed is over exact attention at {AT} tokens: of the attention alone, and
of the layer with its projections, which all have in common."""


def section(found: Sequence[Scaling]) -> str:
    """The section, without its heading."""
    settings = "; ".join(f"{item.model.name}: {rounds(item.model)}" for item in found)
    lines = ["", ABOUT, environment(settings), ""]
    for item in found:
        lines += curves_table(item)
        if item.short:
            lines += [rule(item.short), ""]
    layer = next((item for item in found if item.model.name == LAYER), None)
    if layer is not None:
        lines += target_table(targets(layer.curves), TARGETS + limit(layer.curves))
    return "\n".join([*lines, f"![time and memory by length]({PLOT})", ""])


def rounds(model: Model) -> str:
    return f"{model.rounds} round{'s' if model.rounds > 1 else ''} of {model.seconds} s a length"


def curves_table(found: Scaling) -> list[str]:
    """All settings of a model."""
    model = found.model
    sizes = " | ".join(str(size) for size in model.sizes)
    at = AT if AT in model.sizes else model.sizes[-1]
    kinds = (False, True) if PROJECTIONS in found.curves else (False,)  # of speed-ups: with projections, alone
    columns = len(model.sizes) + 4 + len(kinds)
    lines = [
        f"### {model.name}",
        "",
        f"{model.title[0].upper()}{model.title[1:]}. Milliseconds by tokens. Compiled with {model.example} tokens.",
        "",
        f"| kind | {sizes} | times exact at {at} | {'alone | ' * (len(kinds) - 1)}time grows as | MB at {at} "
        "| MB grow as | spread |",
        "|---|" + "---:|" * columns,
    ]
    for setting in model.settings:
        curve = found.curves[setting.name]
        if curve.failure and not curve.ms:
            lines.append(f"| {named(setting)} | failed: {cell(curve.failure)}" + " |" * columns)
            continue
        cells = [f"{curve.time[size]:.1f}" if size in curve.ms else "-" for size in model.sizes]
        times = [speed_up(found.curves, setting, at, alone=alone) for alone in kinds]
        megabytes = f"{curve.memory[at]:.0f}" if at in curve.memory else "-"
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in times]
        cells += [growth(curve.time), megabytes, growth(curve.memory)]
        lines.append(f"| {named(setting)} | {' | '.join(cells)} | {curve.spread:.0%} |")
    partly = {name: curve.failure for name, curve in found.curves.items() if curve.failure and curve.ms}
    failures = [f"- {name} failed {failure}" for name, failure in partly.items()]
    return [*lines, "", *failures, *([""] if failures else [])]


def named(setting: Setting) -> str:
    """The setting with its options."""
    options = ", ".join(f"{name}={value}" for name, value in setting.options.items() if name != "topology")
    return f"{setting.name} ({options})" if options else setting.name


def growth(values: Mapping[int, float]) -> str:
    found = exponent(values)
    return "-" if found is None else f"N^{found:.2f}"


def speed_up(curves: Mapping[str, Curve], setting: Setting, size: int, *, alone: bool = False) -> float | None:
    """How many times as fast as exact attention, causal where the setting is; `alone`: less the projections of both."""
    every = [curves.get(EXACT + (CAUSAL if setting.causal else ""), Curve()), curves[setting.name]]
    if alone:
        every.append(curves.get(PROJECTIONS, Curve()))
    if any(size not in curve.ms for curve in every):
        return None
    exact, own, *projections = (curve.time[size] for curve in every)
    for common in projections:
        exact, own = exact - common, own - common
    return exact / own if own > 0.01 * exact else None  # less is within the noise of what was taken off


def rule(short: Mapping[str, str]) -> str:
    """What the profitability rule says."""
    times = {name: re.search(r"([\d.e+-]+) ms, exact ([\d.e+-]+) ms", reason) for name, reason in short.items()}
    refused = [f"{name} ({match[1]} ms)" for name, match in times.items() if match]
    exact = next((f" ({match[2]} ms)" for match in times.values() if match), "")
    replaced = [name for name, reason in short.items() if not reason]
    return (
        f"At 128 tokens the pass, without force=True, refuses as slower than exact attention{exact}, by its own "
        f"measurement of the attention alone: {', '.join(refused) or 'none'}. It replaces: "
        f"{', '.join(replaced) or 'none'}."
    )


def limit(curves: Mapping[str, Curve]) -> str:
    """The most that is possible: an attention that takes no time."""
    most = speed_up(curves, Setting(PROJECTIONS), AT) if PROJECTIONS in curves else None
    return "" if most is None else f" A layer whose attention took no time at all would be {most:.2f} times as fast."


def targets(curves: Mapping[str, Curve]) -> Iterator[Target]:
    """Every target, by kind."""
    for name in dict.fromkeys((*SPEED, *GROWTH_OF)):
        curve = curves.get(name, Curve())
        if name in GROWTH_OF:
            most, found = GROWTH_OF[name], exponent(curve.time)
            text = "" if found is None else f"N^{found:.2f}"
            yield Target(name, f"grows as N^{most} or less", text, None if found is None else round(found, 2) <= most)
        if name in SPEED:
            for alone in (True, False):
                least, times = SPEED[name], speed_up(curves, Setting(name), AT, alone=alone) if curve.ms else None
                text = "" if times is None else f"{times:.2f}x"
                wish = f"at least {least:g}x the speed of exact attention, {'alone' if alone else 'with projections'}"
                yield Target(name, wish, text, None if times is None else times >= least)
