"""A process that compiles a generated module for GPUs that are not here: `machine_code.build` starts it.

Triton's interpreter, with which the calling process may run kernels, excludes its compiler.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..memory import Memory
from .machine_code import compiled, empty
from .runner import Loaded
from .tune import Tuner


def once(call: Callable[[], Any]) -> float:
    """In place of a measurement: what would be measured is compiled, and the first candidate stays."""
    call()
    return 1.0


def main() -> None:
    """Read a task from standard input; write `KEY.json` and `KEY.cubin` into the folder that is given."""
    task, folder = json.load(sys.stdin), Path(sys.argv[1])
    weights = {name: empty(shape) for name, shape in task["weights"].items()}
    with torch.no_grad():
        for number, batch in enumerate(task["batches"]):
            loaded = Loaded(task["source"])  # kept, as its file is
            if task["forms"] is not None:
                # A place of its own: of what is remembered of another batch, not all would be compiled for this one.
                tuner = Tuner(once, Memory("none", folder / "memory"), f"batch {number}")
                tuner.attach(loaded.module, task["forms"])
            found = compiled(loaded.module, [empty(shape) for shape in batch], weights, task["arch"])
            for key, code in found.items():
                (folder / f"{key}.json").write_text(code.metadata, encoding="utf-8")
                (folder / f"{key}.cubin").write_bytes(code.binary)


if __name__ == "__main__":
    main()
