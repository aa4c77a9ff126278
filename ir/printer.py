"""Programs as text: stable, one call a line, `%name: dtype[shape] = operator(arguments)`, weights as `@path`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import Program, describe_value, short_dtype, size_text


def print_program(program: Program) -> str:
    """The program as text. Names are those of the graph's nodes; sizes those of the signature (`d0`, `d1`, ...)."""
    symbols = program.symbols
    inputs = [
        f"%{node.name}: {describe_value(node.meta.get('val'), symbols)}"
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    lines = [f"program({', '.join(inputs)}):"]
    for node in program.graph.nodes:
        if node.op == "output":
            lines.append(f"  return {_spell(node.args[0], program)}")
        elif node.op not in ("placeholder", "get_attr"):
            value = describe_value(node.meta.get("val"), symbols)
            lines.append(f"  %{node.name}: {value} = {target_name(node)}({_arguments(node, program)})")
    return "\n".join(lines) + "\n"


def target_name(node: fx.Node) -> str:
    """`aten.linear`, `aten.add.Tensor`, `fxpress.attention`, `operator.getitem`: what a node calls."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", str(target))
    module = (getattr(target, "__module__", None) or "").lstrip("_")
    return f"{module}.{name}" if module else name


def _arguments(node: fx.Node, program: Program) -> str:
    positional = [_spell(value, program) for value in node.args]
    named = [f"{name}={_spell(value, program)}" for name, value in node.kwargs.items()]
    return ", ".join(positional + named)


def _spell(value: Any, program: Program) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_spell(item, program) for item in value)}]"
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    if isinstance(value, torch.SymInt):
        return size_text(value, program.symbols)
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return str(value).removeprefix("torch.")
    return repr(value)
