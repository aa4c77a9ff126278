"""exact: attention as it is, to try the machinery, and as the control in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ops.attention import attention
from ..kind import Call, Kind
from ..site import Site


@dataclass(frozen=True)
class Exact(Kind):
    """Every query sees every key that its mask allows (Vaswani et al., 2017)."""

    cross: ClassVar[bool] = True
    band: ClassVar[bool] = True
    softcap: ClassVar[bool] = True

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """The same attention once more."""
        query, key, value, key_mask = inputs
        return call(attention, query, key, value, None, key_mask, site.left, site.right, site.scale,
                    site.given["softcap"], **site.empty)  # fmt: skip
