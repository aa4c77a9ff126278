"""The points of our curves of speed against error: a name and its passes, as fxpress.compile takes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from batches import load
from candidates import fxpress_candidate, open_fxpress, open_planned, saved_inputs, tensors_of
from workloads import (
    BF16,
    BF16_UNPADDED,
    CUT50,
    CUT70,
    CUTS,
    INT4,
    INT4_NEAREST,
    INT4_OF_INT8,
    INT8,
    INT8_CLOSE,
    INT8_OPENVINO,
    INT8_STATIC,
    INT8_UNPADDED,
    PADDED,
    POINTS,
    UNPADDED,
    Inputs,
    Shape,
    Workload,
)

PASSES = {
    INT8_CLOSE: "quantize(int8, min_cosine=0.999), fuse",
    INT8: "quantize(int8), fuse",
    INT8_STATIC: "quantize(int8, mode=static), fuse",
    INT8_OPENVINO: "quantize(int8, mode=static), fuse",
    BF16: "fuse",
    INT4: "quantize(int4), fuse",
    INT4_OF_INT8: "quantize(int4, activations=int8), fuse",
    INT4_NEAREST: "quantize(int4, method=minmax), fuse",
    UNPADDED: "remove_padding, fuse",
    INT8_UNPADDED: "remove_padding, quantize(int8), fuse",
    BF16_UNPADDED: "remove_padding, fuse",
}
IN_BF16 = {"backend": "openvino", "dtype": "bfloat16"}
OPTIONS: dict[str, dict[str, str]] = {  # of compile; in OpenVINO all, and loaded for each shape's sizes
    BF16: IN_BF16,
    BF16_UNPADDED: IN_BF16,
    INT8_OPENVINO: {"backend": "openvino"},
}
PRUNING = {  # by workload
    "minilm-pruned": {
        CUT70: "mask_weights(0.3, sparsegpt, 'dims+neurons'), fuse",
        CUT50: "mask_weights(0.5, sparsegpt, 'dims+neurons'), fuse",
    },
    "bert-pruned": {
        CUT70: "mask_weights(0.3, magnitude, 'heads+neurons'), fuse",
        CUT50: "mask_weights(0.5, magnitude, 'heads+neurons'), fuse",
    },
}


def passes_of(workload: Workload, name: str) -> str:
    """The passes of a point in a workload."""
    return PASSES[name] if name in PASSES else PRUNING[workload.name][name]


def folder_of(name: str) -> str:
    return f"artifact of {name}"


def build_point(name: str, workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """One artefact for every shape, compiled from one small example and, if the workload says so, calibrated."""
    from fxpress import compile

    folder, passes = work / folder_of(name), passes_of(workload, name)
    if not folder.exists():
        example = saved_inputs(work, workload.example)
        texts = load(work / "calibration.npz") if workload.calibration else []
        compiled = compile(
            workload.build(),
            passes,
            example_inputs=tensors_of(example),
            calibration=[tensors_of(batch) for batch in texts],
            threads=1,
            **OPTIONS.get(name, {}),
        )
        compiled.save(folder)
    options = ", ".join(OPTIONS.get(name, {}).values())
    return f"{name}: passes {passes}" + (f"; {options}" if options else "")


OUR_POINTS = {
    name: fxpress_candidate(
        folder_of(name), partial(build_point, name), open_planned if name in OPTIONS else open_fxpress
    )
    for name in (*POINTS, *CUTS, *PADDED)
}
