"""How long a small program takes in ONNX Runtime, at the example's sizes."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch

from ...ir.graph import Program
from ...ir.printer import print_program
from ..memory import Memory, processor
from .choose import choose, race, random_input
from .export import check_supported, hint, save, to_onnx
from .session import Session


def seconds(program: Program, *, threads: int | None = None, memory: Memory | None = None) -> float:
    """The time of one run on random numbers, remembered by the program's text, its sizes and the machine.

    Args:
        threads: threads that the product will run with.
        memory: where measurements are remembered; None: the user's cache folder.

    Raises:
        LoweringError: ONNX cannot express the program.
    """
    memory = memory or Memory("programs")
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    sizes = "; ".join("x".join(str(hint(size)) for size in node.meta["val"].shape) for node in inputs)
    where = f"{processor()}; onnxruntime {onnxruntime.__version__}; threads {threads}"
    key = f"{print_program(program)} at {sizes} on {where}"
    known = memory.read().get(key)
    if isinstance(known, int | float) and known > 0:
        return float(known)
    check_supported(program)
    with torch.no_grad(), TemporaryDirectory(prefix="fxpress-") as folder:
        path = Path(folder) / "program.onnx"
        save(to_onnx(program, choose(program, threads=threads)[0]), path)
        arrays = [random_input(node.meta["val"]).numpy() for node in inputs]
        session = Session(path, threads)
        (found,) = race([lambda: session.run(arrays)], time.thread_time if threads == 1 else time.perf_counter)
    memory.write({key: found / 1e3})
    return found / 1e3
