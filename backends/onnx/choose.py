"""Measured choice between the lowerings of a node: each is timed on this machine at the example's sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy
import onnx_ir
import onnxruntime
import torch
from torch import Tensor, fx

from ...ir.graph import Program, arguments, describe_value
from ...ir.printer import target_name
from ..memory import Memory, fastest, processor
from .export import OPSET, hint, quietly, write_onnx
from .lowerings.lowering import Lowering
from .lowerings.table import LOWERINGS, PROBES, supported
from .session import Session

_ROUNDS, _CALLS = 3, 5
_SECONDS, _MOST = 0.01, 0.15  # of a turn: it is short, but not of one call, unless that is long


@dataclass(frozen=True)
class Choice:
    """The lowering chosen for every node of one kind (operator, sizes, options), with what was measured."""

    operator: str
    sizes: str
    chosen: str
    milliseconds: Mapping[str, float]  # of each candidate; empty where there was only one
    nodes: int


class Timed(Protocol):
    """A model that can be run."""

    @property
    def inputs(self) -> Sequence[str]:
        """Their names."""
        ...

    def run(self, arrays: Sequence[numpy.ndarray[Any, Any]]) -> Any:
        """Run on arrays in the order of the inputs."""
        ...


@dataclass(frozen=True)
class Runtime:
    """What runs a model: the lowerings that it has kernels for, and how they are timed.

    Attributes:
        name: with its version and what else a time depends on.
        candidates: the lowerings that take a node, in order of preference, and the reasons of others.
        session: of a model file, on so many threads.
        opset: that its models are written in.
    """

    name: str
    candidates: Callable[[fx.Node], tuple[list[Lowering], list[str]]]
    session: Callable[[Path, int | None], Timed]
    opset: int


ONNX_RUNTIME = Runtime(f"onnxruntime {onnxruntime.__version__}", supported, Session, OPSET)


def choose(
    program: Program,
    *,
    threads: int | None = None,
    memory: Memory | None = None,
    measure: bool = True,
    runtime: Runtime = ONNX_RUNTIME,
) -> tuple[dict[fx.Node, Lowering], list[Choice]]:
    """The fastest lowering of each fxpress node of a program that `check` finds nothing wrong with.

    Args:
        threads: threads that the product will run with.
        memory: where measurements are remembered; None: the user's cache folder.
        measure: False: the first lowering of each is taken.
        runtime: what will run it.
    """
    memory = memory or Memory("onnx")
    kinds: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in LOWERINGS:
            kinds.setdefault(_kind(node, threads, runtime), []).append(node)
    known = memory.read() if measure else {}
    measured = {key: value for key, value in known.items() if key in kinds and _is_whole(value, kinds[key][0], runtime)}
    wanted = {
        key: nodes[0]
        for key, nodes in kinds.items()
        if key not in measured and len(runtime.candidates(nodes[0])[0]) > 1
    }
    if wanted and measure:
        fresh = dict(zip(wanted, _measure(program, list(wanted.values()), threads, runtime), strict=True))
        memory.write(fresh)
        measured.update(fresh)
    chosen: dict[fx.Node, Lowering] = {}
    choices = []
    for key, nodes in kinds.items():
        candidates = runtime.candidates(nodes[0])[0]
        times = {item.name: float(measured.get(key, {}).get(item.name, 0.0)) for item in candidates}
        name = fastest(times)
        best = next(item for item in candidates if item.name == name)
        chosen.update(dict.fromkeys(nodes, best))
        sizes = ", ".join(describe_value(value) for value in _tensors(nodes[0]))
        shown = times if measure and len(candidates) > 1 else {}
        choices.append(Choice(target_name(nodes[0]), sizes, best.name, shown, len(nodes)))
    return chosen, choices


def _is_whole(entry: Any, node: fx.Node, runtime: Runtime) -> bool:
    """Whether something remembered is a time for every candidate of a node."""
    return isinstance(entry, dict) and all(
        isinstance(entry.get(item.name), int | float) and entry[item.name] > 0 for item in runtime.candidates(node)[0]
    )


def _tensors(node: fx.Node) -> list[Tensor]:
    """The node's tensor arguments with the example's sizes, on torch's meta device."""
    values = [item.meta["val"] for item in node.all_input_nodes]
    return [
        torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
        for value in values
        if isinstance(value, Tensor)
    ]


def _kind(node: fx.Node, threads: int | None, runtime: Runtime) -> str:
    """Operator, sizes, options, candidates, machine and versions: what a measurement and the choice depend on."""
    given = {}
    for name, value in arguments(node).items():
        fake = value.meta["val"] if isinstance(value, fx.Node) else None
        if isinstance(fake, Tensor):
            sizes = "x".join(str(hint(size)) for size in fake.shape)
            given[name] = f"{str(fake.dtype).removeprefix('torch.')}[{sizes}]" + ("@" * (value.op == "get_attr"))
        elif fake is not None:
            given[name] = f"size {hint(fake)}"
        else:
            given[name] = repr(value)
    options = ", ".join(f"{name}={value}" for name, value in given.items())
    where = f"{processor()}; {runtime.name}; threads {threads}"
    candidates = ", ".join(item.name for item in runtime.candidates(node)[0])
    return f"{target_name(node)}({options}) as {candidates} on {where}"


class _Probes(torch.nn.Module):
    """Every candidate of every node, side by side on inputs of their own; weights are constants."""

    def __init__(self, program: Program, nodes: Sequence[fx.Node], runtime: Runtime) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self._calls: list[tuple[Callable[..., Any], dict[str, Any], dict[str, int]]] = []
        for node in nodes:
            constants: dict[str, Any] = {}
            places: dict[str, int] = {}
            for name, value in arguments(node).items():
                if not isinstance(value, fx.Node):
                    constants[name] = value
                elif not isinstance(value.meta["val"], Tensor):
                    constants[name] = hint(value.meta["val"])
                elif value.op == "get_attr":
                    self.register_buffer(f"weight_{len(list(self.buffers()))}", program.tensor(value).detach())
                    constants[name] = list(self.buffers())[-1]
                else:
                    places[name] = len(self.inputs)
                    self.inputs.append(random_input(value.meta["val"]))
            probe = PROBES.get(node.target)
            if probe is not None:
                for name, index in places.items():
                    self.inputs[index] = probe.prepare(name, self.inputs[index])
            for lowering in runtime.candidates(node)[0]:
                function = probe.wrap(lowering.function) if probe is not None else lowering.function
                self._calls.append((function, constants, places))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for function, constants, places in self._calls:
            result = function(**constants, **{name: inputs[index] for name, index in places.items()})
            results += [result] if isinstance(result, Tensor) else list(result)
        return results


def _parts(node: fx.Node) -> int:
    """How many tensors a node gives."""
    value = node.meta["val"]
    return 1 if isinstance(value, Tensor) else len(value)


def random_input(fake: Tensor) -> Tensor:
    """Random values (ones for masks and integers) of a fake tensor's dtype, at the example's sizes."""
    sizes = [hint(size) for size in fake.shape]
    if fake.dtype.is_floating_point:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(fake.dtype)
    return torch.ones(sizes, dtype=fake.dtype)


def _measure(
    program: Program, nodes: Sequence[fx.Node], threads: int | None, runtime: Runtime
) -> list[dict[str, float]]:
    """Milliseconds of every candidate of each node: all are exported at once, then cut apart and timed in turn."""
    probes = _Probes(program, nodes, runtime).eval()
    candidates = [runtime.candidates(node)[0] for node in nodes]
    names = [
        [f"probe_{index}_{candidate}_{part}" for part in range(_parts(node))]
        for index, (node, group) in enumerate(zip(nodes, candidates, strict=True))
        for candidate in range(len(group))
    ]
    inputs = [f"input_{index}" for index in range(len(probes.inputs))]
    with torch.no_grad(), quietly():
        exported = torch.export.export(probes, tuple(probes.inputs))
        model = write_onnx(exported, inputs, [name for group in names for name in group], runtime.opset)
    feed = dict(zip(inputs, (item.numpy() for item in probes.inputs), strict=True))
    found = []
    with TemporaryDirectory(prefix="fxpress-") as folder:
        calls = []
        for outputs in names:
            path = Path(folder) / f"{outputs[0]}.onnx"
            _cut(model, outputs, path)
            session = runtime.session(path, threads)
            arrays = [feed[name] for name in session.inputs]
            calls.append(partial(session.run, arrays))
        for group in candidates:
            mine, calls = calls[: len(group)], calls[len(group) :]
            times = race(mine, time.thread_time if threads == 1 else time.perf_counter)
            found.append({item.name: ms for item, ms in zip(group, times, strict=True)})
    return found


def _cut(model: onnx_ir.Model, outputs: Sequence[str], path: Path) -> None:
    """Write the part of a model that computes some outputs."""
    part = model.clone()
    kept = [value for value in part.graph.outputs if value.name in outputs]
    part.graph.outputs.clear()
    part.graph.outputs.extend(kept)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(part)
    used = {value.name for node in part.graph for value in node.inputs if value is not None}
    wanted = [value for value in part.graph.inputs if value.name in used]
    part.graph.inputs.clear()
    part.graph.inputs.extend(wanted)
    onnx_ir.save(part, path)


def race(calls: Sequence[Callable[[], Any]], clock: Callable[[], float]) -> list[float]:
    """The time of each call in milliseconds: the median of its best turn. The calls take turns.

    The best call of all would be a lucky one: rows that share a cache set are not evicted each time. On one thread the
    clock is the thread's own, so that other programs on the machine do not decide.
    """
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(_ROUNDS):
        for index, call in enumerate(calls):
            begun = time.perf_counter()
            taken: list[float] = []
            while (gone := time.perf_counter() - begun) < _SECONDS or (len(taken) < _CALLS and gone < _MOST):
                start = clock()
                call()
                taken.append(clock() - start)
            best[index] = min(best[index], statistics.median(taken) * 1e3)
    return best
