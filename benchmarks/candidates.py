"""The candidates: each is a way to run a workload on one thread.

`open` runs in the process that is measured and gives what prepares one shape. Candidates that need files have a
`build`, which runs before that in a process of its own, so that no exporter's memory is taken for the runtime's.
Here are those in fp32; lineup.py has all by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from workloads import (
    COMPILED,
    EAGER,
    FIXED,
    ONNX,
    ONNX_23,
    OPENVINO,
    OPTIMIZED,
    OURS,
    TUNED,
    Inputs,
    Shape,
    Workload,
    model_folder,
)

Run = Callable[[], Any]  # one run; gives last_hidden_state
Prepare = Callable[[Shape, Inputs], Run]


@dataclass(frozen=True)
class Candidate:
    """How to run a workload; `build` writes the files of one shape into the folder and gives a note for the report.

    A run reads the arrays that its shape was prepared with: other tokens written into them are what it runs next.
    """

    open: Callable[[Workload, Path], Prepare]
    build: Callable[[Workload, Path, Shape, Inputs], str] | None = None
    files: Callable[[Path], Iterable[Path]] = lambda work: ()  # the model and its weights, for one shape
    artifact: str = ""  # the folder that fxpress saved


def named(shape: Shape) -> str:
    """How files and options write a shape: 8x128."""
    return f"{shape[0]}x{shape[1]}"


def saved_inputs(work: Path, shape: Shape) -> Inputs:
    """The inputs of a shape, as worker.py's first task leaves them in the folder that all share."""
    with numpy.load(work / f"inputs-{named(shape)}.npz") as file:
        return dict(file)


def tensors_of(inputs: Inputs) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in inputs.items()}


# --- PyTorch ---------------------------------------------------------------------------------------------------


def open_torch(wrap: Callable[[Any], Any], workload: Workload, work: Path) -> Prepare:
    """PyTorch, with the model as it is or compiled; the compilers work in the first run."""
    import torch

    torch.set_num_threads(1)
    model = workload.build()

    def prepare(shape: Shape, inputs: Inputs) -> Run:
        tensors = tensors_of(inputs)
        call = wrap(model)

        def run() -> Any:
            with torch.inference_mode():
                return call(**tensors).last_hidden_state

        run()
        return run

    return prepare


def as_it_is(model: Any) -> Any:
    return model


def compiled(model: Any) -> Any:
    import torch

    return torch.compile(model, dynamic=False)


def max_autotuned(model: Any) -> Any:
    """With freezing, as PyTorch's tutorial of max-autotune on the CPU tells."""
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(model, dynamic=False, mode="max-autotune")


# --- ONNX Runtime ----------------------------------------------------------------------------------------------


def session_of(file: Path | bytes) -> Any:
    """A default ONNX Runtime session, but for the one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = file if isinstance(file, bytes) else os.fspath(file)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def onnx_file(work: Path, name: str, shape: Shape) -> Path:
    return work / f"{name}-{named(shape)}.onnx"


def build_onnx(name: str, opset: int | None, workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """torch.onnx.export at fixed sizes."""
    import torch

    file = onnx_file(work, name, shape)
    with torch.no_grad():
        torch.onnx.export(
            workload.build(), (), file, kwargs=tensors_of(inputs), dynamo=True, opset_version=opset, verbose=False
        )
    return ""


def build_optimized(name: str, workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """onnxruntime.transformers' optimizer as it fuses most: on what the older exporter makes of eager attention.

    With the optimizer's default opt_level of 1, ONNX Runtime first folds constants, and then no attention matches.
    """
    import torch
    from onnxruntime.transformers.optimizer import optimize_model

    class Positional(torch.nn.Module):
        """The older exporter takes inputs by position and gives tuples."""

        def __init__(self) -> None:
            super().__init__()
            self.model = workload.build()
            self.model.set_attn_implementation("eager")

        def forward(self, *args: Any) -> Any:
            named_args = dict(zip(inputs, args, strict=True))
            # Without a mask transformers looks for packed prompts by aten.diff, which this exporter does not know.
            named_args.setdefault("attention_mask", torch.ones_like(named_args["input_ids"]))
            return self.model(**named_args, return_dict=False)

    file = onnx_file(work, name, shape)
    with torch.no_grad():
        args = tuple(tensors_of(inputs).values())
        torch.onnx.export(Positional().eval(), args, file, dynamo=False, opset_version=17, input_names=list(inputs))
    sizes = {"num_heads": workload.num_heads, "hidden_size": workload.hidden_size}
    better = optimize_model(os.fspath(file), model_type=workload.model_type, opt_level=0, **sizes)
    better.save_model_to_file(os.fspath(file))
    fused = {op: count for op, count in better.get_fused_operator_statistics().items() if count}
    kinds = ", ".join(f"{op} {count}" for op, count in fused.items())
    attention = (
        "" if any("Attention" in op for op in fused) else "; no attention: its patterns do not know this spelling"
    )
    return f"{name} fused: {kinds}{attention}"


def open_onnx(name: str, workload: Workload, work: Path) -> Prepare:
    """A session of each shape's file; no torch."""

    def prepare(shape: Shape, inputs: Inputs) -> Run:
        session = session_of(onnx_file(work, name, shape))
        return lambda: session.run(None, inputs)[0]

    return prepare


def openvino_options(hint: str) -> dict[str, Any]:
    """For one thread and latency, in a precision."""
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": hint}


def open_openvino(name: str, hint: str, workload: Workload, work: Path) -> Prepare:
    """Each shape's file, compiled for latency; no torch. The hint is the precision that it may compute in."""
    import openvino

    core = openvino.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this processor does not compute in bfloat16")

    def prepare(shape: Shape, inputs: Inputs) -> Run:
        model = core.compile_model(onnx_file(work, name, shape), "CPU", openvino_options(hint))
        request = model.create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True)[0]

    return prepare


def open_fxpress(artifact: str, workload: Workload, work: Path) -> Prepare:
    """The one saved artefact, loaded once, for every shape; numpy arrays, no torch."""
    from fxpress import load

    model = load(work / artifact, threads=1)
    return lambda shape, inputs: lambda: model(**inputs)["last_hidden_state"]


def fxpress_candidate(
    artifact: str,
    build: Callable[[Workload, Path, Shape, Inputs], str] | None = None,
    opened: Callable[[str, Workload, Path], Prepare] = open_fxpress,
) -> Candidate:
    """One saved artefact."""
    return Candidate(partial(opened, artifact), build, partial(artifact_files, artifact), artifact)


def open_planned(artifact: str, workload: Workload, work: Path) -> Prepare:
    """The one saved artefact, loaded for each shape's sizes, as OpenVINO plans for them."""
    from fxpress import load

    def prepare(shape: Shape, inputs: Inputs) -> Run:
        model = load(work / artifact, threads=1, sizes={name: array.shape for name, array in inputs.items()})
        return lambda: model(**inputs)["last_hidden_state"]

    return prepare


def artifact_files(artifact: str, work: Path) -> list[Path]:
    """The graph and its weights."""
    return [file for file in (work / artifact).iterdir() if file.suffix in (".onnx", ".safetensors")]


PLANNED = "artifact for OpenVINO"


def build_planned(workload: Workload, work: Path, shape: Shape, inputs: Inputs) -> str:
    """One artefact for every shape, compiled from the workload's example."""
    from fxpress import compile

    if not (work / PLANNED).exists():
        example = tensors_of(saved_inputs(work, workload.example))
        compile(workload.build(), example_inputs=example, backend="openvino", threads=1).save(work / PLANNED)
    return ""


FLOAT32 = {
    EAGER: Candidate(partial(open_torch, as_it_is), files=lambda work: [model_folder() / "model.safetensors"]),
    COMPILED: Candidate(partial(open_torch, compiled)),
    TUNED: Candidate(partial(open_torch, max_autotuned)),
    ONNX: Candidate(partial(open_onnx, ONNX), partial(build_onnx, ONNX, None)),
    ONNX_23: Candidate(partial(open_onnx, ONNX_23), partial(build_onnx, ONNX_23, 23)),
    OPTIMIZED: Candidate(partial(open_onnx, OPTIMIZED), partial(build_optimized, OPTIMIZED)),
    OPENVINO: Candidate(partial(open_openvino, OPENVINO, "f32"), partial(build_onnx, OPENVINO, None)),
    OURS: fxpress_candidate("artifact"),
    FIXED: fxpress_candidate(PLANNED, build_planned, open_planned),
}
