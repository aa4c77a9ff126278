"""lsh: keys that hash as the query does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...ops.lsh_attention import lsh_attention, random_rotations
from ..kind import Call, Kind, check_integer
from ..site import Site


@dataclass(frozen=True)
class Lsh(Kind):
    """Attention to keys that hash as the query does, in several rounds (Reformer: Kitaev et al., 2020). O(N log N).

    Where it is not causal, a chunk of queries sorted by bucket meets a window of the sorted keys, whatever their
    bucket; where it is, the earlier keys of the bucket. Reformer has one projection for queries and keys; here both are
    hashed alike, which is an approximation. Sentences of no more tokens than a chunk are exact.

    Attributes:
        chunk: tokens of the sorted order that are met at once.
        rounds: of hashing.
        buckets: the most that there are; as many are used as a sentence has chunks, twice.
        seed: of the rotations, which are stored with the model.
    """

    chunk: int = 64
    rounds: int = 4
    buckets: int = 128
    seed: int = 0
    frozen: ClassVar[tuple[str, ...]] = ("rotations",)

    def __post_init__(self) -> None:
        for option, least in (("chunk", 1), ("rounds", 1), ("buckets", 2), ("seed", 0)):
            check_integer(option, getattr(self, option), least)

    def weights(self, site: Site) -> dict[str, Tensor]:
        """The rotations [H, D, rounds, buckets / 2]."""
        return {"rotations": random_rotations(site.heads, site.size, self.rounds, self.buckets // 2, self.seed)}

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """One operator."""
        query, key, value, key_mask = inputs
        return call(lsh_attention, query, key, value, weights["rotations"], key_mask, self.chunk, False, site.causal,
                    site.scale)  # fmt: skip
