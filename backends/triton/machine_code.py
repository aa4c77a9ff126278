"""Machine code of a generated module's kernels: compiled for GPUs that need not be there, and used where they are.

What Triton compiles at the first launch of a kernel with some kind of arguments, it asks the kernel's own `compile`
for. That is what is replaced here, on the kernels of one module: to note what is compiled, and later to give it back.
Triton's cache on disk, which all programs of a user share, is neither read nor written for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode, FutureKernel
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.compiler import compile as triton_compile
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ...ir.errors import LoweringError
from .launches import kernels_of, run_as_on

LIBRARIES = "extern_libs"  # of the metadata: paths of the machine that compiled


@dataclass(frozen=True)
class Code:
    """A kernel compiled for one kind of launch on one architecture.

    Attributes:
        metadata: what Triton knows of it (shared memory, warps, name, ...), as JSON.
        binary: machine code (cubin).
    """

    metadata: str
    binary: bytes


def key_of(source: Any, target: GPUTarget, options: Mapping[str, Any]) -> str:
    """The digest of all that machine code depends on: the kernel's text and what it calls, its signature, constants
    and alignments, the options, the architecture, Triton's version and the settings of its environment."""
    parsed = make_backend(target).parse_options(dict(options))
    settings = sorted(get_cache_invalidating_env_vars().items())
    parts = [triton.__version__, target.backend, target.arch, source.hash(), parsed.hash(), settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def use(module: ModuleType, known: Mapping[str, Code]) -> None:
    """Let the kernels of a module take machine code that is known; what is not is compiled as usual."""

    def given(source: Any, target: GPUTarget, options: Mapping[str, Any], **others: Any) -> CompiledKernel:
        key = key_of(source, target, options)
        if key not in known:
            return triton_compile(source, target=target, options=options, **others)
        return _loaded(source, known[key], key)

    _replace_compile(module, given)


def _loaded(source: Any, code: Code, key: str) -> CompiledKernel:
    """What Triton makes of the files that it finds in its cache."""
    with tempfile.TemporaryDirectory(prefix="fxpress-") as folder:
        files = {f"{source.name}.json": code.metadata.encode(), f"{source.name}.cubin": code.binary}
        paths = {}
        for name, content in files.items():
            path = Path(folder, name[-60:])
            path.write_bytes(content)
            paths[name] = str(path)
        return CompiledKernel(source, paths, key)


def _replace_compile(module: ModuleType, function: Callable[..., CompiledKernel]) -> None:
    for kernel in kernels_of(module).values():
        if not isinstance(kernel, JITFunction):
            continue  # interpreted
        if not isinstance(getattr(kernel, "device_caches", None), defaultdict):
            warnings.warn(f"saved machine code is not used: triton {triton.__version__} is not known", stacklevel=2)
            return
        _replace_one(kernel, function)


def _replace_one(kernel: JITFunction[Any], function: Callable[..., CompiledKernel]) -> None:
    """A kernel sets its `compile` when it is first launched on a device."""
    create = kernel.create_binder

    def created() -> Any:
        found = create()
        kernel.compile = function
        return found

    kernel.device_caches = defaultdict(created)


# --- ahead of time --------------------------------------------------------------------------------------------------


class _Target:
    """Stands for the driver of a GPU that is not here."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


def compiled(
    module: ModuleType, tensors: Sequence[Tensor], weights: Mapping[str, Tensor], arch: int
) -> dict[str, Code]:
    """The machine code of what `module.forward(tensors, weights)` launches on an architecture, by `key_of`.

    The launches are Triton's own, up to where it would start the kernel, so that types, alignments and options are
    those of a launch on such a GPU. Not in a process that interprets kernels.

    Args:
        module: loaded for this alone.
        tensors, weights: on the CPU, of the sizes and dtypes wanted; what they hold does not matter.
    """
    found: dict[str, Code] = {}

    def noted(source: Any, target: GPUTarget, options: Mapping[str, Any], **others: Any) -> CompiledKernel:
        made = triton_compile(source, target=target, options=options, **others)
        path = next(path for name, path in made.metadata_group.items() if name.endswith(".json"))
        metadata = {**json.loads(Path(path).read_text(encoding="utf-8")), LIBRARIES: []}
        found[key_of(source, target, options)] = Code(json.dumps(metadata, sort_keys=True), made.asm["cubin"])
        return made

    _replace_compile(module, noted)
    launch_nothing(module, tensors, weights, arch)
    return found


def launch_nothing(module: ModuleType, tensors: Sequence[Tensor], weights: Mapping[str, Tensor], arch: int) -> None:
    """Launch what `module.forward` does as on a GPU of an architecture, up to where the driver would start a kernel.

    Not in a process that has such a GPU, or interprets kernels: Triton's driver is replaced.
    """
    for kernel in kernels_of(module).values():
        kernel.run = _only_compiling(kernel.run)
    driver.set_active(_Target(arch))
    run_as_on(module, tensors, weights, arch)


def _only_compiling(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(*args, **{**kwargs, "warmup": True})


def compile_launches(module: ModuleType, calls: Sequence[Callable[[], Any]]) -> None:
    """Compile in parallel what calls would launch of a module's kernels, none of which is launched.

    What cannot be compiled is passed over: the call itself, when it launches, compiles it again and raises that.
    """
    kernels = [kernel for kernel in kernels_of(module).values() if isinstance(kernel, JITFunction)]
    if not kernels:
        return  # interpreted
    launching = [kernel.run for kernel in kernels]
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for kernel in kernels:
                kernel.run = _only_compiling(kernel.run)
            for call in calls:
                with contextlib.suppress(Exception):
                    call()
    finally:
        for kernel, run in zip(kernels, launching, strict=True):
            kernel.run = run
            for known, *_ in kernel.device_caches.values():
                for key in [
                    key for key, made in known.items() if isinstance(made, FutureKernel) and made.kernel is None
                ]:
                    del known[key]


def build(
    source: str,
    batches: Iterable[Sequence[Tensor]],
    weights: Mapping[str, Tensor],
    archs: Sequence[int],
    forms: Mapping[str, str] | None = None,
) -> dict[int, dict[str, Code]]:
    """Compile a generated module for architectures, in a process for each, without a GPU.

    Args:
        source: of the module.
        batches: inputs; a kernel is compiled for each kind of launch that one of them leads to.
        weights: as the module reads them.
        archs: compute capabilities, 90 for sm_90.
        forms: as `Tuner.attach` takes them, for the kernels of all that a tuner measures; None: of the module's own
            choice alone.

    Raises:
        LoweringError: a kernel cannot be compiled.
    """
    task = {
        "source": source, "forms": None if forms is None else dict(forms),
        "weights": {name: _shape(item) for name, item in weights.items()},
        "batches": [[_shape(item) for item in batch] for batch in batches],
    }  # fmt: skip
    with ThreadPoolExecutor(max_workers=min(len(archs), os.cpu_count() or 1) or 1) as pool:
        return dict(zip(archs, pool.map(lambda arch: _built({**task, "arch": arch}), archs), strict=True))


def _built(task: Mapping[str, Any]) -> dict[str, Code]:
    """The machine code of a task, for one architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="fxpress-") as folder:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "fxpress.backends.triton.build", folder],
            input=json.dumps(task), env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
            raise LoweringError(f"machine code for sm_{task['arch']} cannot be made: {last}")
        return {
            path.stem: Code(path.with_suffix(".json").read_text(encoding="utf-8"), path.read_bytes())
            for path in sorted(Path(folder).glob("*.cubin"))
        }


def _shape(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), list(tensor.stride())]


def empty(shape: Sequence[Any]) -> Tensor:
    """Zeros of a dtype, sizes and strides; no memory is touched."""
    dtype, sizes, strides = shape
    span = 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True)) if 0 not in sizes else 0
    return torch.zeros(span, dtype=getattr(torch, dtype)).as_strided(sizes, strides)
