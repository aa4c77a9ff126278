"""How time and memory of each kind of attention grow with the length: in one layer, and in an encoder of four.

Every setting is compiled once, with a dynamic length, by one process (attention_worker.py). Then each length of each
setting has a process of its own, on one thread, without torch: it loads the artefact, runs it once, which gives the
peak of memory, and then again for the time. A round takes all settings in turn at one length after the other.

To try a part of it: `--quick`, which takes two lengths; or `scaling` of a model with fewer sizes or settings.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import ENVIRONMENT
from workloads import Inputs, random_model

HIDDEN, HEADS = 512, 8
FROM = 2048  # growth is fitted from this length on: below it, overheads that do not grow are much of the time
TIMEOUT = 600  # seconds, of one process that runs
EXACT, PROJECTIONS = "exact", "projections alone"
CAUSAL = ", causal"


@dataclass(frozen=True)
class Setting:
    """A kind of attention with its options; `kind` "": attention as it is, or none."""

    name: str
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    layer: bool = True  # whether the model of one layer is measured with it
    encoder: bool = True  # whether the encoder is

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


SETTINGS = (
    Setting(PROJECTIONS, encoder=False),
    Setting(EXACT),
    Setting("sliding_window", "sliding_window", {"window": 128}),
    Setting("random_sparse", "random_sparse", {"block": 64}),
    Setting("dynamic_sparse", "dynamic_sparse", {"block": 64, "top_k": 16}),
    Setting("graph, star", "graph", {"topology": "star"}),
    Setting("graph, expander", "graph", {"topology": "expander", "degree": 8}),
    Setting("lsh", "lsh"),
    Setting("linformer", "linformer", {"rank": 256}),
    Setting("performer", "performer"),
    Setting("nystrom", "nystrom", {"landmarks": 64}),
    Setting("linear", "linear", {"features": 64, "window": 64, "steps": 0}),
    Setting("depthwise_conv", "depthwise_conv", {"kernel": 9}),
    Setting("funnel", "funnel", layer=False),
    Setting(EXACT + CAUSAL, causal=True, encoder=False),
    Setting("sliding_window" + CAUSAL, "sliding_window", {"window": 128}, causal=True, encoder=False),
    Setting("performer" + CAUSAL, "performer", causal=True, encoder=False),
    Setting("linear" + CAUSAL, "linear", {"features": 64, "window": 64, "steps": 0}, causal=True, encoder=False),
)


# --- the models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What is measured: a model, its inputs at a length, and how often."""

    name: str
    title: str
    build: Callable[[Setting], Any]
    inputs: Callable[[int], Inputs]
    sizes: tuple[int, ...]
    settings: tuple[Setting, ...]
    rounds: int
    seconds: float  # a process times runs for so long, and one at least
    rule: bool = False  # whether the profitability rule is tried
    example: int = 2048  # tokens that it is compiled with


def layer(setting: Setting) -> Any:
    """One attention with its four projections, seeded; of PROJECTIONS, these alone."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("query", "key", "value", "output")
            self.projections = nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN) for name in names})

        def forward(self, hidden: Tensor) -> Tensor:
            query, key, value = (
                self.projections[name](hidden).unflatten(2, (HEADS, HIDDEN // HEADS)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            if setting.name == PROJECTIONS:
                found = query + key + value
            else:
                found = F.scaled_dot_product_attention(query, key, value, is_causal=setting.causal)
            return self.projections["output"](found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    return Layer().eval()


def states(length: int) -> Inputs:
    """Seeded states [1, length, HIDDEN]."""
    import numpy

    return {"hidden": numpy.random.default_rng(length).standard_normal((1, length, HIDDEN), numpy.float32)}


def encoder(setting: Setting) -> Any:
    return random_model(
        "Bert",
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=4,
        intermediate_size=4 * HIDDEN,
        vocab_size=8192,
        max_position_embeddings=16384,
    )


def tokens(length: int) -> Inputs:
    """Seeded ids [1, length] without padding."""
    import numpy

    return {"input_ids": numpy.random.default_rng(length).integers(8, 8000, (1, length))}


LAYER, ENCODER = "layer", "encoder"
MODELS = (
    Model(
        LAYER,
        f"one attention of {HEADS} heads of {HIDDEN // HEADS} with its projections of query, key, value and output",
        layer,
        states,
        (512, 1024, 2048, 4096, 8192, 16384),
        tuple(item for item in SETTINGS if item.layer),
        rounds=2,
        seconds=0.3,
        rule=True,
    ),
    Model(
        ENCODER,
        f"a BERT of four such layers with feed-forward blocks of {4 * HIDDEN}, random weights",
        encoder,
        tokens,
        (512, 1024, 2048, 4096, 8192, 16384),
        tuple(item for item in SETTINGS if item.encoder),
        rounds=1,
        seconds=0.3,
    ),
)


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """What was found for a setting: ms of each round and MB, by length."""

    ms: dict[int, list[float]] = field(default_factory=dict)
    megabytes: dict[int, list[float]] = field(default_factory=dict)
    failure: str | None = None  # the first

    @property
    def time(self) -> dict[int, float]:
        return {size: statistics.median(found) for size, found in self.ms.items()}

    @property
    def memory(self) -> dict[int, float]:
        return {size: statistics.median(found) for size, found in self.megabytes.items()}

    @property
    def spread(self) -> float:
        """The largest distance between rounds, as a share of the median."""
        return max(((max(found) - min(found)) / statistics.median(found) for found in self.ms.values()), default=0.0)


@dataclass
class Scaling:
    """A model's curves by setting, and what the profitability rule says of each kind where the sequence is short."""

    model: Model
    curves: dict[str, Curve] = field(default_factory=dict)
    short: dict[str, str] = field(default_factory=dict)  # by setting: "" where it was replaced, or why it was not


Tell = Callable[[str], None]


def measure(tell: Tell, folder: Path, quick: bool) -> list[Scaling]:
    """Both models."""
    models = [replace(model, sizes=model.sizes[:2], rounds=1) for model in MODELS] if quick else MODELS
    return [scaling(model, tell, folder / model.name) for model in models]


def scaling(model: Model, tell: Tell, folder: Path) -> Scaling:
    """Compile every setting, then time them in turn."""
    folder.mkdir()
    found = Scaling(model)
    for answer in answers({"task": "compile", "model": model.name, "folder": os.fspath(folder)}, folder):
        name = answer["name"]
        tell(f"{model.name}: compiled {name}" + (f": {answer['failure']}" if answer["failure"] else ""))
        found.curves[name] = Curve(failure=answer["failure"])
        if answer["short"] is not None:
            found.short[name] = answer["short"]
    broken = found.curves.get(EXACT, Curve(failure="nothing was compiled")).failure
    if broken:
        raise SystemExit(f"{model.name}, {EXACT}: {broken}")
    for turn in range(model.rounds):
        for size in model.sizes:
            tell(f"{model.name}: length {size}, round {turn + 1} of {model.rounds}")
            for setting in model.settings:
                curve = found.curves.setdefault(setting.name, Curve(failure="the process that compiles ended"))
                if curve.failure is None:
                    run(model, setting, size, folder, curve)
    return found


def run(model: Model, setting: Setting, size: int, folder: Path, curve: Curve) -> None:
    """One process; what it finds goes into the curve."""
    order = {"task": "run", "model": model.name, "folder": os.fspath(folder / setting.folder), "size": size}
    ended: Any = {"failure": f"at {size}: the process ended"}
    answer = next(answers({**order, "seconds": model.seconds}, folder), ended)
    if "failure" in answer:
        curve.failure = answer["failure"]
        return
    curve.ms.setdefault(size, []).append(answer["ms"])
    curve.megabytes.setdefault(size, []).append(answer["megabytes"])


def answers(order: Mapping[str, Any], folder: Path) -> Iterator[Any]:
    """What a process of attention_worker.py says, a line each, until it ends."""
    command = [sys.executable, os.fspath(Path(__file__).with_name("attention_worker.py")), json.dumps(order)]
    caches = {"XDG_CACHE_HOME": os.fspath(folder / "cache")}  # new in each run
    with (folder / f"{order['task']}.log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **ENVIRONMENT, **caches}
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.wait(TIMEOUT)


def exponent(values: Mapping[int, float]) -> float | None:
    """The slope of log value on log length from FROM on, by least squares; None with fewer than three lengths."""
    points = [(math.log(size), math.log(value)) for size, value in values.items() if size >= FROM and value > 0]
    if len(points) < 3:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope
