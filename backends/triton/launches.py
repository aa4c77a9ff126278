"""What a generated module launches for given inputs, without running it: what to compile ahead of time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "num_ctas")


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: arguments at run time, and constants, by the names of parameters."""

    kernel: str
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


class _Recorder:
    """Stands for a kernel in a module: `kernel[grid](...)` is noted."""

    def __init__(self, name: str, kernel: Any, noted: list[Launch]) -> None:
        self._name, self._noted = name, noted
        self.fn = kernel.fn
        parameters = inspect.signature(kernel.fn).parameters.values()
        self._names = [parameter.name for parameter in parameters]
        self._constant = {parameter.name for parameter in parameters if "constexpr" in str(parameter.annotation)}

    def __getitem__(self, grid: Any) -> _Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._noted.append(
            Launch(
                self._name,
                {name: value for name, value in given.items() if name not in self._constant},
                {name: value for name, value in given.items() if name in self._constant},
                options.get("num_warps", 4),
                options.get("num_stages", 3),
            )
        )


class _Zeroed:
    """torch, with zeros where nothing would be written: library calls that index by them must find something."""

    empty = staticmethod(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def launches(module: ModuleType, tensors: Sequence[Tensor], weights: Mapping[str, Tensor], arch: int) -> list[Launch]:
    """The launches of `module.forward(tensors, weights)` on a GPU of compute capability `arch`, in order.

    Args:
        module: loaded for this alone: its kernels are replaced.
        tensors, weights: of the sizes and dtypes wanted; what they hold does not matter, but for library calls that
            are made of it.
    """
    noted: list[Launch] = []
    for name, kernel in kernels_of(module).items():
        setattr(module, name, _Recorder(name, kernel, noted))
    run_as_on(module, tensors, weights, arch)
    return noted


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """The kernels of a generated module, and the functions that they call, by name."""
    return {name: item for name, item in vars(module).items() if hasattr(item, "fn") and hasattr(item, "run")}


def run_as_on(module: ModuleType, tensors: Sequence[Tensor], weights: Mapping[str, Tensor], arch: int) -> None:
    """Run `module.forward`, whose kernels do nothing, as on a GPU of compute capability `arch`."""
    vars(module)["arch_of"] = lambda device: arch
    vars(module)["torch"] = _Zeroed()
    module.forward(list(tensors), weights)
