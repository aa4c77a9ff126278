"""One attention as a program of its own, to be measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from ..graph import Program, dtype, size_text
from ..signature import Signature, TensorInput
from .kind import Kind, inserting
from .site import Site


def lone(program: Program, site: Site, kind: Kind, weights: Mapping[str, Tensor]) -> Program:
    """A program that computes a site's attention in a kind's way: query, key, value, key mask -> result."""
    graph = fx.Graph()
    names = ("query", "key", "value", "key_mask")
    inputs: list[fx.Node | None] = []
    specs = []
    for name, node in zip(names, site.inputs, strict=True):
        inputs.append(None if node is None else graph.placeholder(name))
        if node is not None:
            inputs[-1].meta["val"] = node.meta["val"]  # type: ignore[union-attr]
            sizes = tuple(
                size if isinstance(size, int) else size_text(size, program.symbols) for size in node.meta["val"].shape
            )
            specs.append(TensorInput(name, name, str(dtype(node)).removeprefix("torch."), sizes))
    graph.output((inputs[0],))
    signature = Signature(tuple(specs), (), names, ("result",), program.signature.ranges)
    alone = Program(fx.GraphModule(torch.nn.Module(), graph), signature, tree_flatten([0])[1], program.symbols)
    end = next(iter(reversed(alone.graph.nodes)))
    placeholders = {node.target: node for node in alone.graph.nodes if node.op == "placeholder"}
    given = [None if node is None else placeholders[node.target] for node in inputs]
    stored = insert_weights(alone, weights, kind, dtype(given[0]))
    result = kind.attend(inserting(alone, end), site, given, stored)
    end.args = ((result,),)
    alone.clean()
    return alone


def insert_weights(
    program: Program, weights: Mapping[str, Tensor], kind: Kind, wanted: torch.dtype, prefix: str = ""
) -> dict[str, fx.Node]:
    """Weights stored in a program, floats in a dtype; those that a kind freezes, and integers, as buffers."""
    found = {}
    for name, tensor in weights.items():
        floats = tensor.is_floating_point()
        stored = tensor.to(wanted) if floats else tensor
        found[name] = program.add_weight(f"{prefix}{name}", stored, trainable=floats and name not in kind.frozen)
    return found
