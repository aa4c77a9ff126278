"""linear: learned features beyond a window of exact attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.linear_attention import linear_attention, softmax_features
from ...rewrite import Track
from ..fit import fit
from ..kind import Call, Kind, aligned, check_integer, compute
from ..site import Sample, Site


@dataclass(frozen=True)
class Linear(Kind):
    """Features [softmax(x W), softmax(-x W)] a head, fitted so that attention gives what the softmax gives (Hedgehog:
    Zhang et al., 2024), and exact attention within a terraced window (LoLCATs: Zhang et al., 2025). O(N (features +
    window)). A window of N or more is exact.

    Attributes:
        features: columns of W, each of which is two features.
        window: tokens of a block; the keys of a token's own block and of those beside it are met exactly. 0: none are.
        steps: of the fit.
        seed: of what W starts from besides the identity.
    """

    features: int = 64
    window: int = 64
    steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("features", 1), ("window", 0), ("steps", 0), ("seed", 0)):
            check_integer(option, getattr(self, option), least)

    @property
    def needs_calibration(self) -> str | None:
        """The fit."""
        return "features that are fitted" if self.steps else None

    def weights(self, site: Site) -> dict[str, Tensor]:
        """W the identity times the scale's root, or columns of a random rotation beyond its size; the gain 0."""
        size = site.size
        generator = torch.Generator().manual_seed(self.seed)
        columns = [torch.eye(size)]
        while sum(item.shape[1] for item in columns) < self.features:
            columns.append(torch.linalg.qr(torch.randn(size, size, generator=generator)).Q)
        start = torch.cat(columns, 1)[:, : self.features] * (size**-0.25)
        found = {"query_features": start.repeat(site.heads, 1, 1), "key_features": start.repeat(site.groups, 1, 1)}
        return {**found, "gain": torch.zeros(site.heads)} if self.window else found

    def calibrate(
        self, site: Site, weights: dict[str, Tensor], samples: Sequence[Sample], track: Track
    ) -> dict[str, Tensor]:
        """The features of least error of the output."""

        def attend(sample: Sample, learned: Mapping[str, Tensor]) -> Tensor:
            found: Tensor = self.attend(
                compute, site, (sample.query, sample.key, sample.value, sample.key_mask), learned
            )
            return found

        return fit(attend, weights, samples, track, f"fit {site.name}", steps=self.steps, rate=0.01)

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """Features, then linear attention."""
        inputs, restore = aligned(call, inputs) if self.window else (inputs, lambda result: result)
        query, key, value, key_mask = inputs
        rows = call(softmax_features, query, weights["query_features"])
        columns = call(softmax_features, key, weights["key_features"])
        result = call(linear_attention, query, key, value, rows, columns, weights.get("gain"), key_mask, self.window,
                    site.causal, site.scale)  # fmt: skip
        return restore(result)
