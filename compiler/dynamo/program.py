"""From dynamo's graph in ATen operators to a Program, and from a Program's outputs back to what the graph gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.errors import TraceError
from ...ir.graph import Program, arguments, attribute, copy_graph, size_text, source_of
from ...ir.signature import Signature, TensorInput
from ..copying import copy_calls, copy_weights
from ..inplace import alias_of, is_change
from ..trace import fill_fake_values, stated, symbols_of
from .binding import Binding, Finish
from .graph import INPUT, SIZE, WEIGHT, Captured

aten = torch.ops.aten


def make_program(captured: Captured, values: Sequence[Any], *, live: Container[int] = ()) -> tuple[Program, Binding]:
    """The Program of a captured graph, with copies of the weights as they are now, and its binding.

    Args:
        values: the arguments of a call; its weights are read.
        live: weights that are inputs of the program too, so that no pass can compute anything of them beforehand.

    Raises:
        TraceError: it has no Program, with the reason.
    """
    source = fx.GraphModule(captured.module, copy_graph(captured.module.graph))
    placeholders = [node for node in source.graph.nodes if node.op == "placeholder"]
    changed = _changed_arguments(source.graph, placeholders)
    finish, results = _finish(source, placeholders, changed)
    if not results:
        raise TraceError("it computes nothing: its outputs are views of its inputs, sizes and constants")
    names: dict[str, int] = {}
    for place, (argument, node) in enumerate(zip(captured.arguments, placeholders, strict=True)):
        if argument.kind == WEIGHT and place not in changed and place not in live:
            _assign(source, argument.name, values[place])
            with source.graph.inserting_before(node):
                weight = source.graph.get_attr(argument.name)
            weight.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(weight)
            source.graph.erase_node(node)
            names[argument.name] = place
        elif place in changed:
            node.meta["may_change"] = True
    inputs, carriers = _inputs(captured, source, placeholders, changed, values, live)
    next(iter(reversed(source.graph.nodes))).args = (tuple(results),)
    module, graph = torch.nn.Module(), fx.Graph()
    copies: dict[fx.Node, Any] = {}
    copy_weights(source, module, graph, copies)
    copy_calls(source, graph, copies)
    tensors = [node for node in graph.nodes if node.op == "placeholder"]
    symbols = symbols_of(tensors)
    program = Program(
        fx.GraphModule(module, graph),
        Signature(
            inputs=tuple(_described(node, symbols) for node in tensors),
            constants=(),
            positional=tuple(str(node.target) for node in tensors),
            outputs=tuple(f"output.{index}" for index in range(len(results))),
            ranges=_ranges(captured, symbols),
        ),
        pytree.tree_structure(tuple(range(len(results)))),
        symbols,
    )
    fill_fake_values(program)
    program.clean()
    return program, Binding(inputs, carriers, names, finish)


def cast_weights(program: Program) -> None:
    """Make the casts of weights once, and not in every run; a weight that is read in one dtype alone keeps its name."""
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    readers = Counter(str(node.target) for node in weights)
    for weight in weights:
        path = str(weight.target)
        casts = [node for node in weight.users if node.target in _CASTS]
        dtypes = dict.fromkeys(node.meta["val"].dtype for node in casts)
        for dtype in dtypes:
            cast = attribute(program.module, path).detach().to(dtype)
            if readers[path] == len(dtypes) == 1 and len(casts) == len(weight.users):
                stored = weight
                _assign(program.module, path, cast)
                weight.meta["val"] = casts[0].meta["val"]
            else:
                name = f"{path}_{dtype}".replace("torch.", "")
                stored = program.add_weight(name, cast, trainable=False)
            for node in casts:
                if node.meta["val"].dtype == dtype:
                    node.replace_all_uses_with(stored)
    program.clean()


_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout)


def _described(node: fx.Node, symbols: Mapping[str, str]) -> TensorInput:
    value = node.meta["val"]
    sizes = tuple(stated(size_text(size, symbols)) for size in value.shape)
    return TensorInput(str(node.target), str(node.target), str(value.dtype).removeprefix("torch."), sizes)


def _assign(module: torch.nn.Module, path: str, weight: Tensor) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        if not isinstance(getattr(module, parent, None), torch.nn.Module):
            module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
    if hasattr(module, leaf):
        delattr(module, leaf)
    if isinstance(weight, torch.nn.Parameter):
        module.register_parameter(leaf, weight)
    else:
        module.register_buffer(leaf, weight)


def _inputs(
    captured: Captured,
    source: fx.GraphModule,
    placeholders: Sequence[fx.Node],
    changed: Sequence[int],
    values: Sequence[Any],
    live: Container[int],
) -> tuple[tuple[int, ...], int]:
    """Name the inputs; write sizes as those of tensors, of empty ones where no input has them."""
    inputs = []
    for place, (argument, node) in enumerate(zip(captured.arguments, placeholders, strict=True)):
        if argument.kind == INPUT or place in changed or (argument.kind == WEIGHT and place in live):
            node.target = argument.name.replace(".", "_")
            inputs.append(place)
    tensors = [placeholders[place] for place in inputs]
    carriers = 0
    for place, (argument, node) in enumerate(zip(captured.arguments, placeholders, strict=True)):
        if argument.kind != SIZE:
            continue
        if not isinstance(argument.fake, torch.SymInt):
            node.replace_all_uses_with(argument.fake)
        elif node.users:
            where = _axis(tensors, argument.fake)
            if where is None:
                if values[place] < 0:
                    raise TraceError(f"its input {argument.name} is a negative number")
                with source.graph.inserting_after(tensors[-1] if tensors else placeholders[-1]):
                    carrier = source.graph.placeholder(f"{argument.name}_size")
                with captured.fake_mode:
                    carrier.meta["val"] = torch.empty(argument.fake, 0)
                tensors.append(carrier)
                inputs.append(place)
                carriers += 1
                where = carrier, 0
            with source.graph.inserting_after(tensors[-1]):
                size = source.graph.call_function(aten.sym_size.int, where)
            size.meta["val"] = argument.fake
            node.replace_all_uses_with(size)
        source.graph.erase_node(node)
    _placeholders_first(source.graph)
    return tuple(inputs), carriers


def _axis(tensors: Sequence[fx.Node], size: torch.SymInt) -> tuple[fx.Node, int] | None:
    """An input and its axis that has just this size."""
    for node in tensors:
        for axis, found in enumerate(node.meta["val"].shape):
            if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
                return node, axis
    return None


def _placeholders_first(graph: fx.Graph) -> None:
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in [item for item in graph.nodes if item.op == "placeholder"]:
        if first is not None:
            first.prepend(node)


def _ranges(captured: Captured, symbols: Mapping[str, str]) -> dict[str, tuple[int, int | None]]:
    env = captured.fake_mode.shape_env
    found: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in env.var_to_range.items() if env is not None else ():
        if str(symbol) in symbols:
            upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
            lower = int(bounds.lower) if bounds.lower.is_Integer else 0
            found[symbols[str(symbol)]] = (lower, upper)
    return found


# --- changes in place, views and sizes among the outputs -------------------------------------------------------------


def _changed_arguments(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> list[int]:
    """The arguments that the graph changes in place, themselves or by a view."""
    places = {node: place for place, node in enumerate(placeholders)}
    owners = {owner(node.args[0]) for node in graph.nodes if is_change(node) and isinstance(node.args[0], fx.Node)}
    return sorted(places[node] for node in owners if node in places)


def _alias(node: fx.Node) -> fx.Node | None:
    """The tensor that a node's value may share memory with; None: it has memory of its own."""
    if node.target is aten.dropout.default and arguments(node)["train"] is False:
        return node.args[0]  # type: ignore[return-value]
    return alias_of(node)


def owner(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value is or may be in."""
    while (viewed := _alias(node)) is not None:
        node = viewed
    return node


def _finish(
    source: fx.GraphModule, placeholders: Sequence[fx.Node], changed: Sequence[int]
) -> tuple[Finish, list[fx.Node]]:
    """How the outputs come back, and the nodes that the program has to give."""
    given = next(iter(reversed(source.graph.nodes))).args[0]
    if not isinstance(given, tuple | list):
        raise TraceError("it gives a single value; dynamo's graphs give tuples")
    tensors = [item for item in given if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor)]
    owners = {item: owner(item) for item in tensors}
    shared = {home for home in owners.values() if len({item for item in tensors if owners[item] is home}) > 1}
    results: dict[fx.Node, int] = {}
    views = _Views(placeholders)
    outputs: list[tuple[str, Any]] = []
    for item in given:
        if not isinstance(item, fx.Node):
            outputs.append(("constant", item))
        elif item not in owners or owners[item].op == "placeholder" or (owners[item] in shared):
            if item in owners and owners[item].op != "placeholder":
                views.roots.setdefault(owners[item], results.setdefault(owners[item], len(results)))
            outputs.append(("view", views.add(item)))
        else:
            outputs.append(("value", results.setdefault(item, len(results))))
    nodes = list(results)
    new = []
    for place in changed:
        new.append((place, len(nodes)))
        nodes.append(placeholders[place])
    return Finish(tuple(outputs), tuple(new), views.module(), tuple(views.roots.values())), nodes


class _Views:
    """The graph of the outputs that are made when the others are there."""

    def __init__(self, placeholders: Sequence[fx.Node]) -> None:
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, Any] = {node: self._graph.placeholder(node.name) for node in placeholders}
        self._outputs: list[Any] = []
        self.roots: dict[fx.Node, int] = {}  # and the program outputs that they are

    def add(self, node: fx.Node) -> int:
        """Add an output; its place among them."""
        self._outputs.append(self._copied(node))
        return len(self._outputs) - 1

    def _copied(self, node: fx.Node) -> Any:
        if node in self._copies:
            return self._copies[node]
        if node in self.roots:
            found: Any = self._root(node)
        elif is_change(node) or node.target is aten.dropout.default:
            found = self._copied(node.args[0])  # type: ignore[arg-type]
        elif _alias(node) is not None or not isinstance(node.meta.get("val"), Tensor):
            if node.op != "call_function":
                raise TraceError(f"its output {node.name} is a constant that it keeps{source_of(node)}")
            found = self._graph.node_copy(node, self._copied)
        else:
            raise TraceError(f"an output is a size of what it computes{source_of(node)}")
        self._copies[node] = found
        return found

    def _root(self, node: fx.Node) -> fx.Node:
        last = next((item for item in reversed(self._graph.nodes) if item.op == "placeholder"), self._graph._root)
        with self._graph.inserting_after(last):
            return self._graph.placeholder(node.name)

    def module(self) -> fx.GraphModule | None:
        """The graph as a module; None: it has no outputs."""
        if not self._outputs:
            return None
        self._graph.output(tuple(self._outputs))
        return fx.GraphModule(torch.nn.Module(), self._graph)
