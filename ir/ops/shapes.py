"""What is known of sizes that may be symbols; asking adds no guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true


def equal(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether sizes are known to be the expected ones."""
    return len(found) == len(expected) and all(
        statically_known_true(a == b) for a, b in zip(found, expected, strict=True)
    )


def fixed(size: Any) -> bool:
    """Whether a size is a number, be it by a guard."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def divides(groups: Any, heads: Any) -> bool:
    """Whether a number is known to divide another."""
    if isinstance(groups, int) and isinstance(heads, int):
        return groups > 0 and heads % groups == 0
    return statically_known_true(groups == heads)


def broadcasts(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether a tensor of these sizes is known to broadcast to others."""
    return len(found) <= len(expected) and all(
        (isinstance(a, int) and a == 1) or statically_known_true(a == b)
        for a, b in zip(reversed(found), reversed(expected), strict=False)
    )
