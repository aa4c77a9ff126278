"""Compiles kernels ahead of time for tests, many in one process of their own, and says what each uses.

Triton's interpreter, with which the tests run kernels, and its compiler exclude each other in a process. Jobs and
results are plain data, so that they can be passed between two.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "tf32": r"\bkind::tf32|\.tf32\b",
    "float8": r"mma(_async)?[\w.:]*\.e4m3\b|\bkind::f8f6f4",
    "ld.global.v4": r"\bld\.global(\.[\w:]+)*\.v4\.(b32|u32|f32)",  # 16 bytes to registers
    "cp.async": r"\bcp\.async\.c[ag]\.",
    "cp.async.v4": r"\bcp\.async\.c[ag]\.shared\.global *\[[^\]]*\], *\[[^\]]*\], *0x10\b",  # 16 bytes to shared memory
    "st.global.v4": r"\bst\.global(\.[\w:]+)*\.v4\.(b32|u32|f32)",
    "tma": r"\bcp\.async\.bulk\.tensor",
}  # by name, what to look for in PTX


def job(
    source: str,
    kernel: str,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any] | None = None,
    archs: Sequence[int] = (80, 90, 100),
    num_warps: int = 4,
    num_stages: int = 3,
) -> dict[str, Any]:
    """A kernel to compile: `source` is a module's name or the path of a Python file.

    Arguments are numbers, None, for a pointer the dtype's name, with a "?" behind it if it is not aligned, or for a
    descriptor a list of the dtype's name and the sizes of its block. A constant "tl.int32" is that type of Triton's.
    """
    return {
        "source": source, "kernel": kernel, "arguments": dict(arguments), "constants": dict(constants or {}),
        "archs": list(archs), "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def compiled(jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by the job's name and arch, compiled once in a session: name, shared, registers, spills, instructions.

    `over` says what is beyond the limits, or is None; of a job that failed there is nothing but `error`.
    """
    found = json.loads(_compiled(json.dumps(jobs)))
    return {name: {int(arch): result for arch, result in results.items()} for name, results in found.items()}


@functools.cache
def _compiled(jobs: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        run = subprocess.run(
            [sys.executable, "-P", __file__], input=jobs, env=environment, capture_output=True, text=True, check=False
        )
    if run.returncode:
        raise RuntimeError(f"the process that compiles ended with {run.returncode}: {run.stderr[-2000:]}")
    return run.stdout


def _load(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _argument(value: Any) -> Any:
    import torch

    from fxpress.backends.triton.aot import Descriptor, Pointer

    match value:
        case str():
            return Pointer(getattr(torch, value.rstrip("?")), not value.endswith("?"))
        case [dtype, *block]:
            return Descriptor(getattr(torch, dtype), tuple(block))
    return value


def _constant(value: Any) -> Any:
    import triton.language as tl

    return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value


def _run(task: dict[str, Any], arch: int) -> dict[str, Any]:
    from fxpress.backends.triton.aot import check_limits, compile_kernel
    from fxpress.ir.errors import LoweringError

    kernel = getattr(_load(task["source"]), task["kernel"])
    arguments = {name: _argument(value) for name, value in task["arguments"].items()}
    constants = {name: _constant(value) for name, value in task["constants"].items()}
    made = compile_kernel(kernel, arguments, constants, arch, task["num_warps"], task["num_stages"])
    try:
        over = check_limits(made, arch)
    except LoweringError as error:
        over = str(error)
    return {
        "name": made.name, "shared": made.shared, "registers": made.registers, "spills": made.spills,
        "tensor_memory": made.tensor_memory, "over": over,
        "instructions": [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, made.ptx)],
    }  # fmt: skip


def _attempt(task: dict[str, Any], arch: int) -> dict[str, Any]:
    try:
        return _run(task, arch)
    except Exception as error:  # noqa: BLE001  whatever stops one kernel is that job's result
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Read jobs from standard input and write results to standard output."""
    output, sys.stdout = sys.stdout, sys.stderr  # the compiler prints what ptxas refuses
    tasks = json.load(sys.stdin)
    found = {name: {arch: _attempt(task, arch) for arch in task["archs"]} for name, task in tasks.items()}
    json.dump(found, output)


if __name__ == "__main__":
    main()
