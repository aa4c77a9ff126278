"""Jobs for `aot` from what a function of kernels/ launches on a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import aot
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Recorder:
    """Stands for a kernel, and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.names = kernel.arg_names
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **named: self.arguments.update(zip(self.names, arguments, strict=False), **named)


def jobs(module: Any, arch: int, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call launches of a module's kernels on an architecture, by the kernel's name.

    The call makes its tensors; they have sizes and no elements.
    """
    recorders = {name: Recorder(kernel) for name, kernel in vars(module).items() if name.endswith("_kernel")}
    replaced: dict[str, Any] = dict(recorders)
    if hasattr(module, "arch_of"):
        replaced["arch_of"] = lambda device: arch
    with FakeTensorMode(), patch.multiple(module, **replaced):
        call()
    return {
        name: _job(module.__name__, name, recorder.arguments, arch)
        for name, recorder in recorders.items()
        if recorder.arguments
    }


def _job(module: str, kernel: str, given: dict[str, Any], arch: int) -> dict[str, Any]:
    options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    constants = {name: value for name, value in given.items() if name.isupper()}
    constants |= {name: False for name in constants if name == "UPCAST"}  # of the interpreter
    arguments = {
        name: str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else value
        for name, value in given.items()
        if name not in options and name not in constants
    }
    return aot.job(module, kernel, arguments, constants, [arch], **options)


def heads(number: int, length: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[2, number, length, size], heads third in memory."""
    return torch.empty(2, length, number, size, dtype=dtype).transpose(1, 2)
