"""A prepared program as plain data (JSON), and back: what the generator needs to write the same module again.

Nothing in the data is run. Operators are looked up in the backend's own tables, sizes are trees of a few kinds of
expressions, names must be identifiers and texts words, so that none of them can become code in a generated module.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions

from ...ir.errors import ArtifactError, LoweringError, one_line
from ...ir.graph import Program
from ...ir.signature import Signature
from .lowerings.products import PRODUCTS
from .lowerings.table import EXTERN, GENERATORS, KERNELS, POINTWISE, VALUES, VIEWS
from .partition import kind
from .sizes import HINT, Described, Size, Sizes

_EXPRESSIONS: dict[str, Any] = {
    item.__name__: item
    for item in (
        sympy.Add, sympy.Mul, sympy.Pow, sympy.Rational, functions.Max, functions.Min, functions.FloorDiv,
        functions.Mod, functions.PythonMod, functions.CleanDiv, functions.CeilDiv, functions.ModularIndexing,
        functions.PowByNatural,
    )
}  # fmt: skip
# Arguments that are named in torch.
_PLAIN = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
NODES = 200_000
_WORD = re.compile(r"\w{0,40}", re.ASCII)
_NAME = re.compile(r"[a-zA-Z_]\w{0,500}", re.ASCII)
_SYMBOL = re.compile(r"[a-z]\d{1,9}")


def size(*args: Any) -> None:
    """Stands for arithmetic on sizes in a program that was read: what it gives is known of each node."""


def operators() -> dict[str, Any]:
    """What a prepared program may call, by name: the operators of the backend's tables."""
    found = {}
    for table in (GENERATORS, VIEWS, PRODUCTS, KERNELS, POINTWISE, VALUES, EXTERN):
        found.update({str(target): target for target in table if isinstance(target, torch._ops.OpOverload)})
    return {**found, "getitem": operator.getitem}


# --- to data --------------------------------------------------------------------------------------------------------


def dump(program: Program) -> dict[str, Any]:
    """A prepared program without its weights.

    Raises:
        LoweringError: something in it has no form as data.
    """
    writer = _Writer(Sizes(program))
    nodes = [writer.node(node) for node in program.graph.nodes]
    hints = {str(symbol): hint for symbol, hint in writer.sizes.known_hints().items()}
    return {"symbols": {name: hints.get(name) for name in sorted(writer.symbols)}, "nodes": nodes}


class _Writer:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.symbols: set[str] = set()

    def node(self, node: fx.Node) -> dict[str, Any]:
        what = kind(node)
        plain = "getitem" if node.target is operator.getitem else str(node.target)
        return {
            "name": node.name,
            "op": "size" if what == "size" else node.op,
            "target": what if what in ("size", "output") else plain,
            "args": [self._argument(item, node) for item in node.args],
            "kwargs": {name: self._argument(item, node) for name, item in node.kwargs.items()},
            "value": None if what == "output" else self._value(node.meta["val"], node),
        }

    def _argument(self, item: Any, node: fx.Node) -> Any:
        if item is None or isinstance(item, bool | int):
            return item
        if isinstance(item, float):
            return item if math.isfinite(item) else {"float": str(item)}
        if isinstance(item, str) and _WORD.fullmatch(item):
            return item
        if isinstance(item, fx.Node):
            return {"node": item.name}
        if isinstance(item, list | tuple):
            return [self._argument(part, node) for part in item]
        if isinstance(item, torch.device):
            return {"device": str(item)}
        for name, plain in _PLAIN.items():
            if isinstance(item, plain):
                return {name: str(item).removeprefix("torch.")}
        raise LoweringError(f"{node.name} cannot be saved: its argument {item!r} has no form as data")

    def _value(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, Tensor):
            return {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [self._size(item, node) for item in value.shape],
                "stride": [self._size(item, node) for item in value.stride()],
                "device": str(value.device),
            }
        if isinstance(value, list | tuple):
            return [self._value(item, node) for item in value]
        if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            return {"size": self._size(value, node)}
        raise LoweringError(f"{node.name} cannot be saved: it gives {value!r}, which is neither a tensor nor a size")

    def _size(self, size: Any, node: fx.Node) -> Any:
        expression = self.sizes.of(size)
        self.symbols.update(map(str, expression.free_symbols))
        return _tree(expression, node)


def _tree(expression: sympy.Expr, node: fx.Node) -> Any:
    """`["Add", "d0", 2]`: an operation and what it is of."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return str(expression)
    name = "Rational" if isinstance(expression, sympy.Rational) else type(expression).__name__
    if name not in _EXPRESSIONS:
        raise LoweringError(f"{node.name} cannot be saved: nothing is known of the size {expression}")
    parts = expression.as_numer_denom() if name == "Rational" else expression.args
    return [name, *(_tree(part, node) for part in parts)]


# --- and back -------------------------------------------------------------------------------------------------------


def restore(
    data: Any, signature: Signature, weights: Mapping[str, Tensor], device: torch.device | None = None
) -> Program:
    """The prepared program that data stand for.

    Args:
        signature: of the program that was saved.
        weights: by name, as its nodes name them.
        device: where all of it is to run; None: where it was compiled.

    Raises:
        ArtifactError: the data are of another form, or ask for what the backend does not have.
    """
    try:
        return _Reader(data["symbols"], weights, device).program(data["nodes"], signature)
    except ArtifactError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ArtifactError(f"the saved program has another form: {type(error).__name__}: {one_line(error)}") from error


class _Reader:
    """Builds one program."""

    def __init__(self, symbols: Mapping[str, int | None], weights: Mapping[str, Tensor], device: Any) -> None:
        self._weights, self._device = weights, device
        self._operators = operators()
        self._described: dict[str, Described] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._symbols: dict[str, sympy.Symbol] = {}
        self._hints: dict[sympy.Symbol, int] = {}
        for name, hint in symbols.items():
            if not _SYMBOL.fullmatch(name):
                raise ArtifactError(f"the saved program has a size of the name {name!r}")
            symbol = sympy.Symbol(name, integer=True, nonnegative=True)
            self._symbols[name], self._hints[symbol] = symbol, HINT if hint is None else int(hint)

    def program(self, entries: Sequence[Mapping[str, Any]], signature: Signature) -> Program:
        if len(entries) > NODES:
            raise ArtifactError(f"the saved program has {len(entries)} nodes, at most {NODES} are read")
        graph = fx.Graph()
        for entry in entries:
            name = self._name(entry["name"])
            node = self._node(graph, entry, name)
            if node.name != name or name in self._nodes:
                raise ArtifactError(f"the saved program names a node {name!r}, which is taken")
            self._nodes[name] = node
        taken = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        if taken != [item.name for item in signature.inputs]:
            raise ArtifactError(f"the saved program takes {taken}, its signature says otherwise")
        outputs = [node for node in graph.nodes if node.op == "output"]
        if len(outputs) != 1 or len(outputs[0].args) != 1 or not isinstance(outputs[0].args[0], list | tuple):
            raise ArtifactError("the saved program gives no list of outputs")
        graph.lint()
        spec = pytree.tree_structure([0] * len(outputs[0].args[0]))
        return Program(fx.GraphModule(self._module(), graph), signature, spec, {name: name for name in self._symbols})

    def _node(self, graph: fx.Graph, entry: Mapping[str, Any], name: str) -> fx.Node:
        op, target = entry["op"], entry["target"]
        args = tuple(self._argument(item) for item in entry["args"])
        kwargs = {key: self._argument(item) for key, item in entry["kwargs"].items()}
        if op == "output":
            return graph.create_node("output", "output", args, {}, name)
        if op == "size":
            node = graph.create_node("call_function", size, args, {}, name)
        elif op == "placeholder":
            node = graph.create_node("placeholder", self._name(target), (), {}, name)
        elif op == "get_attr":
            if target not in self._weights:
                raise ArtifactError(f"the saved program reads a weight {target!r}, which is not there")
            node = graph.create_node("get_attr", ".".join(map(self._name, target.split("."))), (), {}, name)
        elif op == "call_function" and target in self._operators:
            self._check_call(target, args, kwargs)
            node = graph.create_node("call_function", self._operators[target], args, kwargs, name)
        else:
            raise ArtifactError(f"the saved program calls {target!r}, which this backend does not have")
        node.meta["val"] = self._value(entry["value"])
        return node

    def _check_call(self, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if target == "getitem":
            if len(args) != 2 or type(args[1]) is not int or not isinstance(args[0], fx.Node) or kwargs:
                raise ArtifactError("the saved program takes a part of something that has none")
            return
        known = self._operators[target]._schema.arguments
        if len(args) > len(known) or not kwargs.keys() <= {item.name for item in known}:
            raise ArtifactError(f"the saved program gives {target!r} arguments that it does not have")

    def _name(self, name: Any) -> str:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
            raise ArtifactError(f"the saved program has a name that is no identifier: {str(name)[:60]!r}")
        return name

    def _argument(self, item: Any) -> Any:
        if item is None or isinstance(item, bool | int | float):
            return item
        if isinstance(item, str):
            if not _WORD.fullmatch(item):
                raise ArtifactError(f"the saved program has a text that is no word: {item[:60]!r}")
            return item
        if isinstance(item, list):
            return [self._argument(part) for part in item]
        ((what, value),) = item.items()
        if what == "node":
            return self._nodes[value]
        if what == "float":
            return float(value)
        if what == "device":
            return self._device or torch.device(value)
        return self._plain(what, value)

    def _plain(self, what: str, value: str) -> Any:
        found = getattr(torch, self._name(value), None)
        if not isinstance(found, _PLAIN[what]):
            raise ArtifactError(f"torch has no {what} {value!r}")
        return found

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if "size" in value:
            return self._size(value["size"])
        key = json.dumps(value, sort_keys=True)  # the layers of a model have the same ones
        if key not in self._described:
            self._described[key] = self._tensor(value)
        return self._described[key]

    def _tensor(self, value: Mapping[str, Any]) -> Described:
        shape, stride = ([self._size(item) for item in value[name]] for name in ("shape", "stride"))
        dtype, device = self._plain("dtype", value["dtype"]), self._device or torch.device(value["device"])
        return Described(shape, stride, dtype, device)

    def _size(self, data: Any) -> int:
        expression = self._expression(data)
        if expression.is_Integer:
            return int(expression)
        return Size(expression, int(expression.xreplace(self._hints)))

    def _expression(self, data: Any) -> sympy.Expr:
        if isinstance(data, int) and not isinstance(data, bool):
            if not -(2**63) <= data < 2**63:
                raise ArtifactError("the saved program has a size beyond 64 bits")
            return sympy.Integer(data)
        if isinstance(data, str):
            return self._symbols[data]
        name, *parts = data
        if name in ("Pow", "PowByNatural") and not (isinstance(parts[0], str | int) and parts[1] in range(-8, 9)):
            raise ArtifactError("the saved program has a size that is a power of another kind")  # it might never end
        return _EXPRESSIONS[name](*map(self._expression, parts))

    def _module(self) -> torch.nn.Module:
        """The weights that the nodes name, below a module as they were."""
        root = torch.nn.Module()
        for target in dict.fromkeys(str(node.target) for node in self._nodes.values() if node.op == "get_attr"):
            *path, leaf = target.split(".")
            holder = root
            for part in path:
                if not hasattr(holder, part):
                    holder.add_module(part, torch.nn.Module())
                holder = getattr(holder, part)
            holder.register_buffer(leaf, self._weights[target])
        return root
