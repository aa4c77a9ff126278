"""How benchmarks/gpu.py measures: candidates in turn by CUDA events, and where a model's time goes, by its kernels."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]
ROUNDS = 5
FLUSHED = 256 * 2**20  # bytes, several times an L2 cache
PARTS = {
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|cutlass|xmma|nvjet|triton_tem|matmul|linear|splitk|cublas|bmm|_mm_",
}  # what a kernel's name says that it computes; anything else is "rest"


@dataclass
class Row:
    """A workload: the candidates' milliseconds, and what it takes in operations and bytes."""

    section: str
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # of a candidate: an error, or why it was not measured
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # of a candidate: milliseconds of its kernels
    why: str = ""  # it may be slower than others
    error: float | None = None  # of fxpress: RMSE against fp32, over that of eager PyTorch in bfloat16


@dataclass
class Bench:
    """Measures within a time."""

    deadline: float
    device: torch.device
    rows: list[Row] = field(default_factory=list)
    after: Callable[[], None] = print  # each row

    def measure(self, row: Row, candidates: Mapping[str, Callable[[], Run]], alone: bool = True) -> dict[str, Run]:
        """Prepare each candidate, then time them in turn. A candidate that fails is a note of the row.

        Args:
            alone: each call finds an empty L2 cache and is timed by itself; else calls follow one another.

        A row may come again with more candidates, and one of the earlier to take turns with; that one's time stays.

        Returns:
            those that were measured.
        """
        if not any(known is row for known in self.rows):
            self.rows.append(row)
        ready: dict[str, Run] = {}
        for name, make in candidates.items():
            if time.monotonic() > self.deadline:
                row.notes[name] = "not measured: time was up"
                continue
            start = time.monotonic()
            try:
                run = make()
                for _ in range(3):
                    run()
                self.synchronize()
                ready[name] = run
            except Exception as error:  # noqa: BLE001  whatever stops one candidate is that candidate's result
                row.notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            print(f"{row.section}: {row.name}: {name}: ready in {time.monotonic() - start:.1f} s", flush=True)
        rounds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(ROUNDS):
            for name, run in ready.items():
                rounds[name].append(self.alone(run) if alone else self.in_a_row(run))
        row.milliseconds = {name: statistics.median(found) for name, found in rounds.items()} | row.milliseconds
        print(f"  {', '.join(f'{name} {value:.4f}' for name, value in row.milliseconds.items())} ms", flush=True)
        for name, note in row.notes.items():
            print(f"  {name}: {note}", flush=True)
        return ready

    def in_a_row(self, run: Run, least: float = 20.0) -> float:
        """Milliseconds of a run, over as many as fill `least` milliseconds."""
        if self.device.type != "cuda":
            return on_cpu(run)
        once = self._timed(run, 1)
        return self._timed(run, max(1, min(200, int(least / max(once, 1e-3)))))

    def alone(self, run: Run, least: float = 10.0) -> float:
        """Milliseconds of a run, the median of several, before each of which the L2 cache is filled with other data.

        That takes the GPU longer than a launch takes Python, so that launches cost nothing here.
        """
        if self.device.type != "cuda":
            return on_cpu(run)
        other = torch.empty(FLUSHED // 4, dtype=torch.int32, device=self.device)
        once = self._timed(run, 1)
        count = max(3, min(30, int(least / max(once, 1e-3))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            other.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def _timed(self, run: Run, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def on_cpu(run: Run) -> float:
    """Milliseconds of one call: --dry, where that the script works is all that is wanted."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def captured(call: Run) -> Run:
    """A call as a CUDA graph, so that launches from Python cost none of the candidates anything; as it is on a CPU."""
    if not torch.cuda.is_available():
        return call
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)


def parts(run: Run, count: int = 3) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """The milliseconds of a run's kernels by what they compute, and of each kernel, by its name, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] = kernels.get(event.name, 0.0) + event.self_device_time_total / 1000 / count
    found = dict.fromkeys([*PARTS, "rest"], 0.0)
    for name, milliseconds in kernels.items():
        found[next((part for part, text in PARTS.items() if re.search(text, name, re.IGNORECASE)), "rest")] += (
            milliseconds
        )
    return found, sorted(kernels.items(), key=lambda item: -item[1])
