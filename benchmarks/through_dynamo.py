"""MiniLM through torch.compile(backend="fxpress") beside torch.compile's own backend and fxpress.compile.

Each candidate has a process of its own on one thread; a second process of fxpress's backend finds what the first left
in its cache folder. `python through_dynamo.py CANDIDATE BATCH LENGTH SECONDS` is such a process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPES = ((1, 128), (8, 128))
CANDIDATES = ("torch.compile", "fxpress.compile", "torch.compile, fxpress")
OURS = CANDIDATES[-1]
WITHIN = 1.05  # of the other two
FIRST_CALL = 2.0  # seconds, of a second process


@dataclass
class Found:
    """Of a candidate at a shape: seconds of the first call by process, medians in milliseconds by process."""

    first: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)  # first calls of processes that find a cache
    imports: list[float] = field(default_factory=list)


Results = dict[tuple[str, tuple[int, int]], Found]


def measure(tell: Callable[[str], None], quick: bool) -> Results:
    """All candidates in turn, in several rounds; each round begins with an empty cache."""
    rounds, seconds = (1, 0.2) if quick else (2, 2.0)
    results: Results = {(name, shape): Found() for shape in SHAPES for name in CANDIDATES}
    for turn in range(rounds):
        for shape in SHAPES:
            for name in CANDIDATES:
                tell(f"{name}, {shape[0]} x {shape[1]}, round {turn + 1} of {rounds}")
                found = results[name, shape]
                with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as cache:
                    said = _process(name, shape, seconds, cache)
                    found.first.append(said["first"])
                    found.milliseconds.append(said["milliseconds"])
                    found.imports.append(said["imports"])
                    if name == OURS:
                        found.warm.append(_process(name, shape, 0.1, cache)["first"])
    return results


def _process(name: str, shape: tuple[int, int], seconds: float, cache: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, name, *map(str, shape), str(seconds)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{name} at {shape} failed: {run.stderr[-2000:]}")
    said: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return said


def section(results: Results) -> str:
    """The section of RESULTS.md."""
    from report import environment

    lines = [
        environment("2 rounds of 2 s, each process on one thread"),
        "",
        "First call: of a process whose cache is empty, imports not counted; second process: the same with what the",
        "first one left. Milliseconds: the median of the rounds' medians.",
        "",
        "| batch, length | candidate | ms | spread | first call, s | second process, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (name, shape), found in results.items():
        middle = statistics.median(found.milliseconds)
        spread = (max(found.milliseconds) - min(found.milliseconds)) / middle
        warm = f"{statistics.median(found.warm):.1f}" if found.warm else "-"
        first = f"{statistics.median(found.first):.1f}"
        lines.append(f"| {shape[0]}, {shape[1]} | {name} | {middle:.2f} | {spread:.0%} | {first} | {warm} |")
    lines += ["", "| point | target | found | met |", "|---|---|---|---|"]
    for shape in SHAPES:
        own = results[OURS, shape]
        for other in CANDIDATES[:-1]:
            share = statistics.median(own.milliseconds) / statistics.median(results[other, shape].milliseconds)
            met = "met" if share <= WITHIN else "**not met**"
            lines.append(
                f"| {shape[0]}, {shape[1]} | at most {WITHIN} times the time of {other} | {share:.2f} | {met} |"
            )
        warm = statistics.median(own.warm)
        met = "met" if warm <= FIRST_CALL else "**not met**"
        point = f"first call of a second process below {FIRST_CALL:g} s"
        lines.append(f"| {shape[0]}, {shape[1]} | {point} | {warm:.1f} s | {met} |")
    return "\n".join(lines)


# --- one process ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Compile, call, time, and print what was found as JSON."""
    name, batch, length, seconds = arguments[0], int(arguments[1]), int(arguments[2]), float(arguments[3])
    start = time.perf_counter()
    import torch
    import torch._dynamo

    import fxpress

    sys.path.insert(0, str(Path(__file__).parent))
    from workloads import minilm

    imports = time.perf_counter() - start
    torch.set_num_threads(1)
    model = minilm()
    torch.manual_seed(0)
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(1000, 20000, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        start = time.perf_counter()
        if name == CANDIDATES[0]:
            run: Callable[..., Any] = torch.compile(model)
        elif name == CANDIDATES[1]:
            run = fxpress.compile(model, example_inputs=inputs, threads=1)
        else:
            run = torch.compile(model, backend="fxpress")
        found = run(**inputs).last_hidden_state
        first = time.perf_counter() - start
        assert torch.allclose(found, expected, atol=1e-4)
        for _ in range(3):
            run(**inputs)
        times = []
        while sum(times) < seconds or len(times) < 3:
            start = time.perf_counter()
            run(**inputs)
            times.append(time.perf_counter() - start)
    print(json.dumps({"imports": imports, "first": first, "milliseconds": 1000 * statistics.median(times)}))


if __name__ == "__main__":
    main(sys.argv[1:])
