"""Jobs for `aot` from the kernels that a program's generated module launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aot
import torch
from torch import Tensor

from fxpress.backends.triton.launches import Launch, launches
from fxpress.backends.triton.runner import Loaded, TritonRunner
from fxpress.ir.graph import Program, attribute


def jobs(
    name: str,
    program: Program,
    tensors: Sequence[Tensor],
    folder: Path,
    arch: int,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One job for each kernel that the module of a program launches on an architecture, by `name/kernel`.

    `config` is that of all products; None: the best guess for each.
    """
    runner = TritonRunner(program)
    path = folder / f"{name}.py"
    path.write_text(runner.source, encoding="utf-8")
    weights = {key: attribute(runner.generated.program.module, key) for key in runner.generated.weights}
    module = Loaded(runner.source).module
    if config is not None:
        vars(module)["first_config"] = lambda *_: config
    noted = launches(module, tensors, weights, arch)
    return {f"{name}/{item.kernel}": _job(str(path), item, arch) for item in noted}


def _job(path: str, launch: Launch, arch: int) -> dict[str, Any]:
    arguments = {name: _plain(value) for name, value in launch.arguments.items()}
    constants = {name: _constant(value) for name, value in launch.constants.items()}
    return aot.job(path, launch.kernel, arguments, constants, [arch], launch.num_warps, launch.num_stages)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.") + ("" if value.data_ptr() % 16 == 0 else "?")
    if hasattr(value, "block_shape"):
        return [str(value.base.dtype).removeprefix("torch."), *value.block_shape]
    return value


def _constant(value: Any) -> Any:
    return f"tl.{value}" if type(value).__name__ == "dtype" and not isinstance(value, torch.dtype) else value


def check(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """What is wrong with compiled kernels: those that do not compile, or use more than there is.

    Spilled registers count where a kernel is hot (test_hot_kernels_use_the_machine), not at the tiny sizes of tests.
    """
    found = []
    for name, by_arch in results.items():
        for arch, result in by_arch.items():
            over = result.get("error") or result["over"]
            if over and not ("spilled registers" in over and "," not in over):
                found.append(f"{name} on sm_{arch}: {over}")
    return found
