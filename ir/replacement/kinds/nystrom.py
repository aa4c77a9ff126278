"""nystrom: attention through landmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ops.low_rank_attention import nystrom_attention
from ..kind import Call, Kind, check_integer
from ..site import Site


@dataclass(frozen=True)
class Nystrom(Kind):
    """The softmax matrix from its products with landmarks (Nystromformer: Xiong et al., 2021). O(N landmarks). No
    weights. Sentences of no more tokens than landmarks are exact.

    Attributes:
        landmarks: means of queries and keys over segments of the sequence.
        iterations: of the pseudo-inverse; more are often worse, see `nystrom_attention`.
    """

    landmarks: int = 64
    iterations: int = 6
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("landmarks", self.landmarks, 1)
        check_integer("iterations", self.iterations, 1)

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """One operator."""
        return call(nystrom_attention, *inputs, self.landmarks, self.iterations, site.scale)
