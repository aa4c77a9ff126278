"""Models through torch.compile(backend="fxpress") beside torch.compile's own backend and fxpress.compile.

Each candidate has a process of its own on one thread; a second process of fxpress's backend finds what the first left
in its cache folder. `python through_dynamo.py '{"model": ..., ...}'` is such a process (`Run`).
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

MINILM, CONVOLUTION = "minilm", "convolution"
SHAPES = ((MINILM, 1, 128), (MINILM, 8, 128), (CONVOLUTION, 1, 64))  # batch, length or height and width
EAGER, OWN, COMPILE, OURS = "eager", "torch.compile", "fxpress.compile", "torch.compile, fxpress"
CANDIDATES = {MINILM: (OWN, COMPILE, OURS), CONVOLUTION: (EAGER, OWN, OURS)}
TARGETS = {  # of OURS: other candidates, and in how many times their time it stays
    MINILM: {OWN: 1.05, COMPILE: 1.05},
    CONVOLUTION: {EAGER: 1.0},
}
FIRST_CALL = 2.0
ROUNDS, SECONDS = 3, 3.0
PASSES = ("quantize(int8), fuse", "mask_weights(0.5), fuse")  # on MiniLM, by both roads

Point = tuple[str, int, int]


@dataclass(frozen=True)
class Run:
    """One process: a model at a shape, compiled, called and timed; its outputs are stored."""

    model: str
    candidate: str
    batch: int
    size: int
    seconds: float
    passes: str | None = None
    outputs: str | None = None  # a file


@dataclass
class Found:
    """Of a candidate at a shape, by process: seconds of compile() and of the first call, median milliseconds."""

    cold: list[tuple[float, float]] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    warm: list[tuple[float, float]] = field(default_factory=list)  # of processes that find a cache


@dataclass
class Results:
    """The times of each candidate at a point, and of lossy passes the states by road: `eager`, and two lossy ones."""

    times: dict[tuple[str, Point], Found]
    states: dict[str, dict[str, numpy.ndarray]]


def measure(tell: Callable[[str], None], quick: bool) -> Results:
    """All candidates in turn, in several rounds; each round begins with an empty cache."""
    rounds, seconds = (1, 0.2) if quick else (ROUNDS, SECONDS)
    times = {(name, point): Found() for point in SHAPES for name in CANDIDATES[point[0]]}
    for turn in range(rounds):
        for (name, point), found in times.items():
            tell(f"{name}, {point[0]} {point[1]} x {point[2]}, round {turn + 1} of {rounds}")
            with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as cache:
                said = _process(Run(point[0], name, *point[1:], seconds), cache)
                found.cold.append((said["compile"], said["first"]))
                found.milliseconds.append(said["milliseconds"])
                if name == OURS and point[0] == MINILM:
                    said = _process(Run(point[0], name, *point[1:], 0.1), cache)
                    found.warm.append((said["compile"], said["first"]))
    states: dict[str, dict[str, numpy.ndarray]] = {}
    for passes in PASSES:
        tell(passes)
        with tempfile.TemporaryDirectory(prefix="fxpress-bench-") as folder:
            for name in (EAGER, COMPILE, OURS):
                file = str(Path(folder) / "states.npy")
                _process(Run(MINILM, name, 8, 128, 0.0, passes, file), folder)
                states.setdefault(passes, {})[name] = numpy.load(file)
    return Results(times, states)


def _process(run: Run, cache: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, json.dumps(asdict(run))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{run} failed: {ended.stderr[-2000:]}")
    said: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return said


def section(results: Results) -> str:
    """The section of RESULTS.md."""
    from report import environment

    lines = [
        environment(f"{ROUNDS} rounds of {SECONDS:g} s, each process on one thread"),
        "",
        "A process whose cache is empty, and a second one that finds what the first left: seconds of torch.compile()",
        "or fxpress.compile(), and of the first call. Imports before that are not counted; torch.compile() imports",
        "what a backend needs, of which PyTorch's own part is 0.2 to 0.5 s. Milliseconds: the median of the rounds'",
        "medians. The convolution model (a small ResNet, images of 64 x 64) has nothing of ours in it.",
        "",
        "| model | batch, size | candidate | ms | spread | compile(), s | first call, s "
        "| second process: compile(), s | first call, s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, (model, *shape)), found in results.times.items():
        middle = statistics.median(found.milliseconds)
        spread = (max(found.milliseconds) - min(found.milliseconds)) / middle
        cold, warm = _medians(found.cold), _medians(found.warm)
        lines.append(f"| {model} | {shape[0]}, {shape[1]} | {name} | {middle:.2f} | {spread:.0%} | {cold} | {warm} |")
    lines += ["", "| point | target | found | met |", "|---|---|---|---|"]
    for point in SHAPES:
        lines += _targets(results, point)
    lines += [
        "",
        "Lossy passes on MiniLM at 8 x 128, by both roads: cosine of the token states with eager's, and the largest",
        "difference between the roads' states, as a share of the largest state.",
        "",
        "| passes | through fxpress.compile | through torch.compile | largest difference |",
        "|---|---:|---:|---:|",
    ]
    for passes, states in results.states.items():
        cosines = [_cosine(states[name], states[EAGER]) for name in (COMPILE, OURS)]
        apart = float(abs(states[COMPILE] - states[OURS]).max() / abs(states[EAGER]).max())
        lines.append(f"| {passes} | {cosines[0]:.6f} | {cosines[1]:.6f} | {apart:.1e} |")
    return "\n".join(lines)


def _targets(results: Results, point: Point) -> list[str]:
    own, where = results.times[OURS, point], f"{point[0]} {point[1]}, {point[2]}"
    lines = []
    for other, times in TARGETS[point[0]].items():
        share = statistics.median(own.milliseconds) / statistics.median(results.times[other, point].milliseconds)
        met = "met" if share <= times else "**not met**"
        lines.append(f"| {where} | at most {times} times the time of {other} | {share:.2f} | {met} |")
    if own.warm:
        warm = statistics.median(first for _, first in own.warm)
        met = "met" if warm < FIRST_CALL else "**not met**"
        lines.append(f"| {where} | first call of a second process below {FIRST_CALL:g} s | {warm:.2f} s | {met} |")
    return lines


def _medians(times: Sequence[tuple[float, float]]) -> str:
    """Two cells of the table."""
    return " | ".join(f"{statistics.median(column):.2f}" for column in zip(*times, strict=True)) if times else "- | -"


def _cosine(found: numpy.ndarray, truth: numpy.ndarray) -> float:
    """The mean over tokens."""
    found, truth = found.astype(numpy.float64), truth.astype(numpy.float64)
    lengths = numpy.linalg.norm(found, axis=-1) * numpy.linalg.norm(truth, axis=-1)
    return float(((found * truth).sum(-1) / lengths).mean())


# --- one process ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Compile, call, time, and print what was found as JSON."""
    run = Run(**json.loads(arguments[0]))
    import torch
    import torch._dynamo

    import fxpress

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    model, inputs, read = (_minilm if run.model == MINILM else _convolution)(run)
    with torch.no_grad():
        expected = read(model(**inputs))
        start = time.perf_counter()
        compiled: Callable[..., Any] = model
        if run.candidate == OWN:
            compiled = torch.compile(model)
        elif run.candidate == COMPILE:
            compiled = fxpress.compile(model, run.passes, example_inputs=inputs, threads=1)
        elif run.candidate == OURS:
            options = {"passes": run.passes} if run.passes else None
            compiled = torch.compile(model, backend="fxpress", options=options)
        made = time.perf_counter()
        found = read(compiled(**inputs))
        first = time.perf_counter() - made
        assert run.passes or torch.allclose(found, expected, atol=1e-4)
        if run.outputs is not None:
            numpy.save(run.outputs, found.numpy())
        times = [_seconds(lambda: compiled(**inputs)) for _ in range(3)]
        while sum(times) < run.seconds:
            times.append(_seconds(lambda: compiled(**inputs)))
    milliseconds = 1000 * statistics.median(times[3:] or times)
    print(json.dumps({"compile": made - start, "first": first, "milliseconds": milliseconds}))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _minilm(run: Run) -> tuple[Any, dict[str, Any], Callable[[Any], Any]]:
    import torch
    from workloads import minilm, real_text

    return (
        minilm(),
        {name: torch.from_numpy(value) for name, value in real_text((run.batch, run.size)).items()},
        lambda out: out.last_hidden_state,
    )


def _convolution(run: Run) -> tuple[Any, dict[str, Any], Callable[[Any], Any]]:
    import torch
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic")
    images = torch.randn(run.batch, 3, run.size, run.size)
    return ResNetModel(config).eval(), {"pixel_values": images}, lambda out: out.pooler_output


if __name__ == "__main__":
    main(sys.argv[1:])
