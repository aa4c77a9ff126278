"""linformer: keys and values projected to a fixed number along the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.low_rank_attention import linformer_attention
from ...rewrite import Track
from ..fit import fit
from ..kind import Call, Kind, check_integer, compute
from ..site import Sample, Site


@dataclass(frozen=True)
class Linformer(Kind):
    """Keys and values as means over segments of the sequence (Linformer: Wang et al., 2020). O(N rank). Sentences of
    no more tokens than the rank are exact.

    Linformer's projections are matrices over positions, learned for one length. Here they are means over segments, so
    that they start right without data and hold at any length; with "fitted", weighted ones, by two vectors a head that
    are fitted to what exact attention gives.

    Attributes:
        rank: how many projected keys there are.
        projection: "segments": plain means; "fitted": weighted means, fitted to calibration data.
        steps: of the fit.
    """

    rank: int = 64
    projection: str = "segments"
    steps: int = 200
    causal: ClassVar[bool] = False
    cross: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_integer("steps", self.steps, 0)
        if self.projection not in ("segments", "fitted"):
            raise InputError(f"projection must be 'segments' or 'fitted', found {self.projection!r}")

    @property
    def needs_calibration(self) -> str | None:
        """The fit."""
        return "projection 'fitted'" if self.projection == "fitted" else None

    def weights(self, site: Site) -> dict[str, Tensor]:
        """Vectors of zeros: plain means."""
        return {"pooling": torch.zeros(site.heads, 2, site.size)} if self.projection == "fitted" else {}

    def calibrate(
        self, site: Site, weights: dict[str, Tensor], samples: Sequence[Sample], track: Track
    ) -> dict[str, Tensor]:
        """The vectors of least error."""
        if not weights:
            return weights

        def attend(sample: Sample, learned: Mapping[str, Tensor]) -> Tensor:
            found: Tensor = self.attend(
                compute, site, (sample.query, sample.key, sample.value, sample.key_mask), learned
            )
            return found

        return fit(attend, weights, samples, track, f"fit {site.name}", steps=self.steps, rate=0.01)

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """One operator."""
        return call(linformer_attention, *inputs, weights.get("pooling"), self.rank, site.scale)
