"""Weights that a compiled graph has copied: noticing that the model's own are no longer what they were."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.errors import TraceError

_SAMPLES = 4  # numbers of each weight that are looked at


class Watch:
    """What weights were when they were copied.

    A weight is another if its object, its memory or its version is another: assignment, load_state_dict, an optimizer's
    step and every change in place are seen so. A change through `weight.data` has no version; some numbers of
    each weight are therefore compared too, which shows every change but one of a few numbers; on a GPU, where looking
    would wait for all work that was given to it, they are not.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        if any(weight.is_inference() for weight in weights):
            raise TraceError("a weight was made under inference_mode, where PyTorch does not count changes")
        self._known = [(weakref.ref(weight), weight.data_ptr(), weight._version) for weight in weights]
        self._views = _sampled(weights)
        self._seen = self._read()

    def same(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, unchanged."""
        for (known, memory, version), weight in zip(self._known, weights, strict=True):
            if known() is not weight or weight._version != version or weight.data_ptr() != memory:
                return False
        return all(torch.equal(now, seen) for now, seen in zip(self._read(), self._seen, strict=True))

    def _read(self) -> list[Tensor]:
        with torch.no_grad():
            return [torch.cat(views) for views in self._views]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sampled(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views of some numbers of each weight as integers, those of one size together."""
    found: dict[int, list[Tensor]] = {}
    for weight in weights:
        if weight.numel() and weight.is_cpu and weight.is_contiguous() and weight.element_size() in _BITS:
            flat = weight.detach().view(-1)
            step = max(1, (flat.numel() - 1) // (_SAMPLES - 1)) if flat.numel() > 1 else 1
            size = flat.element_size()
            found.setdefault(size, []).append(flat[::step].view(_BITS[size]))
    return list(found.values())
