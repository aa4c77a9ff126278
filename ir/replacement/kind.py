"""What a kind of attention is. A new one is one file in `kinds`, and its line in `table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import InputError
from ..graph import Program
from ..ops.align import align_tokens
from ..rewrite import Track
from .site import Sample, Site

Call = Callable[..., Any]
"""`call(operator, *args, **kwargs)`: computes it, where arguments are tensors, or inserts it, where they are nodes."""


@dataclass(frozen=True)
class Kind:
    """A way to compute attention, cheaper than exactly. Its options are the fields of the subclass.

    The subclass says what it refuses by the class variables below, and by `refuses`; which weights it has and how they
    start by `weights`, and by `calibrate` where they are fitted to data; and what it computes by `attend`, in operators
    that have references and lowerings of their own.
    """

    causal: ClassVar[bool] = True  # whether it can keep a query from seeing later keys
    encoder: ClassVar[bool] = True  # whether it can let a query see later keys
    cross: ClassVar[bool] = False  # whether keys may be more or fewer than queries
    band: ClassVar[bool] = False  # whether it keeps a window that the model has itself
    softcap: ClassVar[bool] = False  # whether it caps scores
    local: ClassVar[bool] = True  # whether nothing but the attention's own result changes
    frozen: ClassVar[tuple[str, ...]] = ()  # weights that training must leave as they are

    @classmethod
    def kind_name(cls) -> str:
        """The kind's name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    def __str__(self) -> str:
        options = [f"{entry.name}={getattr(self, entry.name)!r}" for entry in fields(self)]
        return f"{self.kind_name()}({', '.join(options)})"

    @property
    def needs_calibration(self) -> str | None:
        """What calibration data is needed for; None: for nothing."""
        return None

    def refusal(self, site: Site) -> str | None:
        """Why an attention cannot be of this kind; None: it can."""
        given, name = site.given, self.kind_name()
        fixed = [given[item].meta["val"].shape[axis] for item in ("query", "key", "value") for axis in (1, 3)]
        if not all(isinstance(size, int) for size in fixed):
            return "its heads have no fixed number and size"
        if given["bias"] is not None:
            boolean = given["bias"].meta["val"].dtype is torch.bool
            what = "a mask that could not be read as a key mask or a band" if boolean else "a bias for each pair"
            return f"its scores have {what}, which {name} cannot take"
        if given["sinks"] is not None:
            return f"its rows have a sink of their own, which {name} cannot take"
        if given["softcap"] and not self.softcap:
            return f"its scores are capped, which {name} cannot do"
        if given["empty"] == "nan":
            return "it gives NaN where no key is allowed"
        if not self.cross and not site.is_square:
            return f"its keys are other tokens than its queries, and {name} is for attention of tokens to themselves"
        return self._band(site) or self.refuses(site)

    def is_done(self, site: Site) -> bool:
        """Whether an attention is of this kind as it stands."""
        return False

    def _band(self, site: Site) -> str | None:
        name = self.kind_name()
        if site.left is None and site.right is None:
            return None if self.encoder else f"it sees later tokens, and {name} is causal"
        if site.causal and site.left is None:
            return None if self.causal else f"it is causal, and {name} would mix later tokens in"
        if not self.band:
            return f"it has a window of its own already, which {name} does not keep"
        if not all(side is None or isinstance(side, int) for side in (site.left, site.right)):
            return "its window has no fixed width"
        return None

    def refuses(self, site: Site) -> str | None:
        """Further reasons of the kind's own."""
        return None

    def weights(self, site: Site) -> dict[str, Tensor]:
        """The kind's own weights as they start without data."""
        return {}

    def calibrate(
        self, site: Site, weights: dict[str, Tensor], samples: Sequence[Sample], track: Track
    ) -> dict[str, Tensor]:
        """The weights fitted to what exact attention gives on data."""
        return weights

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """The result [B, H, N, E] for query, key, value and key mask (or None)."""
        raise NotImplementedError

    def replace(self, program: Program, site: Site, weights: Mapping[str, fx.Node]) -> None:
        """Put it in the attention's place."""
        program.replace(site.node, self.attend(inserting(program, site.node), site, site.inputs, weights))


def aligned(call: Call, inputs: Sequence[Any]) -> tuple[Sequence[Any], Callable[[Any], Any]]:
    """The inputs with padding at the beginning moved to the end, and what moves the result back: for kinds whose
    blocks begin at the first place."""
    key_mask = inputs[3]
    if key_mask is None:
        return inputs, lambda result: result
    moved = [call(align_tokens, item, key_mask) for item in inputs]
    return moved, lambda result: call(align_tokens, result, key_mask, True)


def compute(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `Call` that computes."""
    return operator(*args, **kwargs)


def inserting(program: Program, before: fx.Node) -> Call:
    """The `Call` that inserts nodes before another."""

    def call(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(operator, *args, before=before, **kwargs)

    return call


def check_integer(option: str, value: Any, least: int) -> None:
    """Refuse an option that is no integer of 64 bits or too small.

    Raises:
        InputError: names it.
    """
    if type(value) is not int or value < least:
        raise InputError(f"{option} must be an integer, {least} or more, found {value!r}")
    if value >= 2**63:
        raise InputError(f"{option} must be an integer of 64 bits, found {value}")
