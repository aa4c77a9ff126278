"""A generated module, loaded and run."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ...ir.errors import InputError
from ...ir.graph import Program, attribute
from .graphs import Graphs
from .machine_code import Code, build, use
from .module import Generated, generate, write
from .serial import dump
from .tune import Tuner, not_capturing


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def triton_version() -> str:
    """The version of Triton that is here."""
    return str(triton.__version__)


def arch_here(device: torch.device | None = None) -> int | None:
    """The compute capability, 90 for sm_90, of the GPU on which kernels run; None: they are interpreted.

    Args:
        device: of the model; None: the current one.
    """
    if interpreted() or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tuner_here() -> Tuner | None:
    """What measures on the GPU that is here; None: there is none."""
    return None if arch_here() is None else Tuner()


def check_device(program: Program) -> None:
    """
    Raises:
        InputError: if generated kernels could not run where the weights are.
    """
    tensors = [*program.module.parameters(), *program.module.buffers()]
    device = tensors[0].device if tensors else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not interpreted():
        raise InputError(
            f"backend 'triton' needs a model on CUDA, found {device}: move both there, or set "
            "TRITON_INTERPRET=1 before Python starts, which runs the kernels in Triton's interpreter (slow, for tests)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of numpy, with which the interpreter computes also what masks leave out."""
    if not interpreted():
        yield
        return
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


class Loaded:
    """A generated module whose source lies in a temporary folder, where Triton reads it."""

    def __init__(self, source: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix="fxpress-triton-"))
        weakref.finalize(self, shutil.rmtree, folder, True)
        name = f"fxpress_generated_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        self.path = folder / f"{name}.py"
        self.path.write_text(source, encoding="utf-8")
        self.module = self._import(name)

    def _import(self, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # inspect, through which Triton reads sources, looks there
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
        return module


class TritonRunner:
    """The kernels generated for a program.

    Args:
        tuner: chooses, by measuring, how products and attentions run; None: as the module does by itself.
    """

    name = "triton"

    def __init__(self, program: Program, tuner: Tuner | None = None) -> None:
        check_device(program)
        self._take(generate(program), {}, tuner)

    @classmethod
    def restored(cls, ready: Program, code: Mapping[str, Code], tuner: Tuner | None = None) -> TritonRunner:
        """The kernels of a prepared program, `serial.restore`d, with machine code that is known of them.

        Raises:
            InputError: they could not run where the weights are.
            LoweringError: the program is none that `prepare` gives.
        """
        check_device(ready)
        found = cls.__new__(cls)
        found._take(write(ready), code, tuner)
        return found

    def _take(self, generated: Generated, code: Mapping[str, Code], tuner: Tuner | None) -> None:
        self.generated, self._tuner, self._lock = generated, tuner, threading.Lock()
        self._loaded = Loaded(generated.source)
        if code:
            use(self._loaded.module, code)
        if tuner is not None:
            tuner.attach(self._loaded.module, generated.forms)
        self._weights = self._on_one_device()
        self._graphs = Graphs(self._forward, sum(item["launches"] for item in generated.launches))

    def _on_one_device(self) -> dict[str, Tensor]:
        """The weights by name; constants that the model left on the CPU go to the GPU, where kernels read."""
        weights = {name: attribute(self.generated.program.module, name) for name in self.generated.weights}
        gpu = next((weight.device for weight in weights.values() if weight.is_cuda), None)
        return {name: weight if gpu is None else weight.to(gpu) for name, weight in weights.items()}

    def program(self) -> dict[str, Any]:
        """The prepared program as data, for `serial.restore`.

        Raises:
            LoweringError: something in it has no form as data.
        """
        return dump(self.generated.program)

    def weights(self) -> dict[str, Tensor]:
        """The weights by the name under which the module reads them."""
        return dict(self._weights)

    def machine_code(
        self, batches: Iterable[Sequence[Tensor]], archs: Sequence[int], tune: bool = True
    ) -> dict[int, dict[str, Code]]:
        """The machine code of what these inputs lead to on GPUs of compute capability `archs`, 90 for sm_90.

        Args:
            tune: also of all that a tuner measures there.

        Raises:
            LoweringError: a kernel cannot be compiled.
        """
        return build(self.source, batches, self._weights, archs, self.generated.forms if tune else None)

    @property
    def source(self) -> str:
        """The text of the generated module."""
        return self.generated.source

    @property
    def plan(self) -> str:
        """The launches and what each waits for, in Graphviz's language."""
        return self.generated.dot

    @property
    def tuned(self) -> list[dict[str, Any]]:
        """How the products and attentions that have run so far do so, and what was measured, for the report."""
        return [] if self._tuner is None else self._tuner.choices

    @property
    def launches(self) -> list[dict[str, Any]]:
        """What a run launches, for the report."""
        return list(self.generated.launches)

    @property
    def memory(self) -> dict[str, int]:
        """How many results kernels store and in how much memory, for the report."""
        return dict(self.generated.memory)

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Flat inputs to flat outputs."""
        with torch.no_grad(), _quiet(), self._lock:  # measuring and replaying are for one thread at a time
            # Within a graph that the caller records, the launches themselves become a part of it.
            on_gpu = any(tensor.is_cuda for tensor in tensors)
            return self._graphs(tensors) if on_gpu and not_capturing() else self._forward(tensors)

    def _forward(self, tensors: Sequence[Tensor]) -> list[Any]:
        found: list[Any] = self._loaded.module.forward(list(tensors), self._weights)
        return found
