"""Norms in every spelling: found, equal, and refused with a reason where they are something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, check, normal, program, reasons, rewritten
from torch import Tensor
from torch.export import Dim

from fxpress.ir.graph import Program
from fxpress.ir.ops.norm import rms_norm
from fxpress.passes import Canonicalize

aten = torch.ops.aten
X = (2, 5, 8)
EPS = 1e-5
HALF = (torch.float16, torch.bfloat16)


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def rms(m: Any, x: Tensor) -> Tensor:
    return m.w * (x * torch.rsqrt(mean_square(x) + EPS))


def llama(m: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return m.w * (wide * torch.rsqrt(mean_square(wide) + EPS)).to(x.dtype)


def t5(m: Any, x: Tensor) -> Tensor:
    return m.w * (x * torch.rsqrt(mean_square(x.to(torch.float32)) + EPS)).to(x.dtype)


def gemma(m: Any, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(mean_square(wide) + EPS) * (1.0 + m.w.float())).type_as(x)


def olmo2(m: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return (m.w * (wide * torch.rsqrt(mean_square(wide) + EPS))).to(x.dtype)


def wide_weight(m: Any, x: Tensor) -> Tensor:
    """Everything in fp32, as under autocast."""
    wide = x.float()
    return m.w.float() * (wide * torch.rsqrt(mean_square(wide) + EPS))


RMS: dict[str, Callable[..., Tensor]] = {
    "rsqrt": rms,
    "swapped": lambda m, x: (torch.rsqrt(mean_square(x) + EPS) * x) * m.w,
    "sqrt": lambda m, x: x / torch.sqrt(mean_square(x) + EPS) * m.w,
    "reciprocal": lambda m, x: x * torch.reciprocal(torch.sqrt(mean_square(x) + EPS)) * m.w,
    "one_over_sqrt": lambda m, x: x * (1 / torch.sqrt(mean_square(x) + EPS)) * m.w,
    "power": lambda m, x: x * (mean_square(x) + EPS).pow(-0.5) * m.w,
    "square": lambda m, x: x * torch.rsqrt(torch.square(x).mean((2,), keepdim=True) + EPS) * m.w,
    "product": lambda m, x: x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + EPS) * m.w,
    "torch": lambda m, x: F.rms_norm(x, (8,), m.w, EPS),
    "torch_default_eps": lambda m, x: F.rms_norm(x, (8,), m.w),
    "llama": llama,
    "t5": t5,
    "gemma": gemma,
    "olmo2": olmo2,
    "weightless": lambda m, x: x * torch.rsqrt(mean_square(x) + EPS),
}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def cohere(m: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return (m.w.to(torch.float32) * ((wide - mean) * torch.rsqrt(variance + EPS))).to(x.dtype)


LAYER: dict[str, Callable[..., Tensor]] = {
    "pow_rsqrt": lambda m, x: centred(x) * torch.rsqrt(mean_square(centred(x)) + EPS) * m.w + m.b,
    "sqrt_div": lambda m, x: m.w * (centred(x) / torch.sqrt(mean_square(centred(x)) + EPS)) + m.b,
    "bert": lambda m, x: m.b + m.w * (centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)),
    "variance": lambda m, x: centred(x) / torch.sqrt(torch.var(x, -1, correction=0, keepdim=True) + EPS) * m.w + m.b,
    "cohere": cohere,
    "weightless": lambda m, x: centred(x) * torch.rsqrt(mean_square(centred(x)) + EPS),
}


def made(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Program:
    """A program of [batch, length, 8]."""
    dynamic = ({0: Dim.AUTO, 1: Dim.AUTO},)
    weights = {"w": normal(8, dtype=dtype), "b": normal(8, dtype=dtype, seed=1)}
    return program(function, normal(*X, dtype=dtype), dynamic=dynamic, **weights)


CASES = {
    **{f"rms_{name}": (function, rms_norm) for name, function in RMS.items()},
    **{f"layer_{name}": (function, aten.layer_norm.default) for name, function in LAYER.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_found(case: str, golden: Callable[[str], None]) -> None:
    function, target = CASES[case]
    before = made(function)
    after, result = check(before, Canonicalize())
    assert len(after.calls(target)) == 1
    assert not after.calls(aten.rsqrt.default, aten.sqrt.default, aten.mean.dim)
    golden(before_after(before, after, result))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("function", [llama, t5, gemma, olmo2, RMS["torch"], wide_weight, cohere])
def test_found_in_half_precision(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    after, _ = check(made(function, dtype), Canonicalize())
    assert len(after.calls(rms_norm, aten.layer_norm.default)) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("function", [llama, t5, gemma, olmo2])
def test_half_precision_stays_as_the_model_computes_it(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    before = made(function, dtype)
    after, _ = rewritten(before, Canonicalize())
    x = normal(64, 5, 8, dtype=dtype, seed=3)
    assert torch.equal(after.run([x])[0], before.run([x])[0])
    assert not [node for node in after.calls(aten._to_copy.default) if node.args[0].op != "get_attr"]


def test_gemmas_weight_stays_trainable() -> None:
    after, _ = rewritten(made(gemma), Canonicalize())
    assert [name for name, _ in after.module.named_parameters()] == ["w"]
    after.run([normal(*X)])[0].sum().backward()
    assert after.module.get_parameter("w").grad is not None


def test_tied_weights_stay_one_node() -> None:
    tied = normal(8)
    before = program(lambda m, x: F.rms_norm(F.rms_norm(x, (8,), m.a, EPS), (8,), m.b, EPS), normal(*X), a=tied, b=tied)
    after, _ = check(before, Canonicalize())
    assert len([node for node in after.graph.nodes if node.op == "get_attr"]) == 1


def test_what_else_reads_the_centred_value_keeps_it() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        moved = centred(x)
        return moved * torch.rsqrt(mean_square(moved) + EPS), moved

    after, _ = check(made(forward), Canonicalize())
    assert len(after.calls(aten.layer_norm.default)) == len(after.calls(aten.sub.Tensor)) == 1


# --- refusals --------------------------------------------------------------------------------------------------


def two_outputs(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(mean_square(x) + EPS)
    return x * scale, scale


def norm_read_twice(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    norm = x * torch.rsqrt(mean_square(x) + EPS)
    return norm * m.w, norm


HALF_REASON = "half precision that is not normalised in fp32"
LAST = "the mean is not over the last axis alone"
REFUSALS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "axis": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS), "rms_norm", LAST),
    "axes": (lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS), "rms_norm", LAST),
    "cubes": (
        lambda m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS),
        "rms_norm",
        "expected aten.mul.Tensor, found pow_1 (aten.pow.Tensor_Scalar)",
    ),
    "other_input": (
        lambda m, x: x.exp() * torch.rsqrt(mean_square(x) + EPS),
        "rms_norm",
        "x must be exp (aten.exp.default), found x (placeholder)",
    ),
    "eps_outside": (
        lambda m, x: x / (torch.sqrt(mean_square(x)) + EPS),
        "rms_norm",
        "eps is added outside of the square root",
    ),
    "eps_tensor": (lambda m, x: x * torch.rsqrt(mean_square(x) + m.w[0]), "rms_norm", "eps must be a literal, found"),
    "eps_clamped": (
        lambda m, x: x * torch.rsqrt(mean_square(x).clamp(min=EPS)),
        "rms_norm",
        "expected aten.add.Tensor, found clamp (aten.clamp.default)",
    ),
    "scale_read_twice": (two_outputs, "rms_norm", "rsqrt is returned by the model"),
    "norm_read_twice": (norm_read_twice, "norm_weight", "rms_norm is returned by the model"),
    "axes_of_torch": (lambda m, x: F.rms_norm(x, (5, 8)), "rms_norm", "the norm is over 2 axes"),
    "unbiased": (
        lambda m, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + EPS),
        "layer_norm",
        "the variance is not divided by the number of elements",
    ),
    "variance_axis": (
        lambda m, x: centred(x) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + EPS),
        "layer_norm",
        LAST,
    ),
    "mean_axis": (
        lambda m, x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS),
        "layer_norm",
        "the mean that is subtracted is not over the last axis alone",
    ),
    "deviation": (
        lambda m, x: centred(x) / (torch.sqrt(x.var(-1, keepdim=True, unbiased=False)) + EPS),
        "layer_norm",
        "eps is added outside of the square root",
    ),
    "weight_after_bias": (
        lambda m, x: F.layer_norm(x, (8,), None, m.b) * m.w,
        "norm_weight",
        "the weight scales the bias too",
    ),
    "weight_of_two_axes": (
        lambda m, x: F.layer_norm(x, (5, 8)) * m.w,
        "norm_weight",
        "the norm is over several axes",
    ),
    "weight_shape": (
        lambda m, x: F.layer_norm(x, (8,)) * m.w[:1],
        "norm_weight",
        "the weight's shape [1] is not that of the last axis",
    ),
    "weight_dtype": (
        lambda m, x: F.layer_norm(x, (8,)) * m.w.double(),
        "norm_weight",
        "the norm and its weight differ in dtype",
    ),
    "centred_elsewhere": (
        lambda m, x: F.rms_norm(x - x.mean(1, keepdim=True), (8,), m.w, EPS),
        "layer_norm",
        "the mean that is subtracted is not over the last axis alone",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    function, rule, reason = REFUSALS[case]
    static = program(function, normal(*X), dynamic=None, w=normal(8), b=normal(8, seed=1))
    _, result = check(static, Canonicalize())
    assert result.rewrites[rule] == 0
    assert any(reason in found for found in reasons(result, rule)), result.refusals


HALF_REFUSALS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "in_half": (rms, "rms_norm", HALF_REASON),
    "mean_in_half": (lambda m, x: x.float() * torch.rsqrt(mean_square(x) + EPS), "rms_norm", HALF_REASON),
    "not_rounded": (
        lambda m, x: (x.float() * torch.rsqrt(mean_square(x.float()) + EPS)).to(torch.bfloat16),
        "norm_rounding",
        "the norm is not rounded to the input's dtype",
    ),
    "default_eps": (
        lambda m, x: F.rms_norm(x, (8,), m.w),
        "rms_norm",
        "the default eps in half precision differs between devices",
    ),
    "rounded_before_the_weight": (
        lambda m, x: F.layer_norm(x, (8,), None, None) * m.w,
        "norm_weight",
        "layer_norm rounds half precision after its weight, not before",
    ),
    "centred_in_half": (
        lambda m, x: F.rms_norm(centred(x), (8,), m.w, EPS),
        "layer_norm",
        "the mean is subtracted in half precision",
    ),
}


@pytest.mark.parametrize("case", HALF_REFUSALS)
def test_refusal_in_half_precision(case: str) -> None:
    function, rule, reason = HALF_REFUSALS[case]
    _, result = check(made(function, torch.float16), Canonicalize())
    assert any(reason in found for found in reasons(result, rule)), result.refusals


def test_a_layer_norm_of_any_size_is_refused() -> None:
    before = program(LAYER["weightless"], normal(*X))
    _, result = check(before, Canonicalize())
    assert "the size of the last axis varies" in reasons(result, "layer_norm")


def test_no_other_multiplication_is_a_near_miss() -> None:
    _, result = check(made(lambda m, x: (x * m.w).exp() * x + m.b), Canonicalize())
    assert result.refusals == []
