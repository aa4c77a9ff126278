"""Measures fxpress's Triton kernels beside PyTorch's best on one GPU and writes benchmarks/RESULTS_GPU.md.

    python benchmarks/gpu.py            all rows, in less than --minutes (8)
    python benchmarks/gpu.py --only attention

It needs torch, triton, transformers and fxpress, nothing else. Times are medians over CUDA events, candidates in turn;
each row has the share of a ceiling measured in the same run: the copy of a large tensor, or the product of two 8192 x
8192 matrices in bfloat16. What time does not suffice for is listed as not measured. Without a GPU the table says so.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULTS = Path(__file__).with_name("RESULTS_GPU.md")
Run = Callable[[], Any]


@dataclass
class Row:
    """A workload: the candidates' milliseconds, and what it takes in operations and bytes."""

    section: str
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # of a candidate: an error, or why it was not measured
    error: float | None = None  # of fxpress: RMSE against fp32, over that of eager PyTorch in bfloat16


@dataclass
class Bench:
    """Measures within a time."""

    deadline: float
    device: torch.device
    rows: list[Row] = field(default_factory=list)

    def measure(self, row: Row, candidates: dict[str, Callable[[], Run]]) -> None:
        """Prepare each candidate, then time them in turn. A candidate that fails is a note of the row."""
        self.rows.append(row)
        ready: dict[str, Run] = {}
        for name, make in candidates.items():
            if time.monotonic() > self.deadline:
                row.notes[name] = "not measured: time was up"
                continue
            start = time.monotonic()
            try:
                run = make()
                for _ in range(3):
                    run()
                self.synchronize()
                ready[name] = run
            except Exception as error:  # noqa: BLE001  whatever stops one candidate is that candidate's result
                row.notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
            print(f"{row.section}: {row.name}: {name}: ready in {time.monotonic() - start:.1f} s", flush=True)
        rounds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(5):
            for name, run in ready.items():
                rounds[name].append(self.milliseconds(run))
        row.milliseconds = {name: statistics.median(found) for name, found in rounds.items()}

    def milliseconds(self, run: Run, least: float = 20.0) -> float:
        """The time of a run, over as many as fill `least` milliseconds."""
        if self.device.type != "cuda":  # --dry: that the script works is all that is wanted
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        once = self._timed(run, 1)
        return self._timed(run, max(1, min(200, int(least / max(once, 1e-3)))))

    def _timed(self, run: Run, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# --- what is measured -----------------------------------------------------------------------------------------------


def models(dry: bool) -> Iterator[tuple[str, nn.Module, list[tuple[int, int]]]]:
    """Models with random weights, in bfloat16, and batches and lengths."""
    import transformers

    torch.manual_seed(0)
    sizes = [(8, 512), (1, 128), (32, 128)]
    layers = 1 if dry else 4  # of 12: the others are alike, and max-autotune has 8 minutes
    width = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64} if dry else {}
    bert = transformers.BertConfig(num_hidden_layers=layers, **width)
    yield "BERT-base (4 layers)", transformers.BertModel(bert, add_pooling_layer=False), [(1, 8)] if dry else sizes
    small = {"n_embd": 32, "n_head": 2} if dry else {}
    gpt2 = transformers.GPT2Config(n_layer=layers, use_cache=False, n_positions=4096, **small)
    yield "GPT-2 (4 layers)", transformers.GPT2Model(gpt2), [(1, 8)] if dry else [*sizes, (1, 4096)]
    llama = transformers.LlamaConfig(
        hidden_size=32 if dry else 4096, intermediate_size=64 if dry else 11008, num_hidden_layers=1,
        num_attention_heads=2 if dry else 32, num_key_value_heads=1 if dry else 8, vocab_size=128, use_cache=False,
    )  # fmt: skip
    yield "Llama block", transformers.LlamaModel(llama), [(1, 8)] if dry else [*sizes, (1, 4096)]


def bench_models(bench: Bench, dry: bool) -> None:
    """Whole models: eager, torch.compile in three modes, fxpress, which is compiled once for all sizes."""
    for name, model, sizes in models(dry):
        exact = model.eval().to(bench.device)  # in fp32, for the error
        half = _copy_in(exact, torch.float32 if dry else torch.bfloat16)
        compiled: dict[tuple[str, ...], Any] = {}
        for batch, length in sizes:
            ids = torch.randint(0, 100, (batch, length), device=bench.device)
            given = {"input_ids": ids}
            if length < 4096:  # padded
                given["attention_mask"] = torch.ones_like(ids)
                given["attention_mask"][-1, length - length // 4 :] = 0
            with torch.no_grad():
                _model_row(bench, dry, f"{name}, batch {batch}, length {length}", exact, half, given, compiled)


def _model_row(
    bench: Bench,
    dry: bool,
    name: str,
    exact: nn.Module,
    half: nn.Module,
    given: dict[str, Tensor],
    compiled: dict[tuple[str, ...], Any],
) -> None:
    import fxpress

    weights = [
        weight for key, weight in exact.named_parameters() if not any(part in key for part in ("embed", "wte", "wpe"))
    ]
    row = Row("models", name, flops=2.0 * sum(item.numel() for item in weights) * given["input_ids"].numel())

    def ours() -> Run:
        key = tuple(given)
        if key not in compiled:
            compiled[key] = fxpress.compile(half, example_inputs=given, backend="triton", verify=False)
        return lambda: compiled[key](**given)

    def torch_compile(mode: str) -> Run:
        torch._dynamo.reset()
        run = torch.compile(half, mode=mode, dynamic=False)
        return lambda: run(**given)

    candidates: dict[str, Callable[[], Run]] = {"fxpress": ours, "eager": lambda: lambda: half(**given)}
    for mode in () if dry else ("default", "reduce-overhead", "max-autotune"):
        candidates[f"torch.compile {mode}"] = functools.partial(torch_compile, mode)
    bench.measure(row, candidates)
    if "fxpress" in row.milliseconds:
        row.notes["fxpress"] = ways(compiled[tuple(given)])
        kept = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        truth, usual, found = (
            run(**given).last_hidden_state.double()[kept] for run in (exact, half, compiled[tuple(given)])
        )
        usual_error = (usual - truth).square().mean().sqrt()
        row.error = float((found - truth).square().mean().sqrt() / usual_error) if usual_error > 0 else None


def ways(compiled: Any) -> str:
    """How a compiled model's products and attention run, as it was measured: `3 generated, 2 torch.matmul`."""
    chosen = [item["chosen"] for item in compiled.report.tuned]
    names = [name if name.startswith(("torch.", "SDPA")) else "generated" for name in chosen]
    return ", ".join(f"{count} {name}" for name, count in collections.Counter(names).items()) or "nothing was tuned"


def _copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    import copy

    return copy.deepcopy(model).to(dtype)


def bench_linears(bench: Bench, dry: bool) -> None:
    """Linear layers in bfloat16, int8, float8, and with compressed weights: TFLOP/s beside the largest product's."""
    for rows, width, inner in [(16, 32, 32)] if dry else [(16, 4096, 4096), (4096, 4096, 4096), (8192, 3072, 768)]:
        _linear_rows(bench, dry, rows, width, inner)


def _linear_rows(bench: Bench, dry: bool, rows: int, width: int, inner: int) -> None:
    from fxpress.ir.ops.sparse import pack_sparse24
    from fxpress.kernels.float8_matmul import float8_matmul
    from fxpress.kernels.int4_matmul import int4_matmul
    from fxpress.kernels.matmul import matmul
    from fxpress.kernels.sparse24_matmul import sparse24_matmul

    dtype = torch.float32 if dry else torch.bfloat16
    x = torch.randn(rows, inner, device=bench.device, dtype=dtype)
    w = torch.randn(width, inner, device=bench.device, dtype=dtype)
    x8, w8 = ((item * 30).clamp(-127, 127).to(torch.int8) for item in (x, w))
    packed = torch.randint(0, 255, (width, inner // 2), device=bench.device).to(torch.uint8)
    scale = torch.rand(width, inner // 32, device=bench.device).to(dtype)
    flops = 2.0 * rows * width * inner
    name = f"[{rows}, {inner}] x [{width}, {inner}]"
    plain = Row("linear layers", f"bfloat16 {name}", flops, 2.0 * (x.numel() + w.numel() + rows * width))
    tuned: list[Any] = []

    def compiled() -> Run:
        import fxpress

        layer = nn.Linear(inner, width, bias=False, device=bench.device, dtype=dtype).eval()
        tuned.append(fxpress.compile(layer, example_inputs=(x,), backend="triton", verify=False))
        return lambda: tuned[0](x)

    candidates: dict[str, Callable[[], Run]] = {
        "fxpress": lambda: lambda: matmul(x, w), "fxpress, compiled and tuned": compiled,
        "cuBLAS": lambda: lambda: F.linear(x, w),
    }  # fmt: skip
    bench.measure(plain, candidates)
    if tuned:
        plain.notes["fxpress, compiled and tuned"] = ways(tuned[0])
    integers = {"fxpress": lambda: lambda: matmul(x8, w8)}
    if not dry and rows > 16:
        integers["torch._int_mm"] = lambda: lambda: torch._int_mm(x8, w8.t())
    bench.measure(Row("linear layers", f"int8 {name}", flops, float(x8.numel() + w8.numel())), integers)
    x_f8, w_f8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    floats = {"fxpress": lambda: lambda: matmul(x_f8, w_f8)}
    if not dry and rows > 16:
        one = torch.ones((), device=bench.device)
        floats["torch._scaled_mm"] = lambda: (
            lambda: torch._scaled_mm(x_f8, w_f8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        )
    moved = float(x_f8.numel() + w_f8.numel() + 4 * rows * width)
    bench.measure(Row("linear layers", f"float8 {name}", flops, moved), floats)
    ones = torch.ones(width, device=bench.device)
    singles = {
        "fxpress": lambda: lambda: float8_matmul(x, w_f8, ones),
        "cuBLAS, bfloat16": lambda: lambda: F.linear(x, w),
    }
    bench.measure(Row("linear layers", f"float8 weights {name}", flops, float(w_f8.numel() + 2 * x.numel())), singles)
    weights = {
        "fxpress": lambda: lambda: int4_matmul(x, packed, scale),
        "cuBLAS, bfloat16": lambda: lambda: F.linear(x, w),
    }
    bench.measure(Row("linear layers", f"int4 weights {name}", flops, float(packed.numel() + 2 * x.numel())), weights)
    half = x.half() if dry else x  # no kernel for 2:4 weights takes float32
    sparse = w.to(half.dtype, copy=True)
    sparse.view(-1, 4)[:, 2:] = 0
    values, positions = pack_sparse24(sparse)
    made = {
        "fxpress": lambda: lambda: sparse24_matmul(half, values, positions),
        "cuBLAS, dense": lambda: lambda: F.linear(half, sparse),
    }
    if not dry:
        made["2:4, PyTorch"] = lambda: _semi_structured(x, sparse)
    moved = 2.0 * (x.numel() + values.numel() + rows * width) + positions.numel()
    bench.measure(Row("linear layers", f"2:4 weights {name}", flops, moved), made)


def _semi_structured(x: Tensor, weight: Tensor) -> Run:
    packed = torch.sparse.to_sparse_semi_structured(weight)
    return lambda: F.linear(x, packed)


def bench_attention(bench: Bench, dry: bool) -> None:
    """Attention: exact beside SDPA's kernels; windows beside exact at lengths up to 65536."""
    for length in [32] if dry else [512, 4096, 16384, 65536]:
        _attention_rows(bench, dry, length)


def _attention_rows(bench: Bench, dry: bool, length: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fxpress.kernels.attention import attention, window_attention
    from fxpress.kernels.linear_attention import linear_attention

    dtype = torch.float32 if dry else torch.bfloat16
    heads, size = (2, 16) if dry else (16, 64)
    batch = 1 if length >= 4096 else 8
    q, k, v = (torch.randn(batch, heads, length, size, device=bench.device, dtype=dtype) for _ in range(3))
    for causal in (False, True):
        flops = 4.0 * batch * heads * length * length * size * (0.5 if causal else 1.0)

        def sdpa(backend: SDPBackend, causal: bool = causal) -> Callable[[], Run]:
            def run() -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            return lambda: run

        right = 0 if causal else None
        candidates = {"fxpress": lambda right=right: lambda: attention(q, k, v, right=right)}
        backends = {"SDPA math": SDPBackend.MATH} if dry else {
            "FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
        }  # fmt: skip
        candidates |= {name: sdpa(backend) for name, backend in backends.items()}
        shown = "causal" if causal else "all keys"
        bench.measure(Row("attention", f"{shown}, batch {batch}, length {length}", flops), candidates)
    flops = 4.0 * batch * heads * length * 257 * size
    windows = {
        "fxpress window": lambda: lambda: window_attention(q, k, v, left=128, right=128),
        "fxpress exact": lambda: lambda: attention(q, k, v),
    }
    bench.measure(Row("attention", f"window 128, batch {batch}, length {length}", flops), windows)
    features = [torch.rand(batch, heads, length, 64, device=bench.device, dtype=dtype) for _ in range(2)]
    for causal in (False, True):
        linear = {"fxpress linear": lambda causal=causal: lambda: linear_attention(q, k, v, *features, causal=causal)}
        shown = "causal" if causal else "all keys"
        flops = 4.0 * batch * heads * length * 64 * size
        bench.measure(Row("attention", f"linear, 64 features, {shown}, batch {batch}, length {length}", flops), linear)


# --- ceilings and the table -----------------------------------------------------------------------------------------


def ceilings(bench: Bench, dry: bool) -> tuple[float, float]:
    """TFLOP/s of a large product in bfloat16, and GB/s of a copy, on random data."""
    size = 64 if dry else 8192
    dtype = torch.float32 if dry else torch.bfloat16
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**10 if dry else 2**29, device=bench.device)
    target = torch.empty_like(source)
    for run in (lambda: a @ b, lambda: target.copy_(source)):
        run()
    bench.synchronize()
    product = statistics.median(bench.milliseconds(lambda: a @ b, 100.0) for _ in range(3))
    copy = statistics.median(bench.milliseconds(lambda: target.copy_(source), 100.0) for _ in range(3))
    return 2e-9 * size**3 / product, 2e-6 * source.numel() * 4 / copy


def report(bench: Bench, found: tuple[float, float], seconds: float) -> str:
    """The table as Markdown."""
    tflops, gigabytes = found
    import triton

    device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "the interpreter"
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    lines = [
        "# Benchmarks on a GPU", "",
        f"Written by benchmarks/gpu.py on {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s:",
        f"{device}, {versions}.",
        f"Ceilings of this run: {tflops:.0f} TFLOP/s (8192^3, bfloat16), {gigabytes:.0f} GB/s (copy).",
        "Milliseconds are medians; `speed` is the fastest other candidate's time over fxpress's; `share` is of the",
        "ceiling in TFLOP/s. `error`: RMSE of fxpress in bfloat16 against fp32, over that of eager PyTorch.",
    ]  # fmt: skip
    for section in dict.fromkeys(row.section for row in bench.rows):
        head = "| workload | milliseconds | TFLOP/s | share | speed | error |"
        lines += ["", f"## {section.capitalize()}", "", head]
        lines.append("|---|---|---:|---:|---:|---:|")
        for row in (row for row in bench.rows if row.section == section):
            times = ", ".join(f"{name} {value:.3f}" for name, value in row.milliseconds.items())
            notes = "; ".join(f"{name}: {note}" for name, note in row.notes.items())
            own = next((value for name, value in row.milliseconds.items() if name.startswith("fxpress")), None)
            others = [value for name, value in row.milliseconds.items() if not name.startswith("fxpress")]
            rate = f"{1e-9 * row.flops / own:.1f}" if own else "-"
            share = f"{1e-9 * row.flops / own / tflops:.0%}" if own else "-"
            speed = f"{min(others) / own:.2f}" if own and others else "-"
            error = "-" if row.error is None else f"{row.error:.2f}"
            lines.append(
                f"| {row.name} | {'; '.join(filter(None, [times, notes]))} | {rate} | {share} | {speed} | {error} |"
            )
    return "\n".join(lines) + "\n"


NO_GPU = """# Benchmarks on a GPU

No GPU was at hand on {date}: nothing was measured, and nothing is claimed of the Triton backend's speed. Its kernels
are tested in Triton's interpreter and compiled ahead of time (docs/triton.md). `python benchmarks/gpu.py` on a machine
with a GPU, torch, triton and transformers writes this file anew, in less than 8 minutes.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"linear": bench_linears, "attention": bench_attention, "models": bench_models}
    parser.add_argument("--only", choices=list(sections), help="one section; RESULTS_GPU.md is not written")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin no candidate later than that")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, in the interpreter where there is no GPU")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    gpu = torch.cuda.is_available()
    if not gpu and not given.dry:
        RESULTS.write_text(NO_GPU.format(date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"), encoding="utf-8")
        print(f"no GPU: {RESULTS.name} says so")
        return
    bench = Bench(start + 60 * given.minutes, torch.device("cuda" if gpu else "cpu"))
    found = ceilings(bench, given.dry)
    for name, run in sections.items():
        if given.only in (None, name):
            run(bench, given.dry)
    text = report(bench, found, time.monotonic() - start)
    print(text)
    if not (given.dry or given.only):
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
