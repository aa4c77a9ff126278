"""Running an ONNX model of the standard with OpenVINO, on the CPU. Imports no torch: a loaded artefact needs none.

OpenVINO compiles kernels for the sizes that it meets, and keeps them; on processors that have bfloat16 units (AMX,
AVX-512 BF16) it can multiply in it what the file has in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import openvino

from ...ir import checks
from ...ir.errors import ArtifactError, InputError, one_line

VERSION = openvino.__version__.partition("-")[0]

_HINTS = {None: "f32", "bfloat16": "bf16"}


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that this machine does not compute in: OpenVINO would quietly take another one.

    Raises:
        InputError: says so.
    """
    if dtype is not None and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError("this processor does not compute in bfloat16 (AMX or AVX-512 BF16 do); leave dtype out")


class OpenVinoSession:
    """A model compiled by OpenVINO for the CPU; threads may share it.

    Args:
        path: the model file; weights beside it are found by OpenVINO.
        threads: threads inside one operator; None: OpenVINO's own choice, one a physical core.
        dtype: "bfloat16": what is computed in it where OpenVINO has kernels, matmuls above all; inputs and outputs stay
            as they are. None: float32 throughout; left to itself OpenVINO takes bfloat16 where the processor has it.
        shapes: of all inputs, in their order, where no others will come: OpenVINO plans memory and kernels for them.

    Raises:
        ArtifactError: OpenVINO does not take the file.
        InputError: this processor does not compute in `dtype`.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        dtype: str | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        checks.threads(threads)
        check_dtype(dtype)
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[dtype],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else inputs of layers with 8-bit weights are rounded to 8 bits, too
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            model = core.read_model(path)
            self._rows = _rows(model)
            if shapes is not None:
                model.reshape({place: openvino.PartialShape(list(shape)) for place, shape in enumerate(shapes)})
            self._model = core.compile_model(model, "CPU", options)
        except Exception as error:  # OpenVINO raises RuntimeError and classes of its own
            raise ArtifactError(f"OpenVINO cannot load {path.name}: {one_line(error)}") from error
        self.inputs, self.outputs = (
            [item.get_any_name() for item in side] for side in (self._model.inputs, self._model.outputs)
        )
        self._local = threading.local()  # a request runs one input at a time

    def run(self, arrays: Sequence[numpy.ndarray[Any, Any]]) -> list[numpy.ndarray[Any, Any]]:
        """Run on arrays in the order of the signature; gives arrays in the order of the outputs.

        Raises:
            InputError: OpenVINO fails on this input, or would give zeros for rows that a table does not have.
        """
        for place, rows in self._rows.items():
            low, high = int(arrays[place].min(initial=0)), int(arrays[place].max(initial=0))
            if low < -rows or high >= rows:
                wrong = high if high >= rows else low
                raise InputError(f"input {self.inputs[place]!r} holds {wrong}, the table that it reads has {rows} rows")
        if not hasattr(self._local, "request"):
            self._local.request = self._model.create_infer_request()
        try:
            # A tuple: given a list, OpenVINO first fetches every input's tensor, up to 0.2 ms a run.
            found = self._local.request.infer(tuple(arrays), share_inputs=True)
        except Exception as error:  # as above
            raise InputError(f"OpenVINO failed on inputs of {[a.shape for a in arrays]}: {one_line(error)}") from error
        return [found[item] for item in self._model.outputs]


def _rows(model: Any) -> dict[int, int]:
    """By the place of each input that a table is looked up by: how many rows that has; the smallest table counts."""
    places = {item.get_node().get_friendly_name(): place for place, item in enumerate(model.inputs)}
    found: dict[int, int] = {}
    for node in model.get_ops():
        if node.get_type_name() != "Gather":
            continue
        index, axis = (node.input_value(port).get_node() for port in (1, 2))
        while index.get_type_name() in ("Convert", "Reshape", "Squeeze", "Unsqueeze"):
            index = index.input_value(0).get_node()
        place, shape = places.get(index.get_friendly_name()), node.input_value(0).get_partial_shape()
        if place is not None and axis.get_type_name() == "Constant" and shape.rank.is_static:
            size = shape[axis.get_data().item()]
            if size.is_static:
                found[place] = min(size.get_length(), found.get(place, size.get_length()))
    return found
