"""What runs in the processes of attention_scaling.py: `python attention_worker.py '{"task": ..., "model": ..., ...}'`.

It answers in lines of JSON on stdout; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_scaling import MODELS, Model, Setting
from worker import error_text, median_ms, private_stdout, release, resident

SHORT = 128  # tokens, where the profitability rule is tried
SLOWER = "slower than exact attention"  # how the rule begins what it says
Say = Callable[[Any], None]


def compile_all(model: Model, folder: Path, say: Say) -> None:
    """An artefact of each setting."""
    for setting in model.settings:
        failure, short = None, None
        try:
            compiled(model, setting, model.example, force=True).save(folder / setting.folder)
            if model.rule and setting.kind and not setting.causal:
                short = refusal(model, setting)
        except Exception as error:  # noqa: BLE001 - a kind that fails is listed with its error
            failure = error_text(error)
        say({"name": setting.name, "failure": failure, "short": short})


def compiled(model: Model, setting: Setting, length: int, *, force: bool) -> Any:
    """The model with a setting's attention."""
    import torch

    from fxpress import compile
    from fxpress.ir.replacement.table import KINDS
    from fxpress.passes import Fuse, ReplaceAttention

    torch.set_num_threads(1)
    passes: list[Any] = [Fuse()]
    if setting.kind:
        if setting.kind not in KINDS:
            raise LookupError(f"there is no kind {setting.kind} yet")
        passes = [ReplaceAttention(setting.kind, force=force, **setting.options), Fuse()]
    example = {name: torch.from_numpy(array) for name, array in model.inputs(length).items()}
    # The example is what taps are made from; the cost does not depend on them.
    return compile(model.build(setting), passes, example_inputs=example, calibration=[example], verify=False, threads=1)


def refusal(model: Model, setting: Setting) -> str:
    """Why a kind is refused as slower at SHORT tokens; "": it is not."""
    report = compiled(model, setting, SHORT, force=False).report
    reasons = [item["reason"] for done in report.passes for item in done.refusals]
    return next((reason for reason in reasons if reason.startswith(SLOWER)), "")


def run(model: Model, folder: Path, size: int, seconds: float, say: Say) -> None:
    """The peak of memory of the first run, above what was resident before it, and the median time of those that follow.

    Two more runs are not timed: ONNX Runtime's memory still grows in them, which takes as long again as computing.
    """
    from fxpress import load

    inputs = model.inputs(size)
    try:
        found = load(folder, threads=1)
        release()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
        before = resident("VmRSS")
        found(**inputs)
        megabytes = resident("VmHWM") - before
        for _ in range(2):
            found(**inputs)
        say({"megabytes": megabytes, "ms": median_ms(lambda: found(**inputs), seconds)})
    except Exception as error:  # noqa: BLE001 - a kind that fails is listed with its error
        say({"failure": f"at {size}: {error_text(error)}"})


def main() -> None:
    order = json.loads(sys.argv[1])
    model = next(item for item in MODELS if item.name == order["model"])
    folder, say = Path(order["folder"]), private_stdout()
    if order["task"] == "compile":
        compile_all(model, folder, say)
    else:
        run(model, folder, order["size"], order["seconds"], say)


if __name__ == "__main__":
    main()
