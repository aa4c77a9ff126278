"""Sizes at which a traced graph is right: seen by running it beside its model, for torch.export promises too little at
1 and now and then too much elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.errors import TraceError
from ..ir.graph import Program, arguments, shape, size_text
from ..ir.signature import leaves
from .trace import Arguments, plain_attention

aten = torch.ops.aten
_Group = tuple[int, set[str]]  # the place of an axis, and the names of its sizes

# Graph and model run the same operators: what rounding alone makes of that stays far below, a wrong constant far above.
_APART, _HALF_APART = 0.01, 0.1  # of the largest number of an output; in half precision


def at_right_sizes(
    program: Program,
    model: torch.nn.Module,
    example: Arguments,
    admit: Callable[[Program, Any, list[Tensor]], Program],
    again: Callable[..., Program] | None,
) -> tuple[Program, dict[tuple[str, int], str]]:
    """A graph that is the model's at every size it takes, and the axes, with reasons, that were fixed for that.

    Args:
        program: as traced on the example.
        admit: extends ranges of sizes down to 1.
        again: traces anew with some axes `fixed`; None: no axis may be.

    Raises:
        TraceError: `again` is None, and the graph is wrong at another size: names the input, its axis, and the output.
    """
    fixed: dict[tuple[str, int], str] = {}
    while True:
        tensors = in_order(program, example)
        program = admit(program, model, tensors)
        wrong = _wrong_axes(program, model, tensors)
        if not wrong:
            return program, fixed
        if again is None:
            (path, axis), why = next(iter(wrong.items()))
            raise TraceError(
                f"torch.export's graph is wrong at other sizes: with axis {axis} of {path!r} {why}; "
                "compile with dynamic_shapes=None, for the example's sizes alone"
            )
        fixed |= wrong
        program = again(fixed=fixed.keys())


def check_example(program: Program, tensors: Sequence[Tensor], eager: Sequence[Any]) -> None:
    """Refuse a graph that is not the model's on the example itself, of which its own fp64 run would be no judge.

    Raises:
        TraceError: the model computes something else while it is traced; names the output.
    """
    with torch.no_grad(), plain_attention():
        found = program.run(tensors)
    for name, value, truth in zip(program.signature.outputs, found, eager, strict=True):
        if problem := difference(value, truth):
            raise TraceError(
                f"torch.export's graph is not the model: on the example {name!r} {problem}; it computes something "
                "else while it is traced, or draws random numbers: give masks and random numbers as inputs"
            )


def admit_ones(program: Program, model: torch.nn.Module, tensors: Sequence[Tensor]) -> Program:
    """Extend ranges that start at 2 down to 1 where the graph is seen to be right there.

    torch.export assumes that a dynamic size is 2 or more. Each group of axes (same place, same example size) is cut to
    1, the model and the graph are run, and the bound is lowered if both agree to rounding.
    """
    lows = dict(program.signature.ranges)
    groups = _groups(program, tensors).values()
    movable = [names for names in groups if all(lows.get(name, (0, None))[0] == 2 for name in names)]
    admitted: set[str] = set()
    for names in movable:
        if all(right_at(program, model, tensors, dict.fromkeys(cut, 1)) for cut in (names, names | admitted)):
            admitted |= names
    return with_lows(program, dict.fromkeys(admitted, 1))


def right_at(program: Program, model: torch.nn.Module, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> bool:
    """Whether graph and model agree to rounding where some of the example's sizes are cut."""
    pairs = _outputs(program, model, _cut(program, tensors, sizes))
    return pairs is not None and all(_agree(*pair) for pair in pairs)


def bound_by_tables(program: Program) -> None:
    """Let no size be larger than a table has rows for, where `embedding(table, arange(size))` looks up positions.

    PyTorch fails beyond, ONNX Runtime with an error that names no input, and OpenVINO gives zeros.
    """
    for node in program.calls(aten.embedding.default):
        rows, index, offset = shape(node.args[0])[0], cast(fx.Node, arguments(node)["indices"]), 0
        while index.target in _PASSED_ON or index.target is aten.add.Tensor:
            given = arguments(index)
            if index.target is aten.add.Tensor:
                if not isinstance(given["other"], int) or given["alpha"] != 1:
                    break
                offset += given["other"]
            index = cast(fx.Node, index.args[0])
        if index.target not in _COUNTS or arguments(index).get("start", 0) != 0:
            continue
        size = size_text(shape(index)[0], program.symbols)
        if size in program.signature.ranges:
            _, high = program.signature.ranges[size]
            program.set_longest(size, rows - offset if high is None else min(high, rows - offset))


_COUNTS = {aten.arange.default, aten.arange.start}
_PASSED_ON = {
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.to.dtype,
    aten._to_copy.default, aten.alias.default, aten.clone.default, aten.repeat.default, aten.detach.default,
}  # fmt: skip


def with_lows(program: Program, lows: Mapping[str, int]) -> Program:
    """The program with other lower bounds of some sizes."""
    ranges = {name: (lows.get(name, low), high) for name, (low, high) in program.signature.ranges.items()}
    return replace(program, signature=replace(program.signature, ranges=ranges))


def _wrong_axes(program: Program, model: torch.nn.Module, tensors: Sequence[Tensor]) -> dict[tuple[str, int], str]:
    """Axes along which a graph is not the model's: input, axis and why, seen with each group of axes cut."""
    found: dict[tuple[str, int], str] = {}
    for group, cut, other in _trials(program, tensors):
        names = group[1]
        pairs = _outputs(program, model, _cut(program, tensors, dict.fromkeys(names, cut)))
        for name, pair in zip(program.signature.outputs, pairs or (), strict=False):
            if problem := difference(*pair):
                for axis, wrong in (group, other) if other else (group,):
                    places = [item.path for item in program.signature.inputs if wrong & {*item.shape[axis : axis + 1]}]
                    found.update({(path, axis): f"at {cut}, {name!r} {problem}" for path in places})
    return found


def _trials(program: Program, tensors: Sequence[Tensor]) -> Iterator[tuple[_Group, int, _Group | None]]:
    """A group of axes, a size to cut it to, and the group that it then is no longer than, if it was longer.

    One less; and where another group that is no batch is smaller, to that and to one less: which of two lengths is the
    longer is what `max(keys / queries, 1.0)` asks, and torch.export answers as for the example.
    """
    groups = _groups(program, tensors)
    ranges = program.signature.ranges
    for (axis, size), names in groups.items():
        low = max(2, *(ranges.get(name, (size, None))[0] for name in names))
        cuts: dict[int, _Group | None] = {size - 1: None}
        for (place, smaller), others in groups.items():
            if axis and place and smaller < size:
                cuts = {smaller: (place, others), smaller - 1: (place, others), **cuts}
        yield from (((axis, names), cut, other) for cut, other in cuts.items() if cut >= low)


def in_order(program: Program, example: Arguments) -> list[Tensor]:
    """The example in the order of the program's inputs, whatever its sizes: 1 was doubled for tracing."""
    given = {**dict(zip(program.signature.positional, example[0], strict=False)), **example[1]}
    found = {path: leaf for name, value in given.items() for path, leaf in leaves(value, name)}
    return [found[tensor.path] for tensor in program.signature.inputs]


def _groups(program: Program, tensors: Sequence[Tensor]) -> dict[tuple[int, int], set[str]]:
    """The names of dynamic sizes by the place of their axis and their size in the example."""
    groups: dict[tuple[int, int], set[str]] = {}
    for spec, tensor in zip(program.signature.inputs, tensors, strict=True):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                groups.setdefault((axis, tensor.shape[axis]), set()).add(size)
    return groups


def _cut(program: Program, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> list[Tensor]:
    """The inputs with every axis whose size has a name in `sizes` cut to that."""
    return [
        tensor[tuple(slice(0, sizes.get(str(name))) for name in spec.shape)].contiguous()
        for spec, tensor in zip(program.signature.inputs, tensors, strict=True)
    ]


def _outputs(program: Program, model: torch.nn.Module, tensors: Sequence[Tensor]) -> list[tuple[Any, Any]] | None:
    """What graph and model give on an input, in pairs; None where one of them fails, or the input cannot be rebuilt."""
    given = {spec.path: tensor for spec, tensor in zip(program.signature.inputs, tensors, strict=True)}
    arguments = _nested({**given, **{item.path: item.value for item in program.signature.constants}})
    with torch.no_grad(), plain_attention():
        try:
            expected = pytree.tree_leaves(model(**arguments))
        except Exception:  # noqa: BLE001  # what a model says of a size; or an input of another container, which it lacks
            return None
        try:
            found = program.run(tensors)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
    return list(zip(found, expected, strict=True))


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted paths as dicts of dicts; what is named by numbers is a list."""
    tree: dict[str, Any] = {}
    for path, value in given.items():
        *parents, last = path.split(".")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value

    def listed(item: Any) -> Any:
        if type(item) is not dict:
            return item
        found = {name: listed(value) for name, value in item.items()}
        if not all(name.isdigit() for name in found):
            return found
        return [found[name] for name in sorted(found, key=int)]  # constants among tensors came last

    return {name: listed(value) for name, value in tree.items()}


def _agree(value: Any, truth: Any) -> bool:
    """Whether the graph's output is the model's to rounding."""
    if not isinstance(truth, Tensor):
        return True
    if not isinstance(value, Tensor) or value.shape != truth.shape:
        return False
    return torch.allclose(value, truth, rtol=1e-4, atol=1e-5, equal_nan=True)


def difference(value: Any, truth: Any) -> str:
    """How a traced graph's output differs from the model's on one input; empty: by rounding at most."""
    if not isinstance(truth, Tensor) or not isinstance(value, Tensor):
        return ""
    if value.shape != truth.shape:
        return f"has shape {list(value.shape)}, the model's {list(truth.shape)}"
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(value)):
        return "has NaN or infinity where the model's has none, or the other way round"
    if not truth.is_floating_point() or not bool(finite.any()):
        return ""  # of whole numbers one may be another for a tie
    most = (_HALF_APART if truth.element_size() == 2 else _APART) * truth[finite].abs().max()
    return "has other values than the model's" if bool((value - truth)[finite].abs().max() > most) else ""
