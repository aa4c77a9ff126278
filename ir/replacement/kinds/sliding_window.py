"""sliding_window: each token sees its neighbours, and a few global tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ops.attention import attention
from ...ops.window_attention import window_attention
from ..kind import Call, Kind, check_integer
from ..site import Site


@dataclass(frozen=True)
class SlidingWindow(Kind):
    """A window around each token (Longformer: Beltagy et al., 2020), with sinks where it is causal (StreamingLLM: Xiao
    et al., 2024). O(N window). No weights. A window of N or more is exact.

    Attributes:
        window: how many keys a token sees on a side, itself included: |i - j| < window.
        global_tokens: how many first tokens all see, and, unless attention is causal, that see all.
        dilation: the distance between the keys of a window.
    """

    window: int = 128
    global_tokens: int = 0
    dilation: int = 1
    band: ClassVar[bool] = True
    softcap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)
        check_integer("global_tokens", self.global_tokens, 0)
        check_integer("dilation", self.dilation, 1)

    def is_done(self, site: Site) -> bool:
        """Whether there is a window that is no wider."""
        plain = not self.global_tokens and self.dilation == 1
        return plain and all(isinstance(side, int) and side < self.window for side in (site.left, site.right))

    def refuses(self, site: Site) -> str | None:
        """A window of the model's own is kept where the new one has neither global tokens nor holes."""
        has_own = site.left is not None or site.right not in (None, 0)
        if has_own and (self.global_tokens or self.dilation > 1):
            return "it has a window of its own already, which global tokens and dilation would not keep"
        return None

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """A band, which lowerings know by themselves, or a window with global tokens."""
        query, key, value, key_mask = inputs
        left, right = (
            self.window - 1 if side is None else min(side, self.window - 1) for side in (site.left, site.right)
        )
        softcap = site.given["softcap"]
        if not self.global_tokens and self.dilation == 1:
            # Where tokens see themselves, padding alone has rows without keys.
            empty = site.empty if min(left, right) < 0 else {}
            return call(attention, query, key, value, None, key_mask, left, right, site.scale, softcap, **empty)
        return call(window_attention, query, key, value, key_mask, left, right, self.global_tokens, self.dilation,
                    site.causal, site.scale, softcap)  # fmt: skip
