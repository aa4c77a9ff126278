"""The attentions of a program, as a replacement sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..graph import Program, arguments, module_path, same_sizes, shape, size_text
from ..ops.attention import attention


@dataclass(frozen=True, eq=False)
class Site:
    """One attention: what it reads, and what is known of its sizes and its mask.

    `left` and `right` are the band's sides, None: unlimited.
    """

    node: fx.Node
    name: str  # the path of its module
    given: dict[str, Any]  # the arguments of `fxpress.attention`
    longest: int | None = None  # the most tokens that it may be given; None: unknown

    @property
    def inputs(self) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
        """Query, key, value and key mask."""
        return tuple(self.given[name] for name in ("query", "key", "value", "key_mask"))

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return int(shape(self.given["query"])[1])

    @property
    def groups(self) -> int:
        """Key heads, G."""
        return int(shape(self.given["key"])[1])

    @property
    def size(self) -> int:
        """Numbers of a query, D."""
        return int(shape(self.given["query"])[3])

    @property
    def length(self) -> Any:
        """Queries, N: a number or a symbol."""
        return shape(self.given["query"])[2]

    @property
    def left(self) -> Any:
        """How many earlier keys a query sees."""
        return self.given["left"]

    @property
    def right(self) -> Any:
        """How many later keys a query sees."""
        return self.given["right"]

    @property
    def causal(self) -> bool:
        """Whether nothing later is seen."""
        return isinstance(self.right, int) and self.right == 0

    @property
    def scale(self) -> float | None:
        """What scores are multiplied by; None: D ** -0.5."""
        scale: float | None = self.given["scale"]
        return scale

    @property
    def empty(self) -> dict[str, str]:
        """What a row without any key gives, as an option of `fxpress.attention` unless it is the default."""
        empty = self.given["empty"]
        return {} if empty == "zeros" else {"empty": empty}

    @property
    def is_square(self) -> bool:
        """Whether there are as many keys as queries."""
        return same_sizes([shape(self.given["query"])[2]], [shape(self.given["key"])[2]])


@dataclass(frozen=True)
class Sample:
    """What one batch of calibration data brings to a site, and what exact attention makes of it.

    query [B, H, N, D], key [B, G, M, D], value [B, G, M, E], key_mask [B, M] or None, output [B, H, N, E].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    output: Tensor

    @property
    def rows(self) -> Tensor | None:
        """The queries that are no padding, [B, N]; None: all are real."""
        return self.key_mask if self.key_mask is not None and self.query.shape[2] == self.key.shape[2] else None


def sites(program: Program) -> list[Site]:
    """Every attention, in graph order."""
    return [site_of(program, node) for node in program.calls(attention)]


def site_of(program: Program, node: fx.Node) -> Site:
    """One attention as it is now."""
    given = arguments(node)
    size = shape(given["query"])[2]
    longest = size if isinstance(size, int) else None
    if longest is None:
        longest = program.signature.ranges.get(size_text(size, program.symbols), (0, None))[1]
    return Site(node, module_path(node) or node.name, given, longest)
