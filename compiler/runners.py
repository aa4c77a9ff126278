"""What backends make of a program, ready to run, and the time that their making takes."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.eager import EagerRunner
from ..ir.errors import ArtifactError, InputError, LoweringError
from ..ir.graph import Program, arguments, source_of
from ..ir.ops.quantize import int8_linear
from ..ir.printer import print_program
from . import artifact, structure
from .report import Report


class Clock:
    """Seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what is done within, as a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


@contextmanager
def without_collector() -> Iterator[None]:
    """Tracing makes millions of small objects that live on; searching them for cycles costs a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Runner(Protocol):
    """What a backend makes of a program."""

    name: str

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Flat inputs to flat outputs."""
        ...


class _FileRunner:
    """A session of a program's ONNX model, with its files in a temporary folder."""

    session: Any  # its `run` takes and gives arrays
    leaves: list[Any]

    def _save(self, model: Any) -> Path:
        from ..backends.onnx.export import save

        self.files = Path(tempfile.mkdtemp(prefix="fxpress-"))
        weakref.finalize(self, shutil.rmtree, self.files, True)
        save(model, self.files / artifact.MODEL)
        return self.files / artifact.MODEL

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Flat inputs to flat outputs, on the CPU."""
        found = self.session.run([tensor.detach().cpu().numpy() for tensor in tensors])
        return [leaf.constant if leaf.index is None else torch.from_numpy(found[leaf.index]) for leaf in self.leaves]


class OnnxRunner(_FileRunner):
    """A program in ONNX Runtime, in its own kernels that were measured the fastest."""

    name = "onnx"

    def __init__(self, program: Program, threads: int | None, clock: Clock, tune: bool = True) -> None:
        from ..backends.onnx.choose import choose
        from ..backends.onnx.export import check_supported, leaves_of, to_onnx
        from ..backends.onnx.session import Session

        with clock("check support"):
            check_supported(program)
        with clock("choose lowerings"):
            chosen, self.choices = choose(program, threads=threads, measure=tune)
        with clock("lower"):
            self.leaves = leaves_of(program)
            model = to_onnx(program, chosen)
        with clock("load"):
            self.session = Session(self._save(model), threads)


class OpenVinoRunner(_FileRunner):
    """A program in OpenVINO, in those operators of the ONNX standard that were measured the fastest there."""

    name = "openvino"

    def __init__(
        self, program: Program, threads: int | None, clock: Clock, dtype: str | None = None, tune: bool = True
    ) -> None:
        from ..backends.onnx.choose import Runtime, choose
        from ..backends.onnx.export import leaves_of, standard_form, to_standard_onnx
        from ..backends.onnx.halves import store_halves
        from ..backends.onnx.lowerings.lowering import STANDARD_OPSET
        from ..backends.onnx.lowerings.table import standard
        from ..backends.openvino.session import VERSION, OpenVinoSession

        self.dtype = dtype
        with clock("check support"):
            _check_static(program)
            lowered = standard_form(program)
        runtime = Runtime(
            f"openvino {VERSION}, {dtype or 'float32'}", standard, partial(OpenVinoSession, dtype=dtype), STANDARD_OPSET
        )
        with clock("choose lowerings"):
            chosen, self.choices = choose(lowered, threads=threads, measure=tune, runtime=runtime)
        with clock("lower"):
            self.leaves = leaves_of(program)
            model = to_standard_onnx(lowered, chosen)
            if dtype == "bfloat16":
                store_halves(model)
        with clock("load"):
            try:
                self.session = OpenVinoSession(self._save(model), threads, dtype)
            except ArtifactError as error:
                raise LoweringError(f"{error}; backend='onnx' may") from error


def _check_static(program: Program) -> None:
    """OpenVINO multiplies integers where the ranges are constants; others it would quietly compute in floats.

    Raises:
        LoweringError: names a linear layer of another kind.
    """
    for node in program.calls(int8_linear):
        if getattr(arguments(node)["scale"], "op", None) != "get_attr":
            raise LoweringError(
                f"{node.name}: OpenVINO multiplies no integers whose ranges are found at each run"
                f"{source_of(node)}; quantize with mode='static', or take backend='onnx'"
            )


def check_installed(backend: str) -> None:
    """Refuse a backend whose package is not here, before any work is done.

    Raises:
        InputError: names the package.
    """
    if backend in ("openvino", "triton") and find_spec(backend) is None:
        raise InputError(f"backend {backend!r} needs the package {backend}: pip install {backend}")


def best_backend(tensors: Sequence[Tensor]) -> str:
    """The backend for inputs like these: triton for a GPU, else onnx."""
    return "triton" if any(tensor.is_cuda for tensor in tensors) else "onnx"


def make_runner(
    backend: str, program: Program, threads: int | None, clock: Clock, tune: bool = True, inside: str | None = None
) -> Runner:
    """What a backend, by its name, makes of a program.

    Args:
        tune: whether candidates are measured; else the first one runs.
        inside: the dtype that openvino computes in.

    Raises:
        LoweringError: nodes that it cannot lower.
        InputError: it cannot run here.
    """
    if backend == "onnx":
        return OnnxRunner(program, threads, clock, tune)
    if backend == "eager":
        return EagerRunner(program)
    try:
        if backend == "openvino":
            return OpenVinoRunner(program, threads, clock, inside, tune)
        from ..backends.triton.runner import TritonRunner, tuner_here
    except ModuleNotFoundError as error:
        raise InputError(f"backend {backend!r} needs the package {error.name}: pip install {backend}") from error
    with clock("lower"):
        return TritonRunner(program, tuner_here() if tune else None)


def save_runner(
    runner: Runner,
    path: Path,
    program: Program,
    report: Report,
    example: Sequence[Tensor],
    archs: Sequence[int] | None,
    others: Sequence[Sequence[Any]],
    dtype: torch.dtype | None,
    tune: bool,
    extra: Mapping[str, str],
) -> None:
    """Write what a backend made of a program as an artefact.

    Args:
        example: flat inputs.
        archs, others: of the triton backend: GPUs to compile for, and more flat inputs to compile for.
        dtype: that float inputs are cast to.
        tune: whether candidates are measured where it runs, and compiled for that.
        extra: more files, as text by name.

    Raises:
        InputError: the path exists or cannot be written, or the backend has no artefacts, or not these options.
        LoweringError: a kernel cannot be compiled for one of the GPUs.
    """
    described = (program.signature, structure.dump(program.out_spec), report, print_program(program))
    if runner.name == "triton":
        from . import triton_files

        batches = [example, *([torch.as_tensor(item) for item in batch] for batch in others)]
        triton_files.write(path, runner, batches, triton_files.check_archs(archs), dtype, tune, *described, extra)
        return
    if archs or others:
        raise InputError(f"archs and examples are for kernels of the triton backend, this is {runner.name!r}")
    if not isinstance(runner, OnnxRunner | OpenVinoRunner):
        raise InputError("the eager backend has nothing to save; compile with backend='onnx', 'openvino' or 'triton'")
    leaves = [{"index": leaf.index, "constant": leaf.constant} for leaf in runner.leaves]
    inside = getattr(runner, "dtype", None)
    artifact.write(
        path, runner.files, described[0], leaves, *described[1:], backend=runner.name, dtype=inside, extra=extra
    )


def generated(runner: Runner, what: str) -> str:
    """The `source` or the `plan` of generated code.

    Raises:
        InputError: the runner has none.
    """
    found = getattr(runner, what, None)
    if found is None:
        raise InputError(f"only the triton backend generates a module, this is {runner.name!r}")
    return str(found)
