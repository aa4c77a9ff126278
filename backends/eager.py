"""The eager backend: runs a program's references in PyTorch. It is the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.graph import Program


class EagerRunner:
    """Runs a program as it is."""

    name = "eager"

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Flat inputs to flat outputs, under no_grad."""
        with torch.no_grad():
            return list(self.program.run(tensors))
