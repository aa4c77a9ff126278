"""A program as one readable Python module: kernels, and a plain `forward` that launches them in order."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...ir.errors import LoweringError
from ...ir.graph import Program, arguments, source_of
from ...kernels import (
    attention,
    block_attention,
    conv_attention,
    elementwise,
    float8,
    float8_matmul,
    gathered_attention,
    int4_matmul,
    launch,
    linear_attention,
    matmul,
    matmul_configs,
    matmul_descriptor,
    matmul_tiles,
    pseudo_inverse,
    sparse24_matmul,
)
from .kernel import Kernel, attention_with_bias, form_of, product_kernel, tile_kernel
from .lifetimes import PLACED, Buffer, released, take_turns
from .lowerings.extern import ON_SIZES
from .lowerings.table import EXTERN, KERNELS
from .partition import Group, Planner, kind
from .prepare import prepare
from .sizes import Sizes, contiguous, product, refuse_unknown, text
from .sparse import compress

INDENT = "    "


@dataclass(frozen=True)
class Generated:
    """A module's text, and what it needs and leaves to others.

    Attributes:
        program: the one that it was generated from, with the weights.
        source: the text; `forward(inputs, weights)` takes and gives lists, and weights by name.
        weights: the names in `weights`.
        groups: the operators of each launch of a generated kernel.
        externs: what PyTorch's own kernels run: operator, reason, how often.
        launches: all of it, equal ones together: what runs, by what, how often, megabytes at the example's sizes.
        dot: what is launched after what, as a graph in Graphviz's language.
        choices: what became of products with sparse weights: operator, sizes, chosen, milliseconds, nodes.
        memory: of the results of generated kernels: how many there are, their bytes, in how many pieces of memory they
            take turns, and its bytes; bytes that are alive at once. At the example's sizes.
        forms: of epilogues that libraries have, "plain" or "bias", by the product's kernel.
    """

    program: Program
    source: str
    weights: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    externs: tuple[tuple[str, str, int], ...]
    launches: tuple[dict[str, Any], ...]
    dot: str
    choices: tuple[dict[str, Any], ...] = ()
    forms: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)


def check(program: Program) -> list[str]:
    """The nodes of a prepared program that this backend has nothing for, each as one line."""
    found = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.as_strided.default:
            found.append(f"{node.target}: what it reads depends on layouts, which kernels choose anew{source_of(node)}")
        elif node.op == "call_function" and kind(node) == "none":
            found.append(f"{node.target}: no lowering to Triton{source_of(node)}")
    return found


def generate(program: Program) -> Generated:
    """Generate the module of a program.

    Raises:
        LoweringError: nodes that the backend has nothing for; all are named. Or a size depends on values.
    """
    refuse_unknown(program)
    ready = prepare(program)
    choices = compress(ready)
    return replace(write(ready), choices=tuple(choices))


def write(ready: Program) -> Generated:
    """Generate the module of a prepared program: of one program always the same text.

    Raises:
        LoweringError: as `generate`.
    """
    missing = check(ready)
    if missing:
        raise LoweringError(f"{len(missing)} nodes cannot be lowered to Triton: {'; '.join(dict.fromkeys(missing))}")
    return _Module(ready).generate()


@dataclass
class _Module:
    program: Program
    kernels: dict[str, str] = field(default_factory=dict)  # body -> name
    definitions: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    externs: dict[tuple[str, str], int] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    made: dict[fx.Node, Buffer] = field(default_factory=dict)  # what generated kernels store
    launched: dict[int, tuple[str, int]] = field(default_factory=dict)  # by group: its kernel, bytes that it moves

    @cached_property
    def gpu(self) -> torch.device | None:
        """Where results are allocated if anything is on a GPU: kernels cannot write elsewhere."""
        values = [node.meta.get("val") for node in self.program.graph.nodes]
        return next(
            (value.device for value in values if isinstance(value, Tensor) and value.device.type == "cuda"), None
        )

    def generate(self) -> Generated:
        self.sizes = Sizes(self.program)
        self.planner = Planner(self.program, self.sizes)
        groups = self.planner.plan()
        self._check_refused()
        self.owned = {node for group in groups for node in group.nodes}  # those stored are contiguous
        self.named: dict[fx.Node, str] = {}
        self._inputs()
        for item in self.planner.order():
            if isinstance(item, Group):
                self._launch(item)
            elif kind(item) in ("kernel", "extern") or (kind(item) == "fused" and item in self.planner.refused):
                self._ready(item)
        outputs = self.program.graph.output_node().args[0]
        shown = [self._argument(item) for item in outputs]  # type: ignore[union-attr]
        self.lines.append(f"return [{', '.join(shown)}]")
        self.lines, memory = take_turns(self.lines, list(self.made.values()), self._parts())
        return Generated(
            self.program,
            self._source(),
            tuple(str(node.target) for node in self.program.graph.nodes if node.op == "get_attr"),
            tuple(tuple(str(node.target) for node in group.nodes) for group in groups),
            tuple((name, reason, count) for (name, reason), count in self.externs.items()),
            tuple(self._launches()),
            self._dot(),
            forms=self.forms,
            memory=memory,
        )

    def _launches(self) -> Iterator[dict[str, Any]]:
        """What runs, equal launches together, those that move most first; then library calls."""
        moved: dict[tuple[str, str], list[float]] = {}
        for item in self.planner.order():
            if isinstance(item, Group):
                kernel, moves = self.launched[id(item)]
                moved.setdefault((_operators(item.nodes), kernel), []).append(moves / 1e6)
            elif kind(item) == "kernel":
                function = KERNELS[item.target][0]
                moves = sum(self._bytes(node) for node in [*item.all_input_nodes, item])
                moved.setdefault((_operators([item]), f"{function} of kernels/"), []).append(moves / 1e6)
        for (operators, kernel), megabytes in sorted(moved.items(), key=lambda pair: -sum(pair[1])):
            total = round(sum(megabytes), 3)
            yield {"operators": operators, "by": kernel, "launches": len(megabytes), "megabytes": total}
        for (name, reason), count in self.externs.items():
            yield {"operators": name, "by": f"PyTorch: {reason}", "launches": count, "megabytes": None}

    def _bytes(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return 0
        return self.sizes.hints(self.sizes.shape(node)) * value.dtype.itemsize

    def _dot(self) -> str:
        """The launches and what each waits for."""
        order = [item for item in self.planner.order() if isinstance(item, Group) or kind(item) != "input"]
        places = {item: number for number, item in enumerate(order)}
        titles = [_operators(item.nodes) if isinstance(item, Group) else item.name for item in order]
        lines = [f'    {number} [label="{title}"];' for number, title in enumerate(titles)]
        lines += [
            f"    {places[first]} -> {places[second]};" for first, second in self.planner.edges() if first in places
        ]
        return "\n".join(["digraph {", "    node [shape=box];", *lines, "}"])

    def _check_refused(self) -> None:
        bad = [
            f"{node.target}: {reason}{source_of(node)}"
            for node, reason in self.planner.refused.items()
            if node.target not in EXTERN and node.users
        ]
        if bad:
            raise LoweringError(f"{len(bad)} nodes cannot be lowered to Triton: {'; '.join(dict.fromkeys(bad))}")

    # --- forward ------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        names = [self._name(node) for node in self.program.graph.nodes if node.op == "placeholder"]
        if names:
            self.lines.append(f"{', '.join(names)}{',' if len(names) == 1 else ''} = inputs")
        found: dict[str, str] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.named[node] = self._name(node)
                for axis, size in enumerate(self.sizes.shape(node)):
                    if isinstance(size, sympy.Symbol):
                        found.setdefault(str(size), f"{self._name(node)}.shape[{axis}]")
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            for axis, size in enumerate(self.sizes.shape(node)):
                for symbol in size.free_symbols:
                    if str(symbol) not in found:
                        found[str(symbol)] = self._solved(size, symbol, f"{self._name(node)}.shape[{axis}]")
        self.lines += [f"{name} = {code}" for name, code in found.items()]

    def _solved(self, size: sympy.Expr, symbol: sympy.Symbol, code: str) -> str:
        """What a symbol is where an input's size is a linear expression of it."""
        factor, rest = size.coeff(symbol), size.subs(symbol, 0)
        if sympy.expand(factor * symbol + rest - size) != 0:
            raise LoweringError(f"the size {text(size)} of an input does not say what {symbol} is")
        return f"({code} - {text(rest)}) // {text(factor)}"

    def _variable(self, node: fx.Node) -> str:
        """The name of a node's tensor in `forward`; what only views it is viewed when it is asked for."""
        if node not in self.named:
            if node.op == "get_attr":
                self.named[node] = self._name(node)
                self.lines.append(f"{self.named[node]} = weights[{str(node.target)!r}]")
            else:
                self._ready(node)
        return self.named[node]

    def _name(self, node: fx.Node) -> str:
        """The name of a node's tensor: that in the graph, or a longer one where it stands for something else here."""
        if node not in self.names:
            name = str(node.target) if node.op == "get_attr" else node.name
            found = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
            found = found if found[:1].isalpha() and not found.startswith("memory_") else f"x{found}"
            taken = RESERVED | set(self.program.symbols.values()) | set(self.names.values())
            while found in taken or found.endswith(("_kernel", "_combine", "_descriptor")):
                found += "_"
            self.names[node] = found
        return self.names[node]

    def _ready(self, node: fx.Node) -> None:
        """Call a view, a library kernel or a kernel of its own kind."""
        if node in self.named:
            return
        if kind(node) == "none" or (
            kind(node) in ("fused", "generator", "product") and node not in self.planner.refused
        ):
            raise LoweringError(f"{node.name} is read before it is computed")
        what = kind(node)
        if what == "kernel":
            function, names = KERNELS[node.target]
            pairs = [(names.get(name, name), value) for name, value in arguments(node).items() if value is not None]
            within = node in self.planner.inlined
            given = [f"{name}={self._argument(value)}" for name, value in pairs if not (within and name == "bias")]
            if within:
                given += self._bias(node)
            call = f"{function}({', '.join(given)})"
        elif node.target is operator.getitem:
            call = f"{self._argument(node.args[0])}[{node.args[1]}]"
        else:
            given = [self._argument(item) for item in node.args]
            given += [f"{name}={self._argument(item)}" for name, item in node.kwargs.items()]
            call = f"{node.target}({', '.join(given)})"
            if what != "view":
                reason = self.planner.refused.get(node) or EXTERN.get(node.target, ON_SIZES)
                key = (str(node.target), reason)
                self.externs[key] = self.externs.get(key, 0) + 1
        self.named[node] = self._name(node)
        self.lines.append(f"{self.named[node]} = {call}{self._comment(node)}")

    def _bias(self, node: fx.Node) -> list[str]:
        """The arguments of an attention whose kernel computes its bias."""
        kernel, given = attention_with_bias(self.planner, node, self._strides, self._mark)
        for item in kernel.inputs:
            given = [argument.replace(self._mark(item), self._variable(item)) for argument in given]
        return [f"extra=({', '.join(given)}{',' if given else ''})", f"kernel={self._define(kernel)}"]

    def _argument(self, item: Any) -> str:
        if isinstance(item, fx.Node):
            value = item.meta.get("val")
            if isinstance(value, Tensor | list | tuple):
                return self._variable(item)
            return text(self.sizes.of(value)) if not isinstance(value, float | bool) else repr(value)
        if isinstance(item, list | tuple):
            return f"[{', '.join(map(self._argument, item))}]"
        if isinstance(item, float) and item != item:
            return 'float("nan")'
        if isinstance(item, float) and item in (float("inf"), float("-inf")):
            return f'float("{item}")'
        if isinstance(item, torch.device):
            return f"torch.device({str(item)!r})"
        return repr(item)

    def _comment(self, node: fx.Node) -> str:
        return f"  # {self.sizes.describe(node.meta['val'])}"

    def _strides(self, node: fx.Node) -> tuple[sympy.Expr, ...] | None:
        """The strides of weights, and of what kernels here allocate."""
        if node.op == "get_attr":
            return tuple(sympy.Integer(step) for step in self.program.tensor(node).stride())
        if node in self.owned:
            return contiguous(self.sizes.shape(node))
        return None

    def _launch(self, group: Group) -> None:
        make = tile_kernel if group.anchor is None else product_kernel
        kernel = make(self.planner, group, self._strides, self._mark)
        names = {self._mark(node): self._variable(node) for node in kernel.inputs if node not in kernel.stored}
        for node in kernel.stored:
            size = ", ".join(text(item) for item in self.sizes.shape(node))
            device = self.gpu or node.meta["val"].device
            self.named[node] = self._name(node)
            names[self._mark(node)] = self.named[node]
            shape = f"({size}{',' if size and ', ' not in size else ''})"
            value, bytes_each = node.meta["val"], node.meta["val"].dtype.itemsize
            self.made[node] = Buffer(
                self.named[node], product(self.sizes.shape(node)) * bytes_each, self._bytes(node), len(self.lines),
                shape=shape, dtype=str(value.dtype), device=f"torch.device({str(device)!r})",
            )  # fmt: skip
            self.lines.append(self.made[node].alone())
        form = form_of(group, kernel)
        if form is not None:
            self.forms[self._define(kernel)] = form
        moves = sum(map(self._bytes, [*kernel.inputs, *kernel.stored]))
        self.launched[id(group)] = (self._define(kernel), moves)
        call = kernel.call.replace("{kernel}", self._define(kernel))
        for mark, name in names.items():
            call = call.replace(mark, name)
        self.lines.append(call)

    def _mark(self, node: fx.Node) -> str:
        """Stands for a tensor's name in a kernel's call, until what it reads has been computed."""
        return f"\0{node.name}\0"

    def _define(self, kernel: Kernel) -> str:
        if kernel.body not in self.kernels:
            taken = set(self.kernels.values())
            name, count = f"{kernel.name}_kernel", 0
            while name in taken:
                count += 1
                name = f"{kernel.name}_{count}_kernel"
            self.kernels[kernel.body] = name
            self.definitions.append(kernel.source(name))
        return self.kernels[kernel.body]

    def _parts(self) -> dict[str, frozenset[str]]:
        """The buffers that each tensor may lie in: what a library call gives may be a view of what it reads."""
        found: dict[fx.Node, frozenset[str]] = {}
        for node in self.program.graph.nodes:
            if node in self.made:
                found[node] = frozenset([self.named[node]])
            elif node.op == "call_function" and kind(node) not in ("kernel", "size"):
                found[node] = frozenset().union(*(found.get(used, frozenset()) for used in node.all_input_nodes))
        return {name: found.get(node, frozenset()) for node, name in self.named.items()}

    # --- text ---------------------------------------------------------------------------------------------------

    def _source(self) -> str:
        lines = released(self.lines, {name for node, name in self.named.items() if node.op == "call_function"})
        placed = [PLACED] if any("= placed(" in line for line in lines) else []
        own = "\n\n".join([*self.definitions, *placed, FORWARD + "".join(f"{INDENT}{line}\n" for line in lines)])
        return "\n\n".join([HEAD, *_library(own), own])


HEAD = '''"""Generated by fxpress: kernels, and `forward`, which launches them in order."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, device

aten = torch.ops.aten
'''
FORWARD = '''def forward(inputs, weights):
    """A list of outputs, from tensors in the order of the program's inputs and its weights by name."""
'''
LIBRARY: tuple[ModuleType, ...] = (
    elementwise, float8, launch, matmul_tiles, matmul_descriptor, matmul, matmul_configs, int4_matmul, sparse24_matmul,
    float8_matmul, attention, block_attention, linear_attention, conv_attention, gathered_attention, pseudo_inverse,
)  # fmt: skip
RESERVED = {"torch", "triton", "tl", "math", "aten", "device", "Tensor", "inputs", "weights", "forward"}
RESERVED |= {"placed", "max"}
RESERVED |= {name for module in LIBRARY for name in vars(module)}


def _operators(nodes: Sequence[fx.Node]) -> str:
    """What is computed, in order: `linear add gelu`."""
    return " ".join(str(node.target).split(".")[1] for node in nodes)


@functools.cache
def _parts() -> dict[str, str]:
    """The functions and constants of our kernels by name."""
    known: dict[str, str] = {}
    for module in LIBRARY:
        source = inspect.getsource(module)
        lines = source.splitlines()
        for item in ast.parse(source).body:
            if isinstance(item, ast.FunctionDef | ast.ClassDef):
                first = min([item.lineno, *(decorator.lineno for decorator in item.decorator_list)])
                known[item.name] = "\n".join(lines[first - 1 : item.end_lineno])
            elif isinstance(item, ast.Assign | ast.AnnAssign):
                targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                for target in targets:
                    known[ast.unparse(target)] = "\n".join(lines[item.lineno - 1 : item.end_lineno])
    return known


def _library(code: str) -> Iterator[str]:
    """The functions and constants of our kernels that some code names, directly or through others, in their order."""
    known = _parts()
    needed: set[str] = set()
    waiting = [code]
    while waiting:
        named = set(re.findall(r"\b\w+\b", waiting.pop())) & known.keys() - needed
        needed |= named
        waiting += [known[name] for name in named]
    yield from dict.fromkeys(part for name, part in known.items() if name in needed)
