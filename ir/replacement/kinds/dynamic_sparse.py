"""dynamic_sparse: the blocks of keys that queries themselves ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from ...ops.block_attention import block_attention, dynamic_blocks
from ..kind import Call, Kind, aligned, check_integer
from ..site import Site


@dataclass(frozen=True)
class DynamicSparse(Kind):
    """A window by content: of each block of queries the blocks of keys whose means score highest (SpargeAttn: Zhang et
    al., 2025; XAttention: Xu et al., 2025). O(share N^2), and (N / block)^2 for the choice. No weights. A mass of 1, or
    as many blocks as there are, is exact.

    Attributes:
        block: tokens of a block.
        top_k: how many blocks are kept besides the first and the own ones; 0: as the mass says.
        mass: kept are the fewest blocks whose softmax weights add up to it; 0: 0.9 where there is no top_k.
        similarity: blocks whose tokens have a lower mean cosine are always kept, as their mean says little.
        per_query: each query chooses for itself, not a block of them together.
    """

    block: int = 64
    top_k: int = 0
    mass: float = 0.0
    similarity: float = -1.0
    per_query: bool = False

    def __post_init__(self) -> None:
        check_integer("block", self.block, 1)
        check_integer("top_k", self.top_k, 0)
        for option, low in (("mass", 0), ("similarity", -1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
                raise InputError(f"{option} must lie between {low} and 1, found {value!r}")
        if self.top_k and self.mass:
            raise InputError("give top_k or mass, not both")
        if type(self.per_query) is not bool:
            raise InputError(f"per_query must be True or False, found {self.per_query!r}")

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """A table of blocks, and attention to them."""
        inputs, restore = aligned(call, inputs)
        query, key, value, key_mask = inputs
        rows = 1 if self.per_query else self.block
        mass = 0.0 if self.top_k else float(self.mass or 0.9)
        table = call(dynamic_blocks, query, key, key_mask, rows, self.block, self.top_k, mass, float(self.similarity),
                     site.causal, site.scale)  # fmt: skip
        result = call(block_attention, query, key, value, table, None, key_mask, rows, self.block, site.causal,
                    site.scale)  # fmt: skip
        return restore(result)
