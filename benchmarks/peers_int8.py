"""Peers in 8 bits, each at its best here: ONNX Runtime's tools, torchao and NNCF; and OpenVINO in bfloat16.

Tried and left out, as slower or less exact on MiniLM: quantize_dynamic per tensor, with reduce_range, and after
quant_pre_process; static QDQ with QInt8 activations, with every operator that the tool knows quantized, and calibrated
by entropy or percentile, whose embeddings are no nearer to fp32's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from batches import EVALUATION_SHAPE, load
from candidates import (
    Candidate,
    Prepare,
    Run,
    build_onnx,
    build_optimized,
    compiled,
    max_autotuned,
    onnx_file,
    open_onnx,
    open_openvino,
    open_torch,
    openvino_options,
    saved_inputs,
    tensors_of,
)
from workloads import (
    DYNAMIC,
    DYNAMIC_23,
    DYNAMIC_OPTIMIZED,
    NNCF,
    OPENVINO_BF16,
    STATIC,
    TORCHAO,
    TORCHAO_TUNED,
    Inputs,
    Shape,
    Workload,
)

LINEAR = ["MatMul", "Gemm", "Gather"]


# --- ONNX Runtime ----------------------------------------------------------------------------------------------


def build_dynamic(
    export: Any, options: dict[str, Any], name: str, workload: Workload, work: Path, shape: Shape, inputs: Inputs
) -> str:
    """quantize_dynamic of a float export: int8 weights a channel, activations quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported = f"export for {name}"
    note: str = export(exported, workload, work, shape, inputs)
    file = onnx_file(work, exported, shape)
    quantize_dynamic(file, onnx_file(work, name, shape), per_channel=True, weight_type=QuantType.QInt8, **options)
    return note


def export_default(name: str, *given: Any) -> str:
    return build_onnx(name, None, *given)


def export_opset_23(name: str, *given: Any) -> str:
    return build_onnx(name, 23, *given)


def build_static(workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """quantize_static of an export with dynamic sizes, calibrated once; sizes are fixed afterwards for each shape."""
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_input_shape_fixed

    file = work / "static.onnx"
    if not file.exists():
        quantize_export(workload, work, file, inputs)
    model = onnx.load(file)
    for name in inputs:
        make_input_shape_fixed(model.graph, name, list(shape))
    onnx.save(model, onnx_file(work, STATIC, shape))
    return f"{STATIC}: QDQ, QUInt8 activations, QInt8 weights a channel, {', '.join(LINEAR)}, MinMax calibration"


def quantize_export(workload: Workload, work: Path, file: Path, inputs: Inputs) -> None:
    """Export with dynamic sizes, pre-process, calibrate and quantize.

    The weights are inside the file and the symbolic shape inference is left out, as quant_pre_process fails otherwise.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(load(work / "calibration.npz"))

        def get_next(self) -> Inputs | None:
            return next(self.batches, None)

    exported, processed = file.with_suffix(".export"), file.with_suffix(".processed")
    export_for_any_size(workload, work, exported, inputs)
    quant_pre_process(exported, processed, skip_symbolic_shape=True)
    quantize_static(
        processed,
        file,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=LINEAR,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


def export_for_any_size(workload: Workload, work: Path, file: Path, inputs: Inputs) -> None:
    """torch.onnx.export with dynamic sizes, the weights inside the file."""
    import torch

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with torch.no_grad():
        torch.onnx.export(
            workload.build(),
            (),
            file,
            kwargs=tensors_of(saved_inputs(work, workload.example)),
            dynamo=True,
            dynamic_shapes=dict.fromkeys(inputs, sizes),
            external_data=False,
            verbose=False,
        )


# --- NNCF ------------------------------------------------------------------------------------------------------


def build_nncf(workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """NNCF's post-training quantization for OpenVINO, as its documentation has it for Transformers: its scheme for
    them, with SmoothQuant, and bias correction; calibrated once."""
    import nncf
    import openvino

    file = work / f"{NNCF}.xml"
    if not file.exists():
        exported = work / f"export for {NNCF}.onnx"
        export_for_any_size(workload, work, exported, inputs)
        batches = load(work / "calibration.npz")
        openvino.save_model(
            nncf.quantize(
                openvino.Core().read_model(exported),
                nncf.Dataset(batches),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER,
                fast_bias_correction=True,
            ),
            file,
            compress_to_fp16=False,
        )
    return f"{NNCF}: nncf.quantize, ModelType.TRANSFORMER, QuantizationPreset.MIXED, fast bias correction"


def open_nncf(workload: Workload, work: Path) -> Prepare:
    """The one model, with the sizes of each shape, compiled for latency."""
    import openvino

    def prepare(shape: Shape, inputs: Inputs) -> Run:
        core = openvino.Core()
        model = core.read_model(work / f"{NNCF}.xml")
        model.reshape({name: list(array.shape) for name, array in inputs.items()})
        request = core.compile_model(model, "CPU", openvino_options("f32")).create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True)[0]

    return prepare


# --- torchao ---------------------------------------------------------------------------------------------------


def in_torchao(workload: Workload) -> Workload:
    """The workload with its linear layers quantized: int8 weights a channel, activations a token as they come."""

    def build() -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = workload.build()
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model

    return replace(workload, build=build)


def open_torchao(wrap: Callable[[Any], Any], workload: Workload, work: Path) -> Prepare:
    return open_torch(wrap, in_torchao(workload), work)


def build_torchao(name: str, workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """What torch.save makes of the weights: only its size is used."""
    import torch

    file = work / f"{name}.pt"
    if not file.exists():
        torch.save(in_torchao(workload).build().state_dict(), file)
    return ""


# --- all -------------------------------------------------------------------------------------------------------


def onnx_files(name: str, work: Path) -> list[Path]:
    return list(work.glob(f"{onnx_file(work, name, EVALUATION_SHAPE).name}*"))


def onnx_candidate(name: str, build: Callable[[Workload, Path, Shape, Inputs], str]) -> Candidate:
    return Candidate(partial(open_onnx, name), build, partial(onnx_files, name))


def torchao_candidate(name: str, wrap: Callable[[Any], Any]) -> Candidate:
    return Candidate(partial(open_torchao, wrap), partial(build_torchao, name), lambda work: [work / f"{name}.pt"])


NOT_ATTENTION = {"op_types_to_quantize": LINEAR}  # the tool's rewrite of ai.onnx::Attention loads in no session
IN_FLOAT = {"extra_options": {"DefaultTensorType": 1}}  # types of tensors that shape inference knows nothing of

QUANTIZED = {
    DYNAMIC: onnx_candidate(DYNAMIC, partial(build_dynamic, export_default, {}, DYNAMIC)),
    DYNAMIC_23: onnx_candidate(DYNAMIC_23, partial(build_dynamic, export_opset_23, NOT_ATTENTION, DYNAMIC_23)),
    DYNAMIC_OPTIMIZED: onnx_candidate(
        DYNAMIC_OPTIMIZED, partial(build_dynamic, build_optimized, IN_FLOAT, DYNAMIC_OPTIMIZED)
    ),
    STATIC: onnx_candidate(STATIC, build_static),
    OPENVINO_BF16: Candidate(
        partial(open_openvino, OPENVINO_BF16, "bf16"),
        partial(build_onnx, OPENVINO_BF16, None),
        partial(onnx_files, OPENVINO_BF16),
    ),
    NNCF: Candidate(open_nncf, build_nncf, lambda work: [work / f"{NNCF}.xml", work / f"{NNCF}.bin"], f"{NNCF}.xml"),
    TORCHAO: torchao_candidate(TORCHAO, compiled),
    TORCHAO_TUNED: torchao_candidate(TORCHAO_TUNED, max_autotuned),
}
