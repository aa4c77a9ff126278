"""Graphs through which gradients flow: rewritten with the model's own weights, then cut in two by AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

from ...ir.errors import TraceError
from ...ir.graph import Program, source_of
from ...ir.rewrite import Context
from ..calibration import track
from ..pipeline import run_passes
from .binding import Binding
from .graph import WEIGHT, Captured, random_calls
from .make import calibration
from .program import make_program
from .work import Work

aten = torch.ops.aten
_CHECKPOINT = "tag_activation_checkpoint"
_DETACHING = (aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default)


def recomputes(gm: fx.GraphModule) -> bool:
    """Whether a part of dynamo's graph is to be computed again in the backward pass."""
    return any(_CHECKPOINT in str(node.target) for node in gm.graph.nodes)


def checkpointed(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph in PyTorch, with what is checkpointed in it computed again in the backward pass."""
    backend = aot_autograd(
        fw_compiler=_as_it_is,
        bw_compiler=_as_it_is,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    found: Callable[..., Any] = backend(gm, inputs)
    return found


def _as_it_is(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """PyTorch runs a graph of AOTAutograd; its inputs come in a list, which it empties."""

    def run(args: list[Any]) -> Any:
        return fx.Interpreter(module).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compiled(work: Work, values: Sequence[Any], captured: Captured) -> Callable[..., Any]:
    """The graph rewritten by the passes, its forward and backward pass in PyTorch; its weights stay the model's own.

    Args:
        values: the arguments of the first call, and the tensors that the graph keeps.

    Raises:
        TraceError: gradients would not be those of the graph, with the reason.
    """
    report = work.report
    _check_gradients(captured)
    weights = {place for place, argument in enumerate(captured.arguments) if argument.kind == WEIGHT}
    # A mask or a temperature may be another at the next step, so nothing is computed of buffers.
    buffers = {place for place in weights if not isinstance(values[place], nn.Parameter)}
    try:
        program, binding = _rewritten(work, values, captured, buffers)
    except _NewWeight:
        if not work.asked.exact:
            raise
        program, binding = _rewritten(work, values, captured, weights)
    module: Any = _Live(program, binding, captured.kept)
    sizes: dict[str, int] = {}

    def compiler(part: str) -> Callable[..., Any]:
        def compile_part(graph: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
            sizes[part] = sum(node.op == "call_function" for node in graph.graph.nodes)
            report.note(f"{part} graph of {sizes[part]} operators")
            return _as_it_is(graph, args)

        return compile_part

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("forward"),
        partition_fn=default_partition,
        keep_inference_input_mutations=True,
    )
    with work.clock("AOTAutograd"):
        found = backend(module, list(work.inputs))
    report.runner = "eager"

    def run(*args: Any) -> Any:
        report.calls += 1
        return found(*args)

    return run


def _check_gradients(captured: Captured) -> None:
    """Refuse what a rewritten graph would let gradients through, or keep them from."""
    if captured.switches:
        raise TraceError("gradients are switched off in a part of it")
    for node in captured.module.graph.nodes:
        if node.target in _DETACHING:
            raise TraceError(f"a tensor is detached in it{source_of(node)}")


class _NewWeight(TraceError):
    """A pass made a weight of the model's weights."""


def _rewritten(work: Work, values: Sequence[Any], captured: Captured, live: Container[int]) -> tuple[Program, Binding]:
    """The graph's program after the passes, every weight that is trained being the model's own.

    Args:
        live: weights that are inputs of the program, so that passes make no others of them.
    """
    with torch._guards.tracing(None), torch._guards.compile_context(None), torch.no_grad():
        program, binding = make_program(captured, values, live=live)
        own = dict(program.module.named_parameters())
        random = [str(node.target) for node in random_calls(program.graph)]
        with work.clock("passes"):
            context = Context(
                binding.tensors(values),
                calibration(work.asked, binding, captured, values),
                track=track,
                elsewhere=None,
            )
            work.report.passes = run_passes(program, work.asked.passes, context).reports
        if random != [str(node.target) for node in random_calls(program.graph)]:
            raise TraceError("the passes would change which random numbers it draws")
        found = dict(program.module.named_parameters())
    for name in found.keys() | own.keys():
        if found.get(name) is not own.get(name):
            raise _NewWeight(f"a pass makes a new weight of the model's {name}, which the optimizer does not have")
    return program, binding


class _Live(nn.Module):
    """A program as a module that reads the model's own weights from its arguments."""

    def __init__(self, program: Program, binding: Binding, extra: Sequence[Tensor]) -> None:
        super().__init__()
        self._extra, self._binding = list(extra), binding
        graph = program.module.graph
        places: list[int] = []
        last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), graph._root)
        for node in [item for item in graph.nodes if item.op == "get_attr" and str(item.target) in binding.weights]:
            with graph.inserting_after(last):
                last = graph.placeholder(f"weight_{len(places)}")
            places.append(binding.weights[str(node.target)])
            node.replace_all_uses_with(last)
            graph.erase_node(node)
        self._places = places
        rest = nn.Module()
        for name, buffer in program.module.named_buffers():
            if any(node.op == "get_attr" and str(node.target) == name for node in graph.nodes):
                _hold(rest, name, buffer)
        self._body = fx.GraphModule(rest, graph)

    def forward(self, *args: Any) -> Any:
        values = [*args, *self._extra]
        found = self._body(*self._binding.tensors(values), *(values[place] for place in self._places))
        return self._binding.finish(found, values)


def _hold(module: nn.Module, path: str, tensor: Tensor) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    module.register_buffer(leaf, tensor)
