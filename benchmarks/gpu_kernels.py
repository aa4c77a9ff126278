"""The rows of benchmarks/gpu.py that are single layers: products and attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import Bench, Row, Run, captured
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxpress
from fxpress.backends.memory import fastest
from fxpress.backends.triton.candidates import Way, configured_ways, pruned
from fxpress.backends.triton.machine_code import compile_launches
from fxpress.ir.ops.quantize import int4_linear
from fxpress.ir.ops.sparse import pack_sparse24
from fxpress.kernels import attention as attention_kernels
from fxpress.kernels import float8_matmul, int4_matmul, linear_attention, matmul, sparse24_matmul
from fxpress.kernels.launch import arch_of
from fxpress.kernels.matmul_configs import matmul_configs, tma_takes


def best(bench: Bench, row: Row, module: Any, calls: Mapping[str, Run]) -> Callable[[], Run]:
    """The fastest of several ways, configurations of a kernel or a library's call, as a compiled model's tuner finds
    it; a note says which."""

    def make() -> Run:
        compile_launches(module, list(calls.values()))
        graphs: dict[str, Run] = {}
        times: dict[str, float | None] = dict.fromkeys(calls)
        for name, call in calls.items():
            try:
                graphs[name] = captured(call)
                times[name] = bench.alone(graphs[name], least=2.0)
            except Exception as error:
                if len(calls) == 1:
                    raise
                print(f"  {name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        if not graphs:
            raise RuntimeError(f"none of {len(calls)} ways ran")
        chosen = fastest(times)
        row.notes["fxpress"] = said(chosen, times)
        return graphs[chosen]

    return make


def from_ways(ways: Sequence[Way], *tensors: Tensor, **given: Any) -> dict[str, Run]:
    """Calls by the names of their configurations."""
    return {way.name: functools.partial(way.run, *tensors, **given) for way in ways}


def products(x: Tensor, w: Tensor, out: Tensor | None = None) -> dict[str, Run]:
    """x w^T in the configurations that a tuner measures."""
    (rows, inner), columns = x.shape, w.shape[0]
    configs = pruned(matmul_configs(rows, columns, inner, x.dtype, arch_of(x.device), tma=tma_takes(x, w)))
    return {
        str(list(config.values())): functools.partial(matmul.matmul, x, w, out=out, config=dict(config))
        for config in configs
    }


def tuned(compiled: Any) -> str:
    """What a compiled layer runs, beside the fastest of its generated kernels where that is something else."""
    return "; ".join(said(item["chosen"], item["milliseconds"]) for item in compiled.report.tuned)


def said(chosen: str, times: Mapping[str, float | None]) -> str:
    """What was chosen, and how far the generated kernels are from it where it is a library's."""
    known = {name: time for name, time in times.items() if time is not None}
    own = {name: time for name, time in known.items() if not name.startswith(("torch.", "SDPA"))}
    if chosen in own or not own or not known:
        return chosen
    name = min(own, key=lambda name: own[name])
    return f"{chosen} (generated: {own[name] / known[chosen]:.2f}x its time, {name})"


def bench_linears(bench: Bench, dry: bool) -> None:
    """Linear layers in bfloat16, int8, float8, and with compressed weights: TFLOP/s beside the largest product's."""
    for rows, width, inner in [(16, 32, 32)] if dry else [(16, 4096, 4096), (4096, 4096, 4096), (8192, 3072, 768)]:
        for row, candidates in linear_rows(bench, dry, rows, width, inner):
            bench.measure(row, candidates)
            bench.after()


def linear_rows(
    bench: Bench, dry: bool, rows: int, width: int, inner: int
) -> Iterator[tuple[Row, dict[str, Callable[[], Run]]]]:
    """Rows, and what is measured for each."""
    dtype = torch.float32 if dry else torch.bfloat16
    x = torch.randn(rows, inner, device=bench.device, dtype=dtype)
    w = torch.randn(width, inner, device=bench.device, dtype=dtype)
    flops, written = 2.0 * rows * width * inner, 2.0 * rows * width
    read = 2.0 * x.numel()

    def row(kind: str, moved: float, why: str = "") -> Row:
        return Row("linear layers", f"{kind} [{rows}, {inner}] x [{width}, {inner}]", flops, moved, why=why)

    dense = {"cuBLAS, bfloat16": lambda: captured(lambda: F.linear(x, w))}
    plain = row("bfloat16", read + 2.0 * w.numel() + written)

    def compiled(row: Row, layer: nn.Module) -> Run:
        made = fxpress.compile(layer.eval(), example_inputs=(x,), backend="triton", verify=False)
        made(x)
        row.notes["fxpress"] = tuned(made)
        return captured(lambda: made(x))

    whole = nn.Linear(inner, width, bias=False, device=bench.device, dtype=dtype)
    yield plain, {"fxpress": functools.partial(compiled, plain, whole), **dense}

    x8, w8 = ((item * 30).clamp(-127, 127).to(torch.int8) for item in (x, w))
    integers = row("int8", float(x8.numel() + w8.numel()) + 2 * written)
    library = {"torch._int_mm": lambda: torch._int_mm(x8, w8.t())} if not dry and rows > 16 else {}
    calls = products(x8, w8) | library
    yield integers, {"fxpress": best(bench, integers, matmul, calls)} | graphs(library)

    x_f8, w_f8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    floats = row("float8", float(x_f8.numel() + w_f8.numel()) + written)
    library = {}
    if not dry:
        one = torch.ones((), device=bench.device)
        scaled = functools.partial(
            torch._scaled_mm, x_f8, w_f8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False
        )
        library = {"torch._scaled_mm": scaled}
    out = torch.empty(rows, width, device=bench.device, dtype=dtype)
    calls = products(x_f8, w_f8, out) | library
    yield floats, {"fxpress": best(bench, floats, matmul, calls)} | graphs(library)

    ones = torch.ones(width, device=bench.device)
    again = "the weight is expanded for each tile of rows, since its scale comes after the sums"
    singles = row("float8 weights", float(w_f8.numel()) + read + written, again)
    ways = configured_ways(float8_matmul, "float8_configs", float8_matmul.float8_matmul, x, w_f8)  # type: ignore[arg-type]
    yield singles, {"fxpress": best(bench, singles, float8_matmul, from_ways(ways, x, w_f8, scale=ones)), **dense}

    packed = torch.randint(0, 255, (width, inner // 2), device=bench.device).to(torch.uint8)
    scale = torch.rand(width, inner // 32, device=bench.device).to(dtype)
    often = (
        "to expand a weight takes longer than to read it"
        if rows <= int4_matmul.MANY_ROWS
        else "the weight is expanded in memory first"
    )
    fours = row("int4 weights", packed.numel() + 2.0 * scale.numel() + read + written, often)
    yield fours, {"fxpress": functools.partial(compiled, fours, Int4(packed, scale)), **dense}

    half = x.half() if dry else x  # no kernel for 2:4 weights takes float32
    sparse = w.to(half.dtype, copy=True)
    sparse.view(-1, 4)[:, 2:] = 0
    values, positions = pack_sparse24(sparse)
    moved = read + written + 2.0 * values.numel() + positions.numel()
    halves = row("2:4 weights", moved, "sparse tensor cores (cuSPARSELt) are not used")
    if rows > sparse24_matmul.FEW_ROWS:  # where a compiled model multiplies the dense weight, which it keeps beside
        calls = {"torch.matmul, the dense weight": lambda: F.linear(half, sparse)}
    else:
        ways = configured_ways(sparse24_matmul, "sparse24_configs", sparse24_matmul.sparse24_matmul, half, values)  # type: ignore[arg-type]
        calls = from_ways(ways, half, values, positions=positions)
    candidates = {"fxpress": best(bench, halves, sparse24_matmul, calls), **dense}
    if not dry:
        candidates["2:4, PyTorch"] = lambda: semi_structured(x, sparse)
    yield halves, candidates


def graphs(calls: Mapping[str, Run]) -> dict[str, Callable[[], Run]]:
    """Candidates, from calls."""
    return {name: functools.partial(captured, call) for name, call in calls.items()}


def semi_structured(x: Tensor, weight: Tensor) -> Run:
    """PyTorch's own 2:4 weights, which sparse tensor cores multiply."""
    packed = torch.sparse.to_sparse_semi_structured(weight)
    return captured(lambda: F.linear(x, packed))


class Int4(nn.Module):
    """A linear layer with a weight of 4 bits, two integers a byte, and scales for groups."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = int4_linear(x, self.weight, self.scale, None, None)
        return found


class Attention(nn.Module):
    """Exact attention, as a model calls it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


def bench_attention(bench: Bench, dry: bool) -> None:
    """Attention: exact beside PyTorch's kernels; windows and linear attention beside exact, at lengths up to 65536."""
    for length in [32] if dry else [512, 4096, 16384, 65536]:
        for row, candidates in attention_rows(bench, dry, length):
            bench.measure(row, candidates)
            bench.after()


def attention_rows(bench: Bench, dry: bool, length: int) -> Iterator[tuple[Row, dict[str, Callable[[], Run]]]]:
    """Rows, and what is measured for each."""
    dtype = torch.float32 if dry else torch.bfloat16
    heads, size, features = (2, 16, 16) if dry else (16, 64, 64)
    batch = 1 if length >= 4096 else 8
    # As a model has them: views of [batch, length, heads x size].
    q, k, v = (
        torch.randn(batch, length, heads, size, device=bench.device, dtype=dtype).transpose(1, 2) for _ in range(3)
    )
    moved = 4.0 * q.numel() * q.element_size()

    def library(backend: SDPBackend, causal: bool) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return captured(run)

    flash = SDPBackend.MATH if dry else SDPBackend.FLASH_ATTENTION
    for causal in (False, True) if length < 65536 else ():  # tens of milliseconds a call, as at 16384
        seen = "causal" if causal else "all keys"
        flops = 4.0 * batch * heads * length * length * size * (0.5 if causal else 1.0)
        exact = Row("attention", f"{seen}, batch {batch}, length {length}", flops, moved)
        exact.why = "cuDNN uses what Triton does not reach; it is chosen where it is 3% faster"

        def compiled(causal: bool = causal, exact: Row = exact) -> Run:
            made = fxpress.compile(Attention(causal).eval(), example_inputs=(q, k, v), backend="triton", verify=False)
            made(q, k, v)
            exact.notes["fxpress"] = tuned(made)
            return captured(lambda: made(q, k, v))

        candidates: dict[str, Callable[[], Run]] = {
            "fxpress": compiled,
            "FlashAttention": functools.partial(library, flash, causal),
        }
        if not dry:
            candidates["cuDNN"] = functools.partial(library, SDPBackend.CUDNN_ATTENTION, causal)
        yield exact, candidates
    beside = {"exact, FlashAttention": functools.partial(library, flash, False)}
    flops = 4.0 * batch * heads * length * 257 * size
    window = functools.partial(attention_kernels.window_attention, q, k, v, left=128, right=128)
    row = Row("attention", f"window 128, batch {batch}, length {length}", flops, moved)
    yield row, {"fxpress": lambda: captured(window), **beside}
    phi = [torch.rand(batch, heads, length, features, device=bench.device, dtype=dtype) for _ in range(2)]
    for causal in (False, True):
        seen = "causal" if causal else "all keys"
        flops = 4.0 * batch * heads * length * features * size
        name = f"linear, {features} features, {seen}, batch {batch}, length {length}"
        linear = functools.partial(linear_attention.linear_attention, q, k, v, *phi, causal=causal)
        beside = {"exact, FlashAttention": functools.partial(library, flash, causal)}
        yield (
            Row(
                "attention",
                name,
                flops,
                moved + 2.0 * phi[0].numel() * phi[0].element_size(),
                why="at so short a length exact attention is as few operations",
            ),
            {"fxpress": lambda linear=linear: captured(linear), **beside},
        )
