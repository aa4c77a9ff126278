"""The source of one generated kernel, and of the call that launches it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.graph import Program, arguments
from ...ir.ops.float8 import FLOAT8
from ...kernels.attention import attention_kernel
from ...kernels.float8_matmul import float8_matmul_kernel
from ...kernels.int4_matmul import int4_matmul_kernel
from ...kernels.matmul import matmul_combine_kernel, matmul_kernel
from ...kernels.matmul_descriptor import matmul_descriptor_kernel, matmul_persistent_kernel
from ...kernels.sparse24_matmul import sparse24_matmul_kernel
from .emitter import Emitter
from .lowerings.elements import result_dtype
from .lowerings.products import product_of
from .partition import Group, Planner
from .sizes import Sizes, text

INDENT = "    "
HEAVY = ("tl.erf", "tl.exp", "tl.log", "tl.sin", "tl.cos", "tanh(", "sigmoid(", "power(", "log1p(", "expm1(",
         "fmod(", "floor_mod(", "floor_quotient(")  # fmt: skip
MATMUL = {
    "combine": matmul_combine_kernel,
    "descriptor": matmul_descriptor_kernel,
    "persistent": matmul_persistent_kernel,
}
# By the function of kernels/ that launches a product: the kernels that take an epilogue, in the order in which the
# function takes them; what is added to the first one's name for the others.
TEMPLATES: dict[str, dict[str, Any]] = {
    "matmul": {"": matmul_kernel, **MATMUL},
    "int4_matmul": {"": int4_matmul_kernel, "whole": matmul_kernel, **MATMUL},
    "sparse24_matmul": {"": sparse24_matmul_kernel},
    "float8_matmul": {"": float8_matmul_kernel},
}
DENSE = {"whole": matmul_kernel, **MATMUL}  # where there is a dense weight beside the compressed one


@dataclass(frozen=True)
class Kernel:
    """A kernel without its name, so that the equal kernels of equal layers are one.

    Attributes:
        name: what it would be called.
        body: parameters and lines.
        call: the launch, with `{kernel}` for the kernel's name and the graph's names for tensors.
        stored: the nodes that it stores.
    """

    name: str
    body: str
    call: str
    inputs: tuple[fx.Node, ...]
    stored: tuple[fx.Node, ...]
    others: Mapping[str, str] = field(default_factory=dict)  # bodies of its variants, by what is added to its name

    def source(self, name: str) -> str:
        """The definition under a name."""
        bodies = {name: self.body, **{f"{name}_{variant}": body for variant, body in self.others.items()}}
        return "\n\n".join(f"@triton.jit\ndef {title}(\n{body}" for title, body in bodies.items())


def tile_kernel(
    planner: Planner, group: Group, strides: Callable[[fx.Node], Any], variable: Callable[[fx.Node], str]
) -> Kernel:
    """A kernel of elementwise operators and reductions.

    Args:
        strides: of what is read, where they are known.
        variable: the name of a tensor in the generated `forward`.
    """
    emitter, stored = planner.emit(group, strides)
    sizes, frame = planner.sizes, emitter.frame
    body = emitter.lines()
    count_rows, count_columns = frame.size(frame.rows), frame.size(frame.columns)
    head = [
        "rows = (tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX))[:, None]",
        f"row_inside = rows < {emitter.text(count_rows)}",
    ]
    if not frame.looped:
        first = "" if frame.reduces else "tl.program_id(1).to(INDEX) * COLS + "
        head += [
            f"cols = ({first}tl.arange(0, COLS).to(INDEX))[None, :]",
            f"col_inside = cols < {emitter.text(count_columns)}",
            "inside = row_inside & col_inside",
        ]
    axes = [
        f"{name} = {emitter.text(place)}"
        for name, place in frame.definitions(set(emitter.symbols))
        if not (frame.looped and emitter.moves(place))
    ]
    names = parameters(planner.program, sizes, emitter, stored)
    widen = [f"{name} = tl.cast({name}, INDEX)" for name in names.sizes]
    lines = [*widen, *head, *axes, *body]
    call = (
        f"{'launch_rows' if frame.reduces else 'launch_tiles'}({{kernel}}, {text(count_rows)}, {text(count_columns)}, "
    )
    call += ", ".join(names.arguments(variable)) + (", looped=True)" if frame.looped else ")")
    written = [
        f"{INDENT}{line}\n"
        for line in (*names.lines(), "INDEX: tl.constexpr,", "ROWS: tl.constexpr,", "COLS: tl.constexpr,")
    ]
    text_of_body = "".join(written) + "):\n" + "".join(f"{INDENT}{line}\n" for line in lines)
    return Kernel(group.name, text_of_body, call, tuple(emitter.inputs), tuple(stored))


def product_kernel(
    planner: Planner, group: Group, strides: Callable[[fx.Node], Any], variable: Callable[[fx.Node], str]
) -> Kernel:
    """A matrix product and what is computed of it, in the kernels of `TEMPLATES`."""
    emitter, stored = planner.emit(group, strides)
    assert group.anchor is not None
    product = product_of(group.anchor)
    axes = [f"{name} = {emitter.text(place)}" for name, place in emitter.frame.definitions(set(emitter.symbols))]
    names = parameters(planner.program, planner.sizes, emitter, stored)
    widen = [f"{name} = tl.cast({name}, tl.int64)" for name in names.sizes]
    head = ["batch = tl.full([1, 1], 0, tl.int64) + batch", "row_inside = rows < M", "col_inside = cols < N"]
    epilogue = [*head, *axes, *emitter.lines()]
    hooks = {"parameters": names.lines(), "epilogue": [*widen, *epilogue]}
    sums = "tl.int32" if result_dtype(group.anchor) in (torch.int32, torch.int64) else "tl.float32"
    library = f"acc = acc.to({sums})  # of a library's product, too"
    special = {
        "combine": {**hooks, "epilogue": [library, *widen, *epilogue]},
        "persistent": {**hooks, "before": widen, "epilogue": epilogue},  # in a loop variables keep their types
    }
    templates = TEMPLATES[product.function] | (DENSE if "dense" in product.others else {})
    body, *others = (spliced(kernel, special.get(variant, hooks)) for variant, kernel in templates.items())
    variants = [variant for variant in templates if variant]
    left = variable(product.left)
    if product.function == "matmul" and not product.batched:
        left = f"linear_rows({left})"
    right = variable(product.right) + ("" if product.transposed else ".transpose(-1, -2)")
    given = [left, right, *(f"{name}={variable(node)}" for name, node in product.others.items())]
    given.append(f"extra=({', '.join(names.arguments(variable))},)")
    kernels = ["{kernel}", *(f"{{kernel}}_{variant}" for variant in variants)]
    given.append(f"kernels=({', '.join(kernels)}{'' if variants else ','})")
    if any(name in line for line in epilogue for name in HEAVY) and product.function == "matmul":
        given.append("sums=64")
    call = f"{product.function}({', '.join(given)})"
    reads = dict.fromkeys([*product.operands, *emitter.inputs])
    return Kernel(group.name, body, call, tuple(reads), tuple(stored), dict(zip(variants, others, strict=True)))


def form_of(group: Group, kernel: Kernel) -> str | None:
    """Whether libraries have a product's epilogue: "plain", none at all; "bias", a vector that is added; else None.

    Its arguments begin with the vector, if any, and the result.
    """
    anchor, nodes = group.anchor, group.nodes
    if anchor is None or anchor is not nodes[0] or kernel.stored != (nodes[-1],) or len(nodes) > 2:
        return None
    if len(nodes) == 1:
        return "plain"
    given = arguments(nodes[1])
    pair = [given.get("self"), given.get("other")]
    if nodes[1].target is not torch.ops.aten.add.Tensor or given["alpha"] != 1 or pair.count(anchor) != 1:
        return None
    vector = pair[1 - pair.index(anchor)]
    if not isinstance(vector, fx.Node) or vector.op != "get_attr":
        return None
    found, dtype = vector.meta["val"], result_dtype(anchor)
    same = found.dtype == dtype == result_dtype(nodes[1])
    return "bias" if same and tuple(found.shape) == (anchor.meta["val"].shape[-1],) else None


def attention_with_bias(
    planner: Planner, node: fx.Node, strides: Callable[[fx.Node], Any], variable: Callable[[fx.Node], str]
) -> tuple[Kernel, list[str]]:
    """The kernel of kernels/attention.py with a bias that is computed in it, and the arguments that are read for it."""
    emitter, bias = planner.emit_bias(node, strides)
    added = f"tl.where({bias}, scores, -float('inf'))" if bias.dtype is torch.bool else f"scores + {bias}"
    lines = emitter.lines()
    names = parameters(planner.program, planner.sizes, emitter, ())
    head = [
        "at_batch = tl.full([1, 1], 0, tl.int64) + batch",
        "at_head = tl.full([1, 1], 0, tl.int64) + head",
        "at_i, at_j = i.to(tl.int64), j.to(tl.int64)",
        "row_inside, col_inside = at_i < num_queries, at_j < num_keys",
    ]
    body = spliced(attention_kernel, {"parameters": names.lines(), "scores": [*head, *lines, f"scores = {added}"]})
    return Kernel("attention_bias", body, "", tuple(emitter.inputs), ()), names.arguments(variable)


def spliced(kernel: Any, hooks: Mapping[str, Sequence[str]]) -> str:
    """The source of a kernel from its parameters on, with generated lines in place of those of its hooks."""
    source = _source(kernel.fn)
    found: list[str] = []
    skipping = False
    for line in source[source.index("(\n") + 2 :].splitlines():
        hook = line.strip().removeprefix("# hook: ").split(" ")[0] if line.strip().startswith("# hook: ") else None
        if hook is not None:
            margin = line[: len(line) - len(line.lstrip())]
            found += [margin + new for new in hooks[hook]]
        skipping = (skipping or hook is not None) and line.strip() != "# end"
        if not skipping and line.strip() != "# end":
            found.append(line)
    return "\n".join(found) + "\n"


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    return inspect.getsource(function)


@dataclass(frozen=True)
class Parameters:
    """What a generated kernel takes: tensors, sizes, strides."""

    emitter: Emitter
    stored: tuple[fx.Node, ...]
    sizes: tuple[str, ...]
    program: Program

    def lines(self) -> list[str]:
        """The parameters, a tensor a line, with what each is."""
        found = []
        for source in self.emitter.inputs.values():
            found.append(f"{source.name},  # {self._what(source.node)}")
        for number, node in enumerate(self.stored):
            found.append(f"out{number},  # {self._what(node)}")
        if self.sizes:
            found.append(f"{', '.join(self.sizes)},")
        strides = [f"{source.name}_s{axis}" for source in self.emitter.inputs.values() for axis in source.given]
        if strides:
            found.append(f"{', '.join(strides)},")
        return found

    def arguments(self, variable: Callable[[fx.Node], str]) -> list[str]:
        """What is given for them in `forward`."""
        nodes = [*(source.node for source in self.emitter.inputs.values()), *self.stored]
        found = [variable(node) + (".view(torch.uint8)" if result_dtype(node) is FLOAT8 else "") for node in nodes]
        found += self.sizes
        found += [
            f"{variable(source.node)}.stride({axis})"
            for source in self.emitter.inputs.values()
            for axis in source.given
        ]
        return found

    def _what(self, node: fx.Node) -> str:
        return self.emitter.sizes.describe(node.meta["val"])


def parameters(program: Program, sizes: Sizes, emitter: Emitter, stored: Sequence[fx.Node]) -> Parameters:
    """The parameters of a kernel whose lines are complete."""
    known = set(program.symbols.values())
    return Parameters(emitter, tuple(stored), tuple(name for name in emitter.symbols if name in known), program)
