"""Program: a torch.fx graph of ATen and fxpress operators with its signature, and edits that keep it well-formed."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_unflatten

from .errors import RewriteError
from .ops import (  # noqa: F401  # the families register their operators
    align,
    attention,
    block_attention,
    conv_attention,
    float8,
    int8_attention,
    integer,
    linear,
    linear_attention,
    low_rank_attention,
    lsh_attention,
    norm,
    padding,
    pool,
    quantize,
    rotary,
    sparse,
    table,
    window_attention,
)
from .signature import Signature


@dataclass(frozen=True)
class Program:
    """A functional graph whose placeholders are the tensors of `signature`, in order.

    Nodes are ATen operators as torch.export gives them before decomposition, fxpress operators, and arithmetic on
    sizes. Weights are `get_attr` nodes at the top. Each node's `meta["val"]` is its fake value (shape, dtype, device).
    `module` runs as ordinary PyTorch and can be trained; calling the Program takes and gives what the model did.
    """

    module: fx.GraphModule
    signature: Signature
    out_spec: TreeSpec
    symbols: Mapping[str, str]  # torch's name of each symbolic size -> its name in the signature and in printed text

    @property
    def graph(self) -> fx.Graph:
        """The graph of `module`."""
        return self.module.graph

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode in which every `meta["val"]` lives."""
        for node in self.graph.nodes:
            if isinstance(value := node.meta.get("val"), torch._subclasses.FakeTensor):
                return value.fake_mode
        raise RewriteError("the program has no tensor with known shape; trace the model again")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph in PyTorch; takes and gives what the traced model did.

        Raises:
            InputError: arguments that the program was not traced for.
        """
        return tree_unflatten(list(self.run(self.signature.bind(args, kwargs))), self.out_spec)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run on flat inputs (the order of `signature.inputs`), giving flat outputs."""
        result: tuple[Any, ...] = self.module(*tensors)
        return result

    def copy(self) -> Program:
        """The same program with a graph of its own; weights are shared."""
        return replace(self, module=fx.GraphModule(self.module, copy_graph(self.graph)))

    def calls(self, *targets: Any) -> list[fx.Node]:
        """The nodes that call one of `targets`, in graph order."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]

    def tensor(self, node: fx.Node) -> Tensor:
        """The weight that a `get_attr` node reads."""
        weight: Tensor = attribute(self.module, str(node.target))
        return weight

    def computed(self, node: fx.Node) -> Tensor:
        """The value of a node that reads weights alone, without a gradient."""
        if node.op == "get_attr":
            return self.tensor(node).detach()
        assert callable(node.target)
        with torch.no_grad():
            found: Tensor = node.target(*fx.map_arg(node.args, self.computed), **fx.map_arg(node.kwargs, self.computed))
        return found

    def values(self, nodes: Sequence[fx.Node], inputs: Sequence[Tensor]) -> list[Any]:
        """What nodes are worth on flat inputs, without a gradient; what they do not depend on is not run."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in nodes))
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        with torch.no_grad():
            return list(fx.GraphModule(self.module, graph)(*inputs))

    # --- edits -------------------------------------------------------------------------------------------------

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        before: fx.Node,
        like: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call before a node, with its fake value computed and its source line taken from `like`.

        Raises:
            RewriteError: if the operator does not accept these arguments.
        """
        with self.graph.inserting_before(before):
            name = target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else None
            node = self.graph.create_node("call_function", target, args, kwargs, name)
        source = like or before
        node.meta.update({key: source.meta[key] for key in ("stack_trace", "nn_module_stack") if key in source.meta})
        try:
            node.meta["val"] = fake_result(self, node)
            mark_current(node)
        except Exception as error:
            name = node.name
            self.graph.erase_node(node)
            raise RewriteError(f"cannot insert {name}: {error}") from error
        return node

    def call_again(self, node: fx.Node, **changes: Any) -> fx.Node:
        """Insert the call of a node once more before it, with some arguments changed and none at its default.

        Raises:
            RewriteError: if the operator does not accept the changed arguments.
        """
        assert isinstance(node.target, torch._ops.OpOverload)
        given = {**arguments(node), **changes}
        schema = node.target._schema.arguments
        args = [given[argument.name] for argument in schema if not argument.has_default_value()]
        options = {
            argument.name: given[argument.name]
            for argument in schema
            if argument.has_default_value() and not _is_default(given[argument.name], argument.default_value)
        }
        return self.call(node.target, *args, before=node, **options)

    def add_weight(self, name: str, tensor: Tensor, *, trainable: bool | None = None) -> fx.Node:
        """Store a new weight under a name like `name` and return the node that reads it, at the top of the graph.

        `trainable` defaults to whether `tensor` requires a gradient or is a parameter that does.
        """
        name = re.sub(r"\.", "_", identifier(name))
        unique, count = name, 0
        while hasattr(self.module, unique):
            count += 1
            unique = f"{name}_{count}"
        trainable = tensor.requires_grad if trainable is None else trainable
        if trainable:
            self.module.register_parameter(unique, torch.nn.Parameter(tensor.detach().clone()))
        else:
            self.module.register_buffer(unique, tensor.detach().clone())
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(unique)
        node.meta["val"] = self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)
        return node

    def set_weight(self, node: fx.Node, tensor: Tensor) -> None:
        """Let a `get_attr` node read another tensor under its name, a parameter as before or a buffer as before."""
        owner, _, leaf = str(node.target).rpartition(".")
        holder, old = self.module.get_submodule(owner), self.tensor(node)
        delattr(holder, leaf)
        if isinstance(old, torch.nn.Parameter):
            holder.register_parameter(leaf, torch.nn.Parameter(tensor.detach().clone(), old.requires_grad))
        else:
            holder.register_buffer(leaf, tensor.detach().clone())
        node.meta["val"] = self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)

    def set_longest(self, symbol: str, size: int) -> None:
        """Let a symbolic size of the signature be as large as `size`; copies of the program keep theirs."""
        ranges = {**self.signature.ranges, symbol: (self.signature.ranges[symbol][0], size)}
        object.__setattr__(self, "signature", replace(self.signature, ranges=ranges))

    def refresh(self, nodes: Sequence[fx.Node]) -> None:
        """Compute the fake values of weights' and calls' readers anew, where those of their arguments changed.

        Args:
            nodes: whose values or arguments changed.
        """
        changed = set(nodes)
        for node in self.graph.nodes:
            if node.op != "call_function" or not (node in changed or changed.intersection(node.all_input_nodes)):
                continue
            before = node.meta["val"]
            node.meta["val"] = fake_result(self, node)
            mark_current(node)
            if not same_value(before, node.meta["val"]):
                changed.add(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` read `new`, which must have the same shape and dtype; `old` is erased if unused.

        Raises:
            RewriteError: if shape or dtype differ.
        """
        before, after = describe_value(old.meta.get("val")), describe_value(new.meta.get("val"))
        if before != after and not same_value(old.meta.get("val"), new.meta.get("val")):
            raise RewriteError(f"cannot replace {old.name}: {before} by {new.name}: {after}{source_of(old)}")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if not old.users:
            self.graph.erase_node(old)

    def clean(self) -> None:
        """Erase what nothing reads (calls, then weights) and recompile the module."""
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        tensors = [*self.module.named_parameters(remove_duplicate=False)]
        tensors += self.module.named_buffers(remove_duplicate=False)  # type: ignore[arg-type]
        for name, _ in tensors:
            if name not in used:
                owner, _, leaf = name.rpartition(".")
                delattr(self.module.get_submodule(owner), leaf)
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with the metadata of every node."""
    copied = fx.Graph()
    names: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        names[node] = copied.node_copy(node, lambda used: names[used])
        if is_current(node):
            mark_current(names[node])
    return copied


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a dotted path names below a module."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def identifier(name: str) -> str:
    """A dotted path of identifiers made from any name, so that generated code cannot contain what a user wrote."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in name.split(".")]
    return ".".join(f"_{part}" if not part or part[0].isdigit() or keyword.iskeyword(part) else part for part in parts)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name with defaults filled in, however they were spelled; `0`, `1` without schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def shape(node: Any) -> tuple[Any, ...]:
    """The (possibly symbolic) shape of a node's value."""
    return tuple(node.meta["val"].shape)


def dtype(node: Any) -> torch.dtype:
    """The dtype of a node's value."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def same_sizes(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal; unknown counts as different, and no guard is added."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(first) == len(second) and all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


def same_value(first: Any, second: Any) -> bool:
    """Whether two fake values have the same structure, dtypes and shapes."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and same_sizes(first.shape, second.shape)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(same_value(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return same_sizes([first], [second])


def fake_result(program: Program, node: fx.Node) -> Any:
    """What a call gives on the fake values of its arguments."""
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
    args, kwargs = values
    assert callable(node.target)
    with program.fake_mode, torch.no_grad(), enable_python_dispatcher():  # the C++ kernels of some take no symbols
        return node.target(*args, **kwargs)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, fx.Node) and type(value) is type(default) and value == default)


def _fake_inputs(node: fx.Node) -> tuple[Any, ...]:
    """The call and the fake values that its own fake value was computed from."""
    return (node.target, node.args, node.kwargs, *(used.meta.get("val") for used in node.all_input_nodes))


def mark_current(node: fx.Node) -> None:
    """Note that a call's fake value is what running it on its arguments' fake values gives."""
    node.meta["fake_inputs"] = (node.meta["val"], *_fake_inputs(node))


def is_current(node: fx.Node) -> bool:
    """Whether the call, its arguments' fake values and its own are the very objects that `mark_current` saw."""
    noted = node.meta.get("fake_inputs", ())
    now = (node.meta.get("val"), *_fake_inputs(node))
    return len(noted) == len(now) and all(a is b for a, b in zip(noted, now, strict=True))


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def short_dtype(dtype: torch.dtype) -> str:
    """`f32`, `i64`, `bool`: the dtype as printed in graphs."""
    name = str(dtype).removeprefix("torch.")
    match = re.fullmatch(r"(bfloat|float|uint|int|complex)(\d+)", name)
    return f"{_SHORT[match[1]]}{match[2]}" if match else name


def describe_value(value: Any, symbols: Mapping[str, str] | None = None) -> str:
    """`f32[d0, 384]` for a tensor, `d0` for a size, `(a, b)` for several."""
    if isinstance(value, Tensor):
        return f"{short_dtype(value.dtype)}[{', '.join(size_text(size, symbols) for size in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(describe_value(item, symbols) for item in value)})"
    return size_text(value, symbols)


def size_text(size: Any, symbols: Mapping[str, str] | None = None) -> str:
    """A size as text, with torch's symbols renamed."""
    text = str(size)
    if not symbols or isinstance(size, int):
        return text
    return re.sub(r"\b[su]\d+\b", lambda found: symbols.get(found[0], found[0]), text)


def source_of(node: fx.Node) -> str:
    """` (model.py:12: x = self.f(x))`: the user's line that a node comes from, or nothing."""
    found = re.findall(r'File "(.+)", line (\d+), in \S+\n(.*)', node.meta.get("stack_trace") or "")
    own = [entry for entry in found if not re.search(r"[/\\]torch[/\\]", entry[0])] or found
    if not own:
        return ""
    path, line, code = own[-1]
    return f" ({Path(path).name}:{line}{': ' + code.strip() if code.strip() else ''})"


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that a node was traced in, `encoder.layer.0.attention`; empty at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return re.sub(r"\['?([^\]']+)'?\]", r"\1", paths[-1]) if paths else ""
