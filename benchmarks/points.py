"""The points of our curve of speed against error: a name and its passes, as fxpress.compile takes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from batches import load
from candidates import Candidate, artifact_files, open_fxpress, saved_inputs, tensors_of
from workloads import INT4, INT4_NEAREST, INT8, INT8_CLOSE, INT8_STATIC, Inputs, Shape, Workload

PASSES = {
    INT8_CLOSE: "quantize(int8, min_cosine=0.999), fuse",
    INT8: "quantize(int8), fuse",
    INT8_STATIC: "quantize(int8, mode=static), fuse",
    INT4: "quantize(int4), fuse",
    INT4_NEAREST: "quantize(int4, method=minmax), fuse",
}


def folder_of(name: str) -> str:
    return f"artifact of {name}"


def build_point(name: str, workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """One artefact for every shape, compiled from one small example and calibrated on the corpus."""
    from fxpress import compile

    folder = work / folder_of(name)
    if not folder.exists():
        example = saved_inputs(work, workload.example)
        compiled = compile(
            workload.build(),
            PASSES[name],
            example_inputs=tensors_of(example),
            calibration=[tensors_of(batch) for batch in load(work / "calibration.npz")],
            threads=1,
        )
        compiled.save(folder)
    return f"{name}: passes {PASSES[name]}"


OUR_POINTS = {
    name: Candidate(
        partial(open_fxpress, folder_of(name)), partial(build_point, name), partial(artifact_files, folder_of(name))
    )
    for name in PASSES
}
