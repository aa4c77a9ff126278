"""Running a compiled graph: its weights watched, its inputs and outputs shared with ONNX Runtime without copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from ...backends.onnx.session import Session
from ...ir.errors import FxpressError, one_line
from ...ir.signature import Signature
from .binding import Binding
from .report import GraphReport
from .weights import Watch

Call = Callable[..., Any]


class Product(Protocol):
    """What was made of a graph for weights as they are: called with the graph's arguments."""

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs."""
        ...


class Watched:
    """A compiled graph with copies of its weights; where one has changed the graph is remade or PyTorch runs it.

    Args:
        product: what was made of the graph with the weights of now.
        weights: the arguments that are those weights.
        remake: makes another product for the weights in some arguments.
        usual: the graph as it was.
        extra: tensors that the graph keeps as attributes; they count as its last arguments.
        at_once: whether the graph is remade as soon as a weight is another, since the result is not the model's.
    """

    def __init__(
        self,
        product: Product,
        weights: Sequence[int],
        args: Sequence[Any],
        remake: Callable[[Sequence[Any]], Product],
        usual: Call,
        report: GraphReport,
        extra: Sequence[Tensor],
        at_once: bool,
    ) -> None:
        self._product, self._weights, self._remake = product, tuple(weights), remake
        self._usual, self._report, self._extra, self._at_once = usual, report, tuple(extra), at_once
        self._watch = Watch(self._read(args))
        self._stale: Watch | None = None  # of weights that the product was not made for
        self._settled, self._patience, self._given_up = 0, 2, False

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs; never those of weights that are no longer there."""
        self._report.calls += 1
        values = (*args, *self._extra)
        if self._watch.same(self._read(values)):
            return self._product(values)
        return self._changed(values, args)

    def _read(self, args: Sequence[Any]) -> list[Tensor]:
        return [args[place] for place in self._weights]

    def _changed(self, values: Sequence[Any], args: Sequence[Any]) -> Any:
        weights = self._read(values)
        if self._stale is not None and self._stale.same(weights):
            self._settled += 1
        else:
            self._report.weight_changes += 1
            self._stale, self._settled = Watch(weights), 1
        if self._given_up or not (self._at_once or self._settled >= self._patience):
            self._report.note("weights changed: PyTorch runs the graph until they stay as they are for some calls")
            return self._usual(*args)
        try:
            self._product = self._remake(values)
        except FxpressError as error:
            self._given_up = True
            self._report.note(f"weights changed and PyTorch runs the graph: {one_line(error)}")
            return self._usual(*args)
        self._watch, self._stale = Watch(weights), None
        self._patience *= 2  # a model that is trained between its calls is not remade ever again
        self._report.note("weights changed: remade")
        return self._product(values)


class Counted:
    """A graph that PyTorch runs, its calls counted."""

    def __init__(self, usual: Call, report: GraphReport) -> None:
        self._usual, self._report = usual, report

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs."""
        self._report.calls += 1
        return self._usual(*args)


class Bound:
    """A session that reads torch tensors where they are and writes into new ones.

    Args:
        sizes: of each input, its sizes: numbers, and names of those that vary.
    """

    def __init__(self, session: Session, sizes: Sequence[Sequence[int | str]]) -> None:
        self._session, self._sizes = session, sizes
        self._dtypes = [torch.from_numpy(numpy.empty(0, dtype)).dtype for dtype in session.output_dtypes]
        self._known: dict[tuple[torch.Size, ...], list[tuple[int, ...]] | None] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat outputs of flat inputs."""
        inputs = [tensor.detach().contiguous() for tensor in tensors]
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            self._known[key] = self._shapes(inputs)
        shapes = self._known[key]
        if shapes is None:
            return [torch.from_numpy(item) for item in self._session.run([tensor.numpy() for tensor in inputs])]
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, self._dtypes, strict=True)]
        self._session.run_into(
            [(tensor.data_ptr(), tensor.shape) for tensor in inputs],
            [(tensor.data_ptr(), tensor.shape) for tensor in outputs],
        )
        return outputs

    def _shapes(self, inputs: Sequence[Tensor]) -> list[tuple[int, ...]] | None:
        """The outputs' shapes; None where memory for them cannot be made ready."""
        known = {
            name: size
            for names, tensor in zip(self._sizes, inputs, strict=True)
            for name, size in zip(names, tensor.shape, strict=True)
            if isinstance(name, str)
        }
        found = []
        for shape in self._session.output_shapes:
            sizes = [size if isinstance(size, int) else known.get(str(size), 0) for size in shape]
            if 0 in sizes:  # empty, or of a size that is known only after the run
                return None
            found.append(tuple(sizes))
        return None if any(tensor.numel() == 0 for tensor in inputs) else found


_SHAPES = 1000  # of inputs, the outputs' shapes of which are remembered


class Made:
    """A program that runs, as dynamo's graph."""

    def __init__(
        self,
        binding: Binding,
        run: Callable[[Sequence[Tensor]], list[Any]],
        usual: Callable[[Sequence[Any]], Any],
        report: GraphReport,
    ) -> None:
        self._binding, self._run, self._usual, self._report = binding, run, usual, report

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs; its changed arguments are changed."""
        binding, note = self._binding, self._report.note
        if binding.finish.changed and binding.shares_changed(args):
            note("an input that it changes shared memory with another: PyTorch ran it")
            return tuple(self._usual(args))
        try:
            found = self._run(binding.tensors(args))
        except FxpressError as error:
            note(f"{one_line(error)}: PyTorch ran it")
            return tuple(self._usual(args))
        return binding.finish(found, args)


def on_session(
    session: Session, signature: Signature, leaves: Sequence[tuple[int | None, Any]]
) -> Callable[[Sequence[Tensor]], list[Any]]:
    """A program in a session of ONNX Runtime; `leaves` are its outputs among the session's, or constants."""
    bound = Bound(session, [item.shape for item in signature.inputs])

    places = [index for index, _ in leaves]
    again = [place for place, index in enumerate(places) if index is not None and index in places[:place]]

    def run(tensors: Sequence[Tensor]) -> list[Any]:
        found = bound(tensors)
        outputs = [constant if index is None else found[index] for index, constant in leaves]
        for place in again:  # equal outputs of the session, which are tensors of their own in the graph
            outputs[place] = outputs[place].clone()
        return outputs

    return run
