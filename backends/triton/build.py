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
    """Read a task from standard input; write `ARCH/KEY.json` and `ARCH/KEY.cubin` below the folder that is given."""
    task, folder = json.load(sys.stdin), Path(sys.argv[1])
    weights = {name: empty(shape) for name, shape in task["weights"].items()}
    with torch.no_grad():
        for arch in task["archs"]:
            place = folder / str(arch)
            place.mkdir()
            for number, batch in enumerate(task["batches"]):
                loaded = Loaded(task["source"])  # kept, as its file is
                module = loaded.module
                if task["forms"] is not None:
                    # A place of its own: what is remembered of another one would not be compiled for this one.
                    tuner = Tuner(once, Memory("none", folder / "memory"), f"sm_{arch}, batch {number}")
                    tuner.attach(module, task["forms"])
                for key, code in compiled(module, [empty(shape) for shape in batch], weights, arch).items():
                    (place / f"{key}.json").write_text(code.metadata, encoding="utf-8")
                    (place / f"{key}.cubin").write_bytes(code.binary)


if __name__ == "__main__":
    main()
