"""Tracing: from an nn.Module (or torch.export's ExportedProgram) and an example to a Program."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import keyword
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ..ir.errors import InputError, TraceError, one_line
from ..ir.graph import Program, fake_result, mark_current, size_text
from ..ir.signature import ConstantInput, Signature, TensorInput, describe, leaves
from . import hf
from .copying import copy_calls, copy_weights

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def trace(
    model: torch.nn.Module | ExportedProgram,
    args: Arguments,
    dynamic_shapes: Any = "auto",
    fixed: Collection[tuple[str, int]] = (),
) -> Program:
    """Trace a model on an example, under no_grad, in evaluation mode.

    Args:
        model: the model; it is not changed, the program has weights of its own (tied ones stay tied).
        args: positional and named example arguments, as `bind_example` gives them.
        dynamic_shapes: "auto": every axis that can vary stays dynamic, batch and length of size 1 included; None: all
            sizes are fixed; else torch.export's own form, and an axis declared there that cannot vary is an error.
        fixed: axes that "auto" leaves out, each the path of an input and the number of an axis of it.

    Raises:
        TraceError: torch.export cannot trace the model; names the line of the user's code.
        InputError: a weight or input name that could not safely appear in generated code.
    """
    hf.register_caches()
    if isinstance(model, ExportedProgram):
        return _to_program(model, _positional_names(model), model.example_inputs or ((), {}))
    check_names(model, args)
    args = _distinct(model, args)
    model = _spelled_out(model, args[1])
    positional = parameter_names(model, len(args[0]))
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise InputError(f"dynamic_shapes is {dynamic_shapes!r}; give 'auto', None, or torch.export's own form")
    if isinstance(dynamic_shapes, tuple | list):
        dynamic_shapes = dict(zip(positional, dynamic_shapes, strict=False))
    if dynamic_shapes != "auto":
        return _to_program(_export(model, args, dynamic_shapes), positional, args)
    failure: TraceError | None = None
    for example in _widened(args):
        try:
            axes = _every_axis(model, example, _paths(positional, example), fixed)
            return _to_program(_export(model, example, axes), positional, example)
        except TraceError as error:
            failure = failure or error
    raise failure or TraceError("the model has no inputs")


def bind_example(model: torch.nn.Module, example: Any) -> Arguments:
    """Example inputs (a dict of named ones or a tuple of positional ones) as arguments, by name where possible.

    Raises:
        InputError: another kind of example, no tensor in it, or names that the model does not take.
    """
    if isinstance(example, Mapping):
        args, kwargs = (), {str(name): value for name, value in example.items()}
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        found = describe(example)
        raise InputError(f"example_inputs must be a dict of named or a tuple of positional inputs, found {found}")
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from error
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise InputError("the example inputs hold no tensor")
    parameters = inspect.signature(model.forward).parameters
    by_name = [name for name, kind in parameters.items() if kind.kind is kind.POSITIONAL_OR_KEYWORD]
    if any(parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
           for name in bound.arguments):  # fmt: skip
        return args, kwargs
    return (), {**dict(zip(by_name, args, strict=False)), **kwargs}


def parameter_names(model: torch.nn.Module, count: int = 0) -> tuple[str, ...]:
    """The names of the arguments of forward that may be given by position; of `*rest`, to `count`: rest.0, rest.1."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [item.name for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
    rest = [item.name for item in parameters if item.kind is item.VAR_POSITIONAL]
    return (*names, *(f"{name}.{place}" for name in rest for place in range(count - len(names))))


def _spelled_out(model: torch.nn.Module, named: Mapping[str, Any]) -> torch.nn.Module:
    """The model with a parameter of forward for each input that it takes by `**kwargs`.

    torch.export fails on these beside dynamic shapes, and transformers' models take `output_hidden_states` so.
    """
    forward: Any = model.forward
    signature = inspect.signature(forward)
    others = [name for name in named if name not in signature.parameters]
    if not others:
        return model
    known = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others]

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    found = copy.copy(model)
    call.__signature__ = signature.replace(parameters=[*known, *added])  # type: ignore[attr-defined]
    found.forward = call
    return found


def _distinct(model: torch.nn.Module, args: Arguments) -> Arguments:
    """The example with a tensor of its own for each input: one object is one input to torch.export, or a weight."""
    taken = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        found = leaf.detach().clone() if id(leaf) in taken else leaf
        taken.add(id(found))
        return found

    distinct: Arguments = pytree.tree_map(own, args)
    return distinct


def check_names(model: torch.nn.Module, args: Arguments) -> None:
    """Refuse names that could break out of the code that torch generates while tracing.

    torch.fx writes `getattr(self, "<name>")` unescaped, and named inputs become parameters of a function.

    Raises:
        InputError: names the offender.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name in [*(name for name, _ in tensors), *(name for name, _ in model.named_modules())]:
        if re.search(r"""["'\\()]""", name) or not (name == "" or name.isprintable()):
            raise InputError(f"the name {name!r} of a weight or module cannot be used in a graph; rename it")
        taken = [
            part for part in name.split(".") if keyword.iskeyword(part) or (part and hasattr(fx.GraphModule, part))
        ]
        if taken and (name.split(".")[0] in taken or keyword.iskeyword(taken[0])):
            raise InputError(f"the name {name!r} of a weight or module has a meaning of its own in a graph; rename it")
    for name in args[1]:
        if not name.isidentifier():
            raise InputError(f"the input name {name!r} is no identifier; rename it")


# --- dynamic axes ----------------------------------------------------------------------------------------------


def _every_axis(
    model: torch.nn.Module, args: Arguments, paths: Sequence[str], fixed: Collection[tuple[str, int]]
) -> Any:
    """torch.export's dynamic_shapes with every axis of every tensor left to it, but for those that are fixed."""
    named = dict(zip(map(id, pytree.tree_leaves(args)), paths, strict=True))

    def axes(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        path = named[id(leaf)]
        return {axis: Dim.STATIC if (path, axis) in fixed else Dim.AUTO for axis in range(leaf.dim())}

    spec = pytree.tree_map(axes, args)
    return dict(inspect.signature(model.forward).bind(*spec[0], **spec[1]).arguments)


def _paths(positional: Sequence[str], args: Arguments) -> list[str]:
    """The dotted path of each leaf of some arguments, in order."""
    given = [*zip(positional, args[0], strict=False), *args[1].items()]
    return [path for name, value in given for path, _ in leaves(value, name)]


def _widened(args: Arguments) -> Iterator[Arguments]:
    """The example, with axes of size 1 doubled as far as the model may bear it: torch.export fixes sizes 0 and 1."""
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
    lone_batch = bool(tensors) and all(tensor.shape[0] == 1 for tensor in tensors)

    def double(leaf: Any, axes: Sequence[int]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis in axes:
            if axis < leaf.dim() and leaf.shape[axis] == 1:
                leaf = torch.cat([leaf, leaf], axis)
        return leaf

    lone_length = any(tensor.dim() == 2 and tensor.shape[1] == 1 for tensor in tensors)
    batch = (0,) if lone_batch else ()
    for axes in ([(*batch, 1)] if lone_length else []) + ([batch] if batch else []) + [()]:
        yield pytree.tree_map(lambda leaf, axes=axes: double(leaf, axes), args)


def _export(model: torch.nn.Module, args: Arguments, dynamic_shapes: Any) -> ExportedProgram:
    try:
        with (
            _without_dump(),
            torch.no_grad(),
            _no_mask_inspection(),
            plain_attention(),
            hf.traceable_experts(),
            hf.broadcast_masks(),
        ):
            return torch.export.export(model, *args, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise TraceError(f"cannot trace {type(model).__name__}{_user_line(error)}: {one_line(error)}") from error


@contextlib.contextmanager
def _without_dump() -> Iterator[None]:
    """Keep the graph that torch.export prints when it fails, hundreds of lines, off stderr; the rest is passed on."""
    written, dumped = io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(written):
            yield
    except Exception as error:
        dumped = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(written.getvalue().replace(dumped, "") if dumped.strip() else written.getvalue())


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep nn.TransformerEncoder off its inference path, which gives zeros for padding where its own graph does not."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _no_mask_inspection() -> Iterator[None]:
    """Keep nn.Transformer from looking into a mask's values to find out whether it is causal.

    A trace cannot branch on values. The answer is only a hint for faster kernels: the mask itself is applied in full.
    """
    layers: Any = torch.nn.modules.transformer
    usual = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = usual


def _user_line(error: BaseException) -> str:
    """` at file.py:12 in forward: code`: the deepest line of the failure that is not torch's, Python's or fxpress's."""
    package = Path(__file__).parents[1]
    folders = [package / name for name in ("backends", "compiler", "ir", "passes")]
    specs = [importlib.util.find_spec(name) for name in ("torch", "sympy", "contextlib")]
    folders += [Path(str(spec.origin)).parent for spec in specs if spec is not None]

    def foreign(file: Path) -> bool:
        installed = "site-packages" in file.parts  # lies below Python's own folder, but is no part of it
        return any(file.is_relative_to(folder) for folder in (folders[:-1] if installed else folders))

    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not foreign(Path(frame.filename))
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f" at {Path(last.filename).name}:{last.lineno} in {last.name}: {last.line}"


# --- from ExportedProgram to Program ---------------------------------------------------------------------------


def _positional_names(exported: ExportedProgram) -> tuple[str, ...]:
    args_spec = exported.call_spec.in_spec.children()[0]
    users = list(exported.graph_signature.user_inputs)
    names, taken = [], 0
    for index, child in enumerate(args_spec.children()):
        leaf = child.num_leaves == 1 and child.is_leaf()
        names.append(str(users[taken]) if leaf else f"arg{index}")
        taken += child.num_leaves
    return tuple(names)


def _to_program(exported: ExportedProgram, positional: Sequence[str], args: Arguments) -> Program:
    source = exported.module(check_guards=False)
    module, graph = torch.nn.Module(), fx.Graph()
    copies: dict[fx.Node, Any] = {}
    copy_weights(source, module, graph, copies)
    copy_calls(source, graph, copies)
    paths = _paths(positional, args)
    placeholders = [node for node in source.graph.nodes if node.op == "placeholder"]
    symbols = symbols_of(placeholders)
    inputs, constants = [], []
    names = {"torch", *(node.name for node in graph.nodes if node.op != "placeholder")}
    for path, node in zip(paths, placeholders, strict=True):
        value = node.meta.get("val")
        if str(copies[node].target) == "torch":  # what torch.fx writes calls of it in the function's body
            copies[node]._rename("torch_")
        if str(copies[node].target) in names:  # as a weight's, which would hide it in the function's body
            copies[node].target = copies[node].name
        if isinstance(value, Tensor):
            sizes = tuple(stated(size_text(size, symbols)) for size in value.shape)
            dtype = str(value.dtype).removeprefix("torch.")
            inputs.append(TensorInput(path, str(copies[node].target), dtype, sizes))
        else:
            constants.append(ConstantInput(path, value))
            graph.erase_node(copies[node])
    spec = exported.call_spec.out_spec
    program = Program(
        module=fx.GraphModule(module, graph),
        signature=Signature(
            inputs=tuple(inputs),
            constants=tuple(constants),
            positional=tuple(positional),
            outputs=_output_names(spec),
            ranges=_ranges(exported, symbols),
        ),
        out_spec=spec,
        symbols=symbols,
    )
    fill_fake_values(program)
    program.clean()
    return program


def stated(size: str) -> int | str:
    """A size as the signature has it; torch keeps an axis that it fixed as a symbolic number."""
    return int(size) if size.isdigit() else size


def fill_fake_values(program: Program) -> None:
    """Compute the fake values that calls of a program lack; torch.export found the others by running the calls, too."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            if "val" not in node.meta:
                node.meta["val"] = fake_result(program, node)
            mark_current(node)


def symbols_of(placeholders: Sequence[fx.Node]) -> dict[str, str]:
    """Names d0, d1, ... for torch's symbols, in the order in which the inputs show them."""
    symbols: dict[str, str] = {}
    for node in placeholders:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            for symbol in re.findall(r"\b[su]\d+\b", str(size)):
                symbols.setdefault(symbol, f"d{len(symbols)}")
    return symbols


def _ranges(exported: ExportedProgram, symbols: Mapping[str, str]) -> dict[str, tuple[int, int | None]]:
    found = {}
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in symbols:
            upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
            found[symbols[str(symbol)]] = (int(bounds.lower), upper)
    return found


def _output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    names = [name or "output" for name in _leaf_names(spec, "")]
    return tuple(f"output.{name}" if name[0].isdigit() else name for name in names)


def _leaf_names(spec: pytree.TreeSpec, path: str) -> Iterator[str]:
    """Dotted names of a structure's leaves; the keys of a mapping-like node are its context, or its context's first."""
    if spec.is_leaf():
        yield path
        return
    children = spec.children()
    keys = [str(index) for index in range(len(children))]
    nested = isinstance(spec.context, list) and spec.context and isinstance(spec.context[0], list)
    context = spec.context[0] if nested else spec.context
    if isinstance(context, list) and len(context) == len(children) and all(isinstance(key, str) for key in context):
        keys = context
    for key, child in zip(keys, children, strict=True):
        yield from _leaf_names(child, f"{path}.{key}" if path else key)
