"""depthwise_conv: heads that look at fixed distances become convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.attention import attention
from ...ops.conv_attention import conv_attention
from ...rewrite import Track
from ..fit import fit
from ..kind import Call, Kind, check_integer, compute
from ..site import Sample, Site

aten = torch.ops.aten
_SMALLEST_TAP = 1e-6


@dataclass(frozen=True)
class DepthwiseConv(Kind):
    """A convolution along the sequence for each head. O(N kernel).

    Its taps are the softmax of weights that start from the mean attention at each distance on calibration data.
    `dynamic`: taps are made for each token, softmax((q * convolved k) W + b), as ConvBERT's span-based dynamic
    convolution does (Jiang et al., 2020; Wu et al., 2019); W starts at zero, b from the mean attention, and both are
    fitted to what exact attention gives.

    Attributes:
        kernel: taps, around a token, or up to it where attention is causal.
        dynamic: whether each token has taps of its own.
        min_mass: heads with a smaller part of their attention within the kernel stay exact; 0: none does.
        steps: of the fit of dynamic taps.
    """

    kernel: int = 9
    dynamic: bool = False
    min_mass: float = 0.0
    steps: int = 200

    def __post_init__(self) -> None:
        check_integer("kernel", self.kernel, 1)
        check_integer("steps", self.steps, 0)
        if type(self.dynamic) is not bool:
            raise InputError(f"dynamic must be True or False, found {self.dynamic!r}")
        if isinstance(self.min_mass, bool) or not isinstance(self.min_mass, int | float) or not 0 <= self.min_mass <= 1:
            raise InputError(f"min_mass must lie between 0 and 1, found {self.min_mass!r}")

    @property
    def needs_calibration(self) -> str | None:
        """The taps."""
        return "taps from the mean attention at each distance"

    def refuses(self, site: Site) -> str | None:
        """Heads that share keys cannot be taken apart."""
        if self.min_mass and site.groups != site.heads:
            return "its heads share keys, so that none can stay exact; give min_mass=0"
        return None

    def _before(self, site: Site) -> int:
        """How many taps are for earlier tokens."""
        return self.kernel - 1 if site.causal else self.kernel // 2

    def weights(self, site: Site) -> dict[str, Tensor]:
        """Taps that fall with the distance; every head is a convolution."""
        distance = (torch.arange(self.kernel) - self._before(site)).abs()
        taps = torch.softmax(-distance.float(), 0).repeat(site.heads, 1)
        return self._of(site, taps, torch.ones(site.heads, dtype=torch.bool))

    def _of(self, site: Site, taps: Tensor, mixed: Tensor) -> dict[str, Tensor]:
        """The weights for taps [H, K], of which those of heads that are not `mixed` [H] are not used."""
        logits = taps[mixed].clamp(min=_SMALLEST_TAP).log()
        found = {"taps": logits}
        if self.dynamic:
            found["bias"] = logits.clone()
            found["directions"] = torch.zeros(len(logits), site.size, self.kernel)
        if not bool(mixed.all()):
            number = torch.arange(site.heads)
            found["mixed"], found["others"] = number[mixed], number[~mixed]
            found["order"] = torch.cat((found["mixed"], found["others"])).argsort()
        return found

    def calibrate(
        self, site: Site, weights: dict[str, Tensor], samples: Sequence[Sample], track: Track
    ) -> dict[str, Tensor]:
        """Mean attention by distance; of dynamic taps, those of least error of the output."""
        masses = _mean_attention(site, samples, self.kernel, self._before(site))
        mixed = masses.sum(1) >= self.min_mass
        found = self._of(site, masses / masses.sum(1, keepdim=True).clamp(min=1e-6), mixed)
        if not self.dynamic or not bool(mixed.any()):
            return found
        fixed = {name: found[name] for name in found if name not in ("bias", "directions")}

        def attend(sample: Sample, learned: Mapping[str, Tensor]) -> Tensor:
            inputs = (sample.query, sample.key, sample.value, sample.key_mask)
            result: Tensor = self.attend(compute, site, inputs, {**fixed, **learned})
            return result

        learned = {name: found[name] for name in ("bias", "directions")}
        return {**fixed, **fit(attend, learned, samples, track, f"fit {site.name}", steps=self.steps, rate=0.01)}

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """Convolutions, and exact attention for the heads that stay."""
        if "mixed" not in weights:
            return self._mix(call, site, inputs, weights)
        query, key, value, key_mask = inputs
        mixed, others = (
            [call(aten.index_select.default, item, 1, weights[part]) for item in (query, key, value)]
            for part in ("mixed", "others")
        )
        exact = call(attention, *others, None, key_mask, site.left, site.right, site.scale)
        if _count(weights["mixed"]):
            both = call(aten.cat.default, [self._mix(call, site, [*mixed, key_mask], weights), exact], 1)
            return call(aten.index_select.default, both, 1, weights["order"])
        return exact

    def _mix(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        query, key, value, key_mask = inputs
        taps = call(aten.softmax.int, weights["taps"], -1)
        if self.dynamic:
            span = call(conv_attention, key, taps, key_mask, site.causal)
            product = call(aten.mul.Tensor, query, span)
            logits = call(aten.matmul.default, product, weights["directions"])
            bias = call(aten.unsqueeze.default, weights["bias"], 1)
            taps = call(aten.softmax.int, call(aten.add.Tensor, logits, bias), -1)
        return call(conv_attention, value, taps, key_mask, site.causal)


def _count(heads: Any) -> int:
    """How many there are, of a tensor or the node of one."""
    return int((heads if isinstance(heads, Tensor) else heads.meta["val"]).shape[0])


def _mean_attention(site: Site, samples: Sequence[Sample], kernel: int, before: int) -> Tensor:
    """The mean probability at each distance of the kernel, [H, K], over the queries that are no padding."""
    total = torch.zeros(site.heads, kernel)
    count = 0.0
    for sample in samples:
        query, key = sample.query.float(), sample.key.float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        length = query.shape[2]
        scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(site.size) if site.scale is None else site.scale)
        if sample.key_mask is not None:
            scores = scores.masked_fill(~sample.key_mask[:, None, None, :], -1e30)
        if site.causal:
            scores = scores + torch.full((length, length), -1e30).triu(1)
        probabilities = torch.softmax(scores, -1)
        rows = torch.ones(query.shape[0], length) if sample.key_mask is None else sample.key_mask.float()
        probabilities = probabilities * rows[:, None, :, None]
        for tap in range(kernel):
            total[:, tap] += probabilities.diagonal(tap - before, 2, 3).sum((0, 2))
        count += float(rows.sum())
    return total / max(count, 1.0)
