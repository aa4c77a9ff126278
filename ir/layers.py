"""Layers by name: what users call the linear layers and embeddings of a program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from .errors import InputError, RewriteError
from .graph import Program, module_path

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


def check_patterns(patterns: Sequence[str], names: Iterable[str], elsewhere: Sequence[str] | None = ()) -> None:
    """Refuse a pattern that fits no layer.

    Args:
        names: of the layers.
        elsewhere: of what the model has beside the program; None: not known, so that any pattern may fit there.

    Raises:
        InputError: with the nearest names.
    """
    if elsewhere is None:
        return
    known = set(names)
    for pattern in patterns:
        if not any(fits(name, [pattern]) for name in (*known, *elsewhere)):
            close = ", ".join(difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)) or "none"
            raise InputError(f"no layer is named {pattern!r}; the nearest of {len(known)}: {close}")


def check_finite(program: Program, layers: Iterable[fx.Node]) -> None:
    """Refuse linear layers and embeddings whose weight has NaN or infinity: it can neither be rounded nor fitted.

    Raises:
        RewriteError: names the first.
    """
    for node in layers:
        weight: Any = node.args[0] if node.target is aten.embedding.default else node.args[1]
        if weight.op != "get_attr":
            continue
        wrong = ~program.tensor(weight).detach().isfinite()
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            number = program.tensor(weight)[tuple(place)].item()
            raise RewriteError(f"the weight of {name_of(node)} is {number} at {place}; mend it, or leave the layer out")
