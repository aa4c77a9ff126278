"""Layers by name: what users call the linear layers and embeddings of a program."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from .graph import module_path

aten = torch.ops.aten


def name_of(node: fx.Node) -> str:
    """The path of the module that the weight of a linear layer or an embedding belongs to."""
    weight: Any = node.args[0] if node.target is aten.embedding.default else node.args[1]
    if weight.op != "get_attr":  # computed, as the product with a mask is
        weight = next((used for used in weight.all_input_nodes if used.op == "get_attr"), weight)
    return module_path(node) or str(weight.target).rpartition(".")[0] or str(weight.target)


def is_named(node: fx.Node, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the layer's name, or one of its parts or beginnings: `head` and `encoder.0` do."""
    return fits(name_of(node), patterns)


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern with * and ? fits a dotted name, or one of its parts or beginnings."""
    parts = name.split(".")
    begins = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return any(fnmatchcase(item, pattern) for pattern in patterns for item in begins | set(parts))
