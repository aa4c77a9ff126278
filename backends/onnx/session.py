"""Running an ONNX model with ONNX Runtime. Imports no torch: a loaded artefact needs none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnxruntime

from ...ir import checks
from ...ir.errors import ArtifactError, InputError, one_line


def plain_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession with default options but for its threads, as users make them of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions; nothing else is printed
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


class Session:
    """An ONNX Runtime session on the CPU.

    Args:
        path: the model file; weights beside it are found by ONNX Runtime.
        threads: threads inside one operator; None: one a physical core, ONNX Runtime's own default.

    Raises:
        ArtifactError: ONNX Runtime does not take the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        checks.threads(threads)
        try:
            self._session = plain_session(path, threads)
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            raise ArtifactError(f"ONNX Runtime cannot load {path.name}: {one_line(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = [item.name for item in inputs]
        self.outputs = [item.name for item in outputs]
        self.output_shapes = [list(item.shape) for item in outputs]  # numbers, names of sizes, or None
        self._input_dtypes, self.output_dtypes = ([_dtype(item.type) for item in side] for side in (inputs, outputs))

    def run(self, arrays: Sequence[numpy.ndarray[Any, Any]]) -> list[numpy.ndarray[Any, Any]]:
        """Run on arrays in the order of the signature; gives arrays in the order of the outputs.

        Raises:
            InputError: ONNX Runtime fails on this input.
        """
        try:
            found = self._session.run(self.outputs, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:  # as above
            raise InputError(
                f"ONNX Runtime failed on inputs of {[a.shape for a in arrays]}: {one_line(error)}"
            ) from error
        return list(found)

    def run_into(
        self, inputs: Sequence[tuple[int, Sequence[int]]], outputs: Sequence[tuple[int, Sequence[int]]]
    ) -> None:
        """Run on memory of the caller: the address and shape of each contiguous input and output, none of them empty.

        Raises:
            InputError: ONNX Runtime fails on this input.
        """
        binding = self._session.io_binding()
        try:
            for name, dtype, (address, shape) in zip(self.inputs, self._input_dtypes, inputs, strict=True):
                binding.bind_input(name, "cpu", 0, dtype, list(shape), address)
            for name, dtype, (address, shape) in zip(self.outputs, self.output_dtypes, outputs, strict=True):
                binding.bind_output(name, "cpu", 0, dtype, list(shape), address)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise InputError(
                f"ONNX Runtime failed on inputs of {[tuple(shape) for _, shape in inputs]}: {one_line(error)}"
            ) from error


_NUMPY = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}


def _dtype(kind: str) -> Any:
    """The numpy dtype of ONNX Runtime's `tensor(float)`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return numpy.dtype(_NUMPY.get(name, name)).type
