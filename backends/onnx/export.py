"""From a Program to an ONNX model: fxpress operators by `lowerings`, the ATen rest by torch's own exporter."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
from safetensors import SafetensorError
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from ...ir.errors import InputError, LoweringError, one_line
from ...ir.graph import Program, attribute, dtype, identifier, source_of
from ...ir.printer import target_name
from ...ir.quantization.fold import fold
from .lowerings import functions
from .lowerings.lowering import STANDARD_OPSET, Lowering
from .lowerings.table import FUNCTIONS, LOWERINGS, standard, supported
from .nibbles import store_nibbles
from .respell import respelled
from .views import join_views

OPSET = 23
_WEIGHT = 1024  # numbers from which on a constant counts as a weight
Choices = Mapping[fx.Node, Lowering]


@dataclass(frozen=True)
class Leaf:
    """One leaf of the model's outputs: the ONNX output `index`, or a constant."""

    index: int | None
    constant: bool | int | float | str | None = None


def check(
    program: Program,
    lowerings: Callable[[fx.Node], tuple[list[Lowering], list[str]]] = supported,
    opset: int = OPSET,
) -> list[str]:
    """Every node that the ONNX backend cannot take, with the reason; empty if it can take all.

    Args:
        lowerings: the candidates for a node, and why others are none.
    """
    problems = []
    known = exportable(opset)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "output":
            for item in node.args[0]:
                if isinstance(item, fx.Node) and not isinstance(item.meta.get("val"), Tensor):
                    problems.append(f"{item.name}: the model returns a size; let it return a tensor")
            continue
        if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
            problems.append(f"{node.name}: ONNX Runtime has no bfloat16 kernels on CPU; use model.float()")
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace == "fxpress":
                candidates, reasons = lowerings(node)
                if not candidates:
                    problems.append(f"{target_name(node)}: {'; '.join(reasons) or 'no lowering'}{source_of(node)}")
            elif node.target is torch.ops.aten.as_strided.default:
                problems.append(
                    f"{target_name(node)}: what it reads depends on layouts, which ONNX does not have{source_of(node)}"
                )
            elif not (known(node.target) or respelled(node) is not node.target or _decomposable(node.target)):
                problems.append(f"{target_name(node)}: torch.onnx has no translation{source_of(node)}")
        elif isinstance(node.target, torch._ops.HigherOrderOperator) and not known(node.target):
            problems.append(f"{target_name(node)}: torch.onnx has no translation{source_of(node)}")
    return list(dict.fromkeys(problems))


def check_supported(program: Program) -> None:
    """Refuse a program with anything that `check` lists.

    Raises:
        LoweringError: lists all of it.
    """
    _refuse(check(program))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        count = f"{len(problems)} unsupported: " if len(problems) > 1 else ""
        raise LoweringError(f"the ONNX backend cannot take this program: {count}{' | '.join(problems)}")


@functools.cache
def exportable(opset: int) -> Callable[[Any], bool]:
    """Whether torch's exporter translates an operator at an opset."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    translates: Callable[[Any], bool] = _translations(ONNXRegistry.from_torchlib, opset).is_registered
    return translates


@functools.cache
def _translations(read: Callable[..., Any], opset: int) -> Any:
    """The table of what torch's exporter translates at an opset."""
    with quietly():
        return read(opset_version=opset)


@contextlib.contextmanager
def _translations_read_once() -> Iterator[None]:
    """Give torch's exporter copies of its table, which it would read anew, half a second, at each export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    described, read = ONNXRegistry.__dict__["from_torchlib"], ONNXRegistry.from_torchlib

    def again(opset_version: int) -> ONNXRegistry:
        known = _translations(read, opset_version)
        registry = ONNXRegistry()
        registry._opset_version = known.opset_version
        registry.functions = {target: list(found) for target, found in known.functions.items()}
        return registry

    registries: Any = ONNXRegistry
    registries.from_torchlib = staticmethod(again)
    try:
        yield
    finally:
        registries.from_torchlib = described


def _decomposable(target: torch._ops.OpOverload) -> bool:
    """Whether torch can write an operator as others; the exporter does so before it translates."""
    from torch._decomp import core_aten_decompositions

    implicit = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return implicit or target in core_aten_decompositions()


def standard_form(program: Program) -> Program:
    """A copy of a program for `to_standard_onnx`: what was quantized and left for training is folded.

    Raises:
        LoweringError: a node has no lowering to operators of the standard.
    """
    program = program.copy()
    fold(program)
    _refuse(check(program, standard, STANDARD_OPSET))
    return program


def to_standard_onnx(program: Program, choices: Choices | None = None) -> onnx_ir.Model:
    """The ONNX model of a program in operators of the standard alone; integers stand between Q/DQ nodes.

    Args:
        program: in the form of `standard_form`.
        choices: the lowering of each fxpress node; None: the first of each.

    Raises:
        LoweringError: as `to_onnx` raises.
    """
    if choices is None:
        choices = {node: standard(node)[0][0] for node in program.calls(*LOWERINGS)}
    model = to_onnx(program, choices, STANDARD_OPSET)
    store_nibbles(model)
    return model


def to_onnx(program: Program, choices: Choices, opset: int = OPSET) -> onnx_ir.Model:
    """The ONNX model of a program.

    Args:
        choices: the lowering of each fxpress node.

    Raises:
        LoweringError: torch's exporter fails, or an axis that is dynamic in the program would become fixed.
    """
    lowered, names = _lowered(program, choices)
    exported = _export(program, lowered)
    try:
        model = write_onnx(exported, [tensor.name for tensor in program.signature.inputs], names, opset)
    except Exception as error:
        raise LoweringError(_why_not(exported, error, opset)) from error
    _name_sizes(program, model)
    return model


def write_onnx(
    exported: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int = OPSET
) -> onnx_ir.Model:
    """torch's exporter, then what depends on weights alone is computed.

    What the exporter notes of each node goes: three quarters of a small model's file, with paths of this machine.
    """
    _spare_decompositions(exported, opset)
    with quietly(), _translations_read_once():
        result = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
        )
    assert result is not None
    functions.write_out(result.model, FUNCTIONS)
    join_views(result.model)
    _fold_constants(result.model)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(result.model)
    return result.model


_ALIASES = {  # operators that the exporter knows by another name
    torch.ops.aten.__and__.Tensor: torch.ops.aten.bitwise_and.Tensor,
    torch.ops.aten.__or__.Tensor: torch.ops.aten.bitwise_or.Tensor,
    torch.ops.aten.__xor__.Tensor: torch.ops.aten.bitwise_xor.Tensor,
}


def _spare_decompositions(exported: ExportedProgram, opset: int) -> None:
    """Keep the exporter from tracing once more, to decompose what it cannot translate, where there is nothing of it.

    That would take as long as all the rest.
    """
    aten = torch.ops.aten
    for node in list(exported.graph.nodes):
        node.target = _ALIASES.get(node.target, node.target)
        if node.target is aten.detach_.default:  # of torch.tensor(...)
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
        elif node.target is aten.to.dtype:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": dtype(node)}
        elif node.target is aten.square.default:
            node.target, node.args = aten.mul.Tensor, node.args * 2
        elif node.target is aten.numpy_T.default:
            axes = list(range(node.meta["val"].dim()))
            node.target, node.args = aten.permute.default, (*node.args, axes[::-1])
    known = exportable(opset)
    if all(known(node.target) for node in exported.graph.nodes if node.op == "call_function"):
        exported.run_decompositions = lambda *_: exported


def _why_not(exported: ExportedProgram, error: BaseException, opset: int) -> str:
    """Why torch's exporter failed: the operators without translation that are left when all others are decomposed."""
    known = exportable(opset)
    try:
        left = exported.run_decompositions().graph.nodes
    except Exception:  # noqa: BLE001  # the error at hand is the one to report
        left = []
    missing = {str(node.target) for node in left if node.op == "call_function" and not known(node.target)}
    if missing:
        return (
            f"the ONNX backend cannot take this program: torch.onnx has no translation of {', '.join(sorted(missing))}"
        )
    while error.__cause__ is not None:
        error = error.__cause__
    return f"torch.onnx failed: {one_line(error)}"


def _name_sizes(program: Program, model: onnx_ir.Model) -> None:
    """Give symbolic sizes of inputs and outputs the names that the signature has."""
    names = {
        str(found): size
        for tensor, value in zip(program.signature.inputs, model.graph.inputs, strict=True)
        for size, found in zip(tensor.shape, value.shape or (), strict=True)
        if isinstance(size, str)
    }
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(size), size) for size in value.shape])


def _fold_constants(model: onnx_ir.Model) -> None:
    """Compute in place what depends on weights alone (transposed or cut weights), share equal nodes, drop unused ones.

    torch.onnx.export(optimize=True) does more: rewrites that ONNX Runtime makes at load anyway, and onnxscript's
    fusions for opset 23, of which the one for rotary embeddings is wrong where the angles broadcast over the batch.
    """
    limit = 2**40  # of any size
    with quietly():
        onnxscript.optimizer.fold_constants(
            model,
            input_size_limit=limit,
            output_size_limit=limit,
            should_fold=lambda node: not (_unpacks(node) or _doubles(node)) and None,
        )
        onnx_ir.passes.Sequential(
            onnx_ir.passes.common.RemoveUnusedNodesPass(),
            onnx_ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            onnx_ir.passes.common.DeduplicateInitializersPass(),
            onnx_ir.passes.common.CommonSubexpressionEliminationPass(),
            onnx_ir.passes.common.OutputFixPass(),
            onnx_ir.passes.common.NameFixPass(),
        )(model)


def _unpacks(node: onnx_ir.Node) -> bool:
    """Whether a node makes more bytes of a weight: the file keeps the fewer, and a session computes the rest."""
    if node.op_type not in ("Cast", "BitShift") or node.inputs[0] is None or node.inputs[0].const_value is None:
        return False
    shape, dtype, before = node.outputs[0].shape, node.outputs[0].dtype, node.inputs[0].const_value
    if shape is None or dtype is None or not shape.is_static() or before.size < _WEIGHT:
        return False
    return bool(math.prod(shape.numpy()) * dtype.bitwidth > before.size * before.dtype.bitwidth)


def _doubles(node: onnx_ir.Node) -> bool:
    """Whether a node only turns a weight that others read as it lies, as a head does that is tied to an embedding.

    The file keeps the numbers once, and a session turns them when it is made.
    """
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    if weight is None or weight.const_value is None or weight.const_value.size < _WEIGHT:
        return False
    return any(use.node.op_type != "Transpose" for use in weight.uses())


def leaves_of(program: Program) -> list[Leaf]:
    """Where each leaf of the model's outputs is found: equal outputs share one ONNX output, constants have none."""
    places: dict[fx.Node, int] = {}
    found = []
    for item in _outputs(program):
        if isinstance(item, fx.Node):
            found.append(Leaf(places.setdefault(item, len(places))))
        else:
            found.append(Leaf(None, item))
    return found


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write a model as `path` with its weights beside it in safetensors (of any size: no limit of 2 GB).

    Raises:
        InputError: it cannot be written, as where the disk is full.
    """
    try:
        with quietly():
            onnx_ir.save_safetensors(model, path, size_threshold_bytes=1024)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {str(path)!r}: {one_line(error)}; set TMPDIR if there is more room elsewhere"
        ) from error


def _outputs(program: Program) -> Any:
    return next(iter(reversed(program.graph.nodes))).args[0]


def _lowered(program: Program, choices: Choices) -> tuple[fx.GraphModule, list[str]]:
    """A copy of the graph with every fxpress operator replaced by its lowering, and the names of its outputs."""
    copy = program.copy()
    for node, original in zip(copy.graph.nodes, program.graph.nodes, strict=True):
        if node.op == "call_function" and node.target in LOWERINGS:
            node.target = choices[original].function
        elif node.op == "call_function":
            node.target = respelled(node)
        elif node.op == "output":
            kept = dict.fromkeys(item for item in node.args[0] if isinstance(item, fx.Node))
            node.args = (tuple(kept),)
    names: list[str] = []
    seen: set[fx.Node] = set()
    for name, item in zip(program.signature.outputs, _outputs(program), strict=True):
        if isinstance(item, fx.Node) and item not in seen:
            seen.add(item)
            unique = identifier(name).replace(".", "_")
            taken = {tensor.name for tensor in program.signature.inputs}.union(names)
            while unique in taken:
                unique += "_out"
            names.append(unique)
    _rename_weights(copy, names)
    copy.module.recompile()
    return copy.module, names


def _rename_weights(program: Program, taken: Sequence[str]) -> None:
    """Give weights other names than outputs, as of `{"scale": self.scale.exp()}`: names in an ONNX graph are unique."""
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in taken:
            while name in taken or hasattr(program.module, name):
                name += "_weight"
            setattr(program.module, name, attribute(program.module, str(node.target)))
            delattr(program.module, str(node.target))
            node.target = name


def _export(program: Program, lowered: fx.GraphModule) -> ExportedProgram:
    """Trace the lowered graph again, with the program's own dynamic axes."""
    signature = program.signature
    placeholders = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    # The values play no role; the sizes are those of the example (2 or more wherever an axis is dynamic).
    example = tuple(
        torch.ones([hint(size) for size in value.shape], dtype=value.dtype, device=value.device)
        for value in placeholders
    )
    # AUTO, with the check below: the program's own ranges hold, and guards of this second trace add none.
    shapes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in signature.inputs
    )
    try:
        with torch.no_grad(), quietly():
            exported = torch.export.export(lowered, example, dynamic_shapes=shapes)
    except Exception as error:
        raise LoweringError(f"the lowered program cannot be traced: {one_line(error)}") from error
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(signature.inputs) :]
    for tensor, node in zip(signature.inputs, placeholders, strict=True):
        for axis, size in enumerate(tensor.shape):
            if isinstance(size, str) and isinstance(node.meta["val"].shape[axis], int):
                raise LoweringError(f"a lowering fixes axis {axis} of input {tensor.path!r} to the example's size")
    for node in list(exported.graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target) and not node.users:
            exported.graph.erase_node(node)
    return exported


_UNKNOWN = 16  # rows, say, of what a model chooses by its values: the tokens that a router gives to one expert


def hint(size: Any) -> int:
    """The size that the example has where a size is symbolic; a guess where it depends on values."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else _UNKNOWN


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporter's notes on libraries that are not installed and its deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
