"""One of dynamo's graphs while it is compiled, and as PyTorch runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.utils.stateless import _reparametrize_module

from ..runners import Clock
from .mixed import mixed
from .options import Options
from .report import GraphReport


class Stays(Exception):
    """A graph that stays with PyTorch because that is the better choice; the text is the reason."""


class Work:
    """A graph, what was asked for and what is reported.

    Attributes:
        inputs: the arguments of its first call, sizes symbolic; emptied when it is compiled.
        forward: the graph as it was.
        attributes: the names of the tensors that it keeps; they count as its last arguments.
        key: what it is stored under on the disk; None: it is not.
    """

    def __init__(self, gm: fx.GraphModule, inputs: list[Any], asked: Options, report: GraphReport) -> None:
        self.gm, self.inputs, self.asked, self.report = gm, inputs, asked, report
        forward: Any = gm.forward
        self.forward: Callable[..., Any] = forward
        self.attributes: list[str] = []
        self.key: str | None = None
        self.clock = Clock()
        report.seconds = self.clock.seconds
        self._count = len(inputs)
        self._autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def usual(self, values: Sequence[Any]) -> Any:
        """What the graph gives, with the tensors that it keeps as they are now."""
        enabled, dtype = self._autocast
        with torch.autocast("cpu", dtype, enabled):
            return self.forward(*values[: self._count])

    def tried(self, values: Sequence[Any], dtype: torch.dtype | None = None) -> Any:
        """What the graph gives; the tensors that it keeps are read from `values` too, so that no other changes.

        Args:
            dtype: of its matrix products; None: as they are.
        """
        kept = dict(zip(self.attributes, values[self._count :], strict=True))
        with _reparametrize_module(self.gm, kept):
            return mixed(self.gm, lambda: self.usual(values), dtype)()
