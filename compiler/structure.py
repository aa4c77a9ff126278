"""The structure of a model's outputs (tuples, dicts, ModelOutputs, caches) as text, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree


def dump(spec: pytree.TreeSpec) -> str | None:
    """The structure as JSON; None where a part of it has no serial form."""
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError):
        return None


def rebuild(text: str | None, leaves: Sequence[Any]) -> Any:
    """The structure with its leaves; None where a class of it is not loaded in this process.

    Only classes that are registered as pytrees are looked up: nothing is imported or run by name, except that the
    output classes of transformers are loaded if transformers is installed.
    """
    if text is None:
        return None
    if "transformers." in text:
        try:
            import transformers.modeling_outputs  # noqa: F401  # registers its classes
        except ImportError:
            return None
        from . import hf

        hf.register_caches()
    try:
        return pytree.tree_unflatten(list(leaves), pytree.treespec_loads(text))
    except (NotImplementedError, KeyError, ValueError, TypeError):
        return None
