"""performer: attention by random features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.linear_attention import linear_attention, random_features
from ..kind import Call, Kind, check_integer
from ..site import Site


@dataclass(frozen=True)
class Performer(Kind):
    """Positive orthogonal random features whose products are exp(q . k) on average (FAVOR+: Choromanski et al., 2021).
    O(N features). Unbiased, but of high variance where scores are large: meant to be trained further.

    Attributes:
        features: how many; 0: D ln D, the paper's choice.
        seed: of the projection, which is stored with the model.
    """

    features: int = 0
    seed: int = 0
    frozen: ClassVar[tuple[str, ...]] = ("projection",)

    def __post_init__(self) -> None:
        check_integer("features", self.features, 0)
        check_integer("seed", self.seed, 0)

    def weights(self, site: Site) -> dict[str, Tensor]:
        """The projection [M, D]: in blocks of D orthogonal rows, with the lengths of Gaussian vectors."""
        size = site.size
        wanted = self.features or max(1, round(size * math.log(size)))
        generator = torch.Generator().manual_seed(self.seed)
        blocks = []
        for _ in range(-(-wanted // size)):
            square = torch.randn(size, size, generator=generator, dtype=torch.float64)
            blocks.append(torch.linalg.qr(square).Q.t())
        directions = torch.cat(blocks)[:wanted]
        lengths = torch.randn(wanted, size, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        return {"projection": (directions * lengths).float()}

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """Features of queries, each shifted by its own largest exponent, and of keys; then linear attention."""
        query, key, value, key_mask = inputs
        projection = weights["projection"]
        rows = call(random_features, query, projection, None, "row", site.scale)
        seen, shift = (None, "fixed") if site.causal else (key_mask, "all")
        columns = call(random_features, key, projection, seen, shift, site.scale)
        return call(linear_attention, query, key, value, rows, columns, None, key_mask, 0, site.causal, site.scale)
