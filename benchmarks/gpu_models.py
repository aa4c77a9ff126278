"""The rows of benchmarks/gpu.py that are whole models."""

from __future__ import annotations

import collections
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gpu_measure import Bench, Row, Run, parts
from torch import Tensor, nn

import fxpress

MODES = ("reduce-overhead", "default")
SLOWEST = "max-autotune"  # to be compiled, up to 100 s a row: it comes last, for as many rows as time is left


def models(dry: bool) -> Iterator[tuple[str, nn.Module, list[tuple[int, int]]]]:
    """Models with random weights, and batches and lengths."""
    import transformers

    torch.manual_seed(0)
    sizes = [(8, 512), (32, 128), (1, 128)]
    layers = 1 if dry else 2  # of 12: the others are alike, and all has to be compiled in 8 minutes
    width = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64} if dry else {}
    bert = transformers.BertConfig(num_hidden_layers=layers, **width)
    yield "BERT-base (2 layers)", transformers.BertModel(bert, add_pooling_layer=False), [(1, 8)] if dry else sizes
    small = {"n_embd": 32, "n_head": 2} if dry else {}
    gpt2 = transformers.GPT2Config(n_layer=layers, use_cache=False, n_positions=4096, **small)
    yield "GPT-2 (2 layers)", transformers.GPT2Model(gpt2), [(1, 8)] if dry else [*sizes, (1, 4096)]
    llama = transformers.LlamaConfig(
        hidden_size=32 if dry else 4096, intermediate_size=64 if dry else 11008, num_hidden_layers=1,
        num_attention_heads=2 if dry else 32, num_key_value_heads=1 if dry else 8, vocab_size=128, use_cache=False,
    )  # fmt: skip
    yield "Llama block", transformers.LlamaModel(llama), [(1, 8)] if dry else [*sizes, (1, 4096)]


def bench_models(bench: Bench, dry: bool) -> None:
    """Whole models: eager, torch.compile in three modes, fxpress, which is compiled once for all sizes."""
    later: list[Callable[[], None]] = []
    for name, model, sizes in models(dry):
        exact = model.eval().to(bench.device)  # in fp32, for the error
        half = copy.deepcopy(exact).to(torch.float32 if dry else torch.bfloat16)
        compiled: dict[tuple[str, ...], Any] = {}
        for batch, length in sizes:
            ids = torch.randint(0, 100, (batch, length), device=bench.device)
            given = {"input_ids": ids}
            if length < 4096:  # padded
                given["attention_mask"] = torch.ones_like(ids)
                given["attention_mask"][-1, length - length // 4 :] = 0
            with torch.no_grad():
                again = model_row(bench, dry, f"{name}, batch {batch}, length {length}", exact, half, given, compiled)
            later += [] if again is None or dry else [again]
            bench.after()
    for again in later:
        again()
        bench.after()


def operations(model: nn.Module, ids: Tensor) -> float:
    """The multiplications and additions of a model's linear layers and its attention."""
    weights = sum(
        weight.numel()
        for key, weight in model.named_parameters()
        if not any(part in key for part in ("embed", "wte", "wpe"))
    )
    config: Any = model.config
    causal = 0.5 if config.model_type != "bert" else 1.0
    attention = 4.0 * causal * ids.numel() * ids.shape[1] * config.hidden_size * config.num_hidden_layers
    return 2.0 * weights * ids.numel() + attention


def model_row(
    bench: Bench,
    dry: bool,
    name: str,
    exact: nn.Module,
    half: nn.Module,
    given: dict[str, Tensor],
    compiled: dict[tuple[str, ...], Any],
) -> Callable[[], None] | None:
    """Measure one model at one size; what is returned measures the mode that takes long to be compiled beside it."""
    row = Row("models", name, flops=operations(exact, given["input_ids"]))

    def ours() -> Run:
        key = tuple(given)
        if key not in compiled:
            compiled[key] = fxpress.compile(half, example_inputs=given, backend="triton", verify=False)
        return lambda: compiled[key](**given)

    def torch_compile(mode: str) -> Run:
        run = torch.compile(half, mode=mode, dynamic=False)
        return lambda: run(**given)

    torch._dynamo.reset()  # not between modes: each would be compiled again when it is timed
    candidates: dict[str, Callable[[], Run]] = {"fxpress": ours, "eager": lambda: lambda: half(**given)}
    for mode in () if dry else MODES:
        candidates[f"torch.compile {mode}"] = functools.partial(torch_compile, mode)
    ready = bench.measure(row, candidates, alone=False)
    if "fxpress" not in ready:
        return None
    mine = compiled[tuple(given)]
    row.notes["fxpress"] = ways(mine)
    kept = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    truth, usual, found = (run(**given).last_hidden_state.double()[kept] for run in (exact, half, mine))
    usual_error = (usual - truth).square().mean().sqrt()
    row.error = float((found - truth).square().mean().sqrt() / usual_error) if usual_error > 0 else None
    for item in mine.report.tuned:
        times = ", ".join(f"{name}: {time or 0:.4f}" for name, time in item["milliseconds"].items())
        print(f"  {item['operator']} {item['sizes']} {item['chosen']} of {times}")
    explain(bench, row, ready)

    def again() -> None:
        name = f"torch.compile {SLOWEST}"
        if time.monotonic() > bench.deadline:
            row.notes[name] = "not measured: time was up"
            return
        torch._dynamo.reset()
        with torch.no_grad():
            candidates = {"fxpress": ours, name: functools.partial(torch_compile, SLOWEST)}
            explain(bench, row, bench.measure(row, candidates, alone=False))

    return again


def explain(bench: Bench, row: Row, ready: Mapping[str, Run]) -> None:
    """Where the time goes, if fxpress is not the fastest."""
    others = [name for name in ready if name != "fxpress"]
    other = min(others, key=lambda name: row.milliseconds[name], default="fxpress")
    if bench.device.type != "cuda" or row.milliseconds[other] >= row.milliseconds["fxpress"]:
        return
    for candidate in ("fxpress", other):
        row.parts[candidate], kernels = parts(ready[candidate])
        print(f"  {candidate}: {row.parts[candidate]}")
        for kernel, milliseconds in kernels[:12]:
            print(f"    {milliseconds:.4f} ms {kernel[:100]}", flush=True)


def ways(compiled: Any) -> str:
    """How a compiled model's products and attention run, as it was measured: `3 generated, 2 torch.matmul`."""
    chosen = [item["chosen"] for item in compiled.report.tuned]
    names = [name if name.startswith(("torch.", "SDPA")) else "generated" for name in chosen]
    return ", ".join(f"{count} {name}" for name, count in collections.Counter(names).items()) or "nothing was tuned"
