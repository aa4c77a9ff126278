"""CUDA graphs of a generated forward: one for each set of shapes that comes back, a bounded number of them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import one_line

Forward = Callable[[Sequence[Tensor]], list[Any]]
LIMIT = 8  # graphs: each keeps the memory of all that is computed in it
WORTH = 16 * 2**20  # bytes: 32 MB moved, at an H100's 3 TB/s about the 10 us that a launch from Python takes


class Graphs:
    """Runs `forward`, from the third call with the same shapes on by replaying what the second one launched.

    A launch from Python takes longer than most kernels of a small batch run; a graph launches all at once. The first
    call compiles kernels, which a capture must not. What is returned is a copy that later calls leave alone. Where the
    copies of inputs and outputs would take longer than the launches, no graph is made.

    Args:
        forward: from tensors to a list of outputs; it reads nothing back from the GPU.
        launches: how many kernels it launches.
        capture: from a forward and its tensors to its replay on other tensors of the same shapes.
        limit: how many graphs are kept; the one that was not used for the longest time goes first.
    """

    def __init__(
        self,
        forward: Forward,
        launches: int,
        capture: Callable[[Forward, Sequence[Tensor]], Forward] | None = None,
        limit: int = LIMIT,
    ) -> None:
        self._forward, self._capture, self._limit = forward, capture or captured, limit
        self._most = launches * WORTH
        self._seen: OrderedDict[Any, Forward | None] = OrderedDict()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Run, or replay."""
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
        if key not in self._seen:
            outputs = self._forward(tensors)
            copied = sum(item.nbytes for item in (*tensors, *outputs) if isinstance(item, Tensor))
            self._seen[key] = None if copied <= self._most else self._forward
            while len(self._seen) > self._limit:
                self._seen.popitem(last=False)
            return outputs
        self._seen.move_to_end(key)
        if self._seen[key] is None:
            try:
                self._seen[key] = self._capture(self._forward, tensors)
            except RuntimeError as error:
                shapes = [list(tensor.shape) for tensor in tensors]
                warnings.warn(f"no CUDA graph for {shapes}: {one_line(error)}", stacklevel=2)
                self._seen[key] = self._forward
        replay = self._seen[key]
        assert replay is not None
        return replay(tensors)


def recorded(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """What a call launches as a CUDA graph, and what it returned.

    Raises:
        RuntimeError: it does what a graph cannot, such as to wait for the GPU.
    """
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = call()
    except BaseException:
        torch.cuda.set_stream(stream)  # a capture that ends in an error does not go back to it
        raise
    return graph, found


def captured(forward: Forward, tensors: Sequence[Tensor]) -> Forward:
    """A forward recorded as a CUDA graph: inputs are copied to where it read them, outputs from where it wrote."""
    inputs = [tensor.clone() for tensor in tensors]
    torch.cuda.synchronize()
    graph, outputs = recorded(lambda: forward(inputs))

    def replay(given: Sequence[Tensor]) -> list[Any]:
        for place, tensor in zip(inputs, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return [item.clone() if isinstance(item, Tensor) else item for item in outputs]

    return replay
