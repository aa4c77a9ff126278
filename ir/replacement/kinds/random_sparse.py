"""random_sparse: a window, global blocks and random blocks."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ops.block_attention import block_attention, random_blocks
from ..kind import Call, Kind, aligned, check_integer
from ..site import Site


@dataclass(frozen=True)
class RandomSparse(Kind):
    """Blocks of keys: those around, the first and the last, and some at random (BigBird: Zaheer et al., 2020). O(N).
    No weights: the random blocks are hashes of the seed. As many random blocks as there are is exact.

    Attributes:
        block: tokens of a block.
        window: blocks around a token's own, that one included; causal: up to its own.
        global_blocks: how many first and last blocks all see and that see all; causal: the first, which all see.
        random_blocks: further blocks of each block.
        seed: of their choice.
    """

    block: int = 64
    window: int = 3
    global_blocks: int = 1
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("block", 1), ("window", 1), ("global_blocks", 0), ("random_blocks", 0), ("seed", 0)):
            check_integer(option, getattr(self, option), least)

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """A table of blocks, and attention to them."""
        inputs, restore = aligned(call, inputs)
        query, key, value, key_mask = inputs
        both = call(random_blocks, query, key_mask, self.block, self.window, self.global_blocks, self.random_blocks,
                    self.seed, site.causal)  # fmt: skip
        table, full = (call(operator.getitem, both, index) for index in (0, 1))
        result = call(block_attention, query, key, value, table, full, key_mask, self.block, self.block, site.causal,
                    site.scale)  # fmt: skip
        return restore(result)
