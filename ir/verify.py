"""The verifier: what must hold of every program, checked before and after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .errors import VerifyError
from .graph import (
    Program,
    describe_value,
    fake_result,
    is_current,
    mark_current,
    same_sizes,
    source_of,
)
from .ops.table import OPERATORS
from .printer import target_name

_ARITHMETIC = {"_operator", "math", "torch", "torch.fx.experimental.sym_node"}  # modules of functions on sizes


def verify(program: Program) -> None:
    """Check a program.

    The graph is a valid fx graph; its placeholders are the signature's; every call is a known, functional operator
    with a fake value that running it on its arguments' fake values gives again; every weight is what its node says;
    the output has as many leaves as the model's.

    Raises:
        VerifyError: names the first node that fails, what was expected and found, and the user's source line.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"the graph is malformed: {error}") from error
    placeholders = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    expected = [tensor.name for tensor in program.signature.inputs]
    if placeholders != expected:
        raise VerifyError(f"the graph takes {placeholders}, its signature says {expected}")
    for node in program.graph.nodes:
        problem = _problem(program, node)
        if problem:
            raise VerifyError(f"node {node.name}: {problem}{source_of(node)}")


def _problem(program: Program, node: fx.Node) -> str | None:
    if node.op == "output":
        found, wanted = len(node.args[0]), program.out_spec.num_leaves  # type: ignore[arg-type]
        return None if found == wanted else f"the graph gives {found} outputs, the model {wanted}"
    if node.op == "get_attr":
        return _weight_problem(program, node)
    if node.op == "placeholder":
        return None if isinstance(node.meta.get("val"), Tensor) else "an input without a fake value"
    if node.op != "call_function":
        return f"operation {node.op} is not allowed in a program"
    return _call_problem(program, node)


def _weight_problem(program: Program, node: fx.Node) -> str | None:
    try:
        weight = program.tensor(node)
    except AttributeError:
        return f"there is no weight {node.target!r}"
    if isinstance(weight, fx.GraphModule):
        return None  # a branch of a control-flow operator
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return f"weight {node.target!r} without a fake value"
    if value.dtype != weight.dtype or tuple(value.shape) != tuple(weight.shape):
        return f"weight {node.target!r} is {describe_value(weight)}, its node says {describe_value(value)}"
    return None


def _call_problem(program: Program, node: fx.Node) -> str | None:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == "fxpress" and target not in OPERATORS:
            return f"unknown operator {target}"
        if target._schema.is_mutable:
            return f"{target_name(node)} changes its arguments; programs are functional"
    elif isinstance(target, torch._ops.HigherOrderOperator):
        return None
    elif getattr(target, "__module__", None) not in _ARITHMETIC:
        return f"unknown function {target_name(node)}"
    if "val" not in node.meta:
        return f"{target_name(node)} has no fake value"
    if is_current(node):
        return None  # nothing that this call depends on has changed since it was last run
    try:
        again = fake_result(program, node)
    except Exception as error:  # noqa: BLE001  # whatever an operator raises, it is a problem of this node
        return f"{target_name(node)} does not accept its arguments: {error}"
    if not _agrees(node.meta["val"], again):
        said = describe_value(node.meta["val"], program.symbols)
        return f"{target_name(node)} gives {describe_value(again, program.symbols)}, its node says {said}"
    mark_current(node)
    return None


def _agrees(said: Any, again: Any) -> bool:
    """Same structure, dtype and sizes; sizes that depend on data (unbacked symbols) are new at every run."""
    if isinstance(said, Tensor) and isinstance(again, Tensor):
        return (
            said.dtype == again.dtype
            and len(said.shape) == len(again.shape)
            and all(_size_agrees(a, b) for a, b in zip(said.shape, again.shape, strict=True))
        )
    if isinstance(said, tuple | list) and isinstance(again, tuple | list):
        return len(said) == len(again) and all(_agrees(a, b) for a, b in zip(said, again, strict=True))
    if said is None or again is None:
        return said is again
    return not isinstance(said, Tensor) and not isinstance(again, Tensor) and _size_agrees(said, again)


def _size_agrees(said: Any, again: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if isinstance(said, torch.SymInt) and isinstance(again, torch.SymInt) and free_unbacked_symbols([said, again]):
        return True
    return same_sizes([said], [again])
