"""Our operators: each reference against torch, its gradient, and the table that lists them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.linear import ACTIVATIONS, gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from fxpress.ir.ops.rotary import rotary
from fxpress.ir.ops.table import OPERATORS, operator

sdpa = F.scaled_dot_product_attention
Q, K, V = normal(2, 4, 5, 8), normal(2, 4, 7, 8, seed=1), normal(2, 4, 7, 6, seed=2)
BOOL = normal(2, 1, 5, 7, seed=3) > -0.5
BOOL[0, 0, 2] = False  # a row with nothing allowed


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "mask", [None, BOOL, normal(2, 4, 5, 7, seed=4), normal(5, 7, seed=4), normal(1, 4, 1, 7, seed=4)]
)
def test_attention_with_a_mask(mask: Tensor | None) -> None:
    close(attention(Q, K, V, bias=mask), sdpa(Q, K, V, attn_mask=mask))


def test_attention_causal() -> None:
    close(attention(Q, K, V, right=0), sdpa(Q, K, V, is_causal=True))


def test_attention_scale() -> None:
    close(attention(Q, K, V, scale=0.3), sdpa(Q, K, V, scale=0.3))


def test_attention_of_grouped_heads() -> None:
    close(attention(Q, K[:, :2], V[:, :2]), sdpa(Q, K[:, :2], V[:, :2], enable_gqa=True))


def test_attention_key_mask() -> None:
    close(attention(Q, K, V, key_mask=BOOL[:, 0, 0]), sdpa(Q, K, V, attn_mask=BOOL[:, :, :1]))


def test_attention_of_all_masks_together() -> None:
    key_mask = BOOL[:, 0, 0]
    bias = normal(5, 7, seed=4)
    lower = torch.ones(5, 7, dtype=torch.bool).tril()
    mask = bias.masked_fill(~(lower & key_mask[:, None, None, :]), -math.inf)
    close(attention(Q, K, V, bias=bias, key_mask=key_mask, right=0), sdpa(Q, K, V, attn_mask=mask))


@pytest.mark.parametrize("mask", [BOOL, torch.zeros(BOOL.shape).masked_fill(~BOOL, -math.inf)])
def test_attention_row_without_keys_is_zero(mask: Tensor) -> None:
    assert not attention(Q, K, V, bias=mask)[0, :, 2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = (item.to(dtype) for item in (Q, K, V))
    assert torch.equal(attention(q, k, v), attention(q.float(), k.float(), v.float()).to(dtype))


def test_rms_norm() -> None:
    x, weight = normal(3, 8), normal(8, seed=1)
    close(rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3))


def test_rms_norm_in_half_precision_is_normalised_in_fp32() -> None:
    x, weight = normal(3, 8).half() * 1000, normal(8, seed=1).half()  # squares overflow fp16
    wide = F.rms_norm(x.float(), (8,), None, 1e-6).half()
    assert torch.equal(rms_norm(x, weight, 1e-6), weight * wide)


def test_add_rms_norm() -> None:
    x, y, weight = normal(3, 8), normal(3, 8, seed=2), normal(8, seed=1)
    norm, total = add_rms_norm(x, y, weight, 1e-3)
    assert torch.equal(total, x + y)
    close(norm, F.rms_norm(x + y, (8,), weight, 1e-3))


def test_add_layer_norm() -> None:
    x, y, weight, bias = (normal(3, 8), normal(3, 8, seed=2), normal(8, seed=1), normal(8, seed=3))
    norm, total = add_layer_norm(x, y, weight, bias, 1e-3)
    assert torch.equal(total, x + y)
    close(norm, F.layer_norm(x + y, (8,), weight, bias, 1e-3))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linear_act(name: str) -> None:
    x, weight, bias = normal(3, 8), normal(6, 8, seed=1), normal(6, seed=2)
    expected: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU("tanh"),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "relu": torch.nn.ReLU(),
        "silu": torch.nn.SiLU(),
        "tanh": torch.nn.Tanh(),
    }
    close(linear_act(x, weight, bias, name), expected[name](F.linear(x, weight, bias)))


def test_linear_act_without_bias() -> None:
    x, weight = normal(3, 8), normal(6, 8, seed=1)
    close(linear_act(x, weight, None, "relu"), F.linear(x, weight).relu())


@pytest.mark.parametrize("bias", [None, normal(6, seed=3)])
def test_gated_linear(bias: Tensor | None) -> None:
    x, gate, up = normal(3, 8), normal(6, 8, seed=1), normal(6, 8, seed=2)
    packed = F.linear(x, torch.cat((up, gate)))
    shift = 0 if bias is None else bias
    expected = F.silu(packed[..., 6:]) * (packed[..., :6] + shift)
    close(gated_linear(x, gate, up, None, bias, "silu"), expected)


@pytest.mark.parametrize("gate", [None, normal(6, 8, seed=5)])
def test_mlp(gate: Tensor | None) -> None:
    up, down = torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)
    x = normal(2, 3, 8)
    hidden = torch.tanh(up(x)) if gate is None else torch.tanh(x @ gate.T) * up(x)
    close(mlp(x, up.weight, up.bias, down.weight, down.bias, "tanh", gate), down(hidden))


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding as a product of complex numbers, on the first columns."""
    columns = 2 * angles.shape[-1]
    pairs = x[..., :columns].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    product = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    product = product if interleaved else product.transpose(-1, -2)
    return torch.cat((product.flatten(-2), x[..., columns:]), -1)


@pytest.mark.parametrize("columns", [8, 6, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary(columns: int, interleaved: bool, batch: int) -> None:
    x, angles = normal(2, 3, 5, 8), normal(batch, 1, 5, columns // 2, seed=1)
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    close(rotary(x, wide.cos(), wide.sin(), interleaved), turned(x, angles, interleaved))


def test_rms_norm_without_weight() -> None:
    x = normal(3, 8)
    close(rms_norm(x, None, 1e-3), F.rms_norm(x, (8,), None, 1e-3))


def test_rms_norm_scales_half_precision_before_rounding_where_the_weight_is_in_fp32() -> None:
    x, weight = normal(64, 8).half(), normal(8, seed=1)
    wide = F.rms_norm(x.float(), (8,), None, 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), (wide * weight).half())
    assert not torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight.half(), 1e-6))


@pytest.mark.parametrize("bias", [None, normal(6)])
def test_split_linear(bias: Tensor | None) -> None:
    x, weight = normal(2, 3, 8), normal(6, 8, seed=1)
    first, second = split_linear(x, weight, bias, [2, 4])
    whole = F.linear(x, weight, bias)
    close(first, whole[..., :2])
    close(second, whole[..., 2:])


def wide(*sizes: int, seed: int = 0) -> Tensor:
    return normal(*sizes, dtype=torch.float64, seed=seed).requires_grad_()


GRADIENTS: dict[str, Callable[[], tuple[Any, tuple[Tensor, ...]]]] = {
    "attention": lambda: (
        lambda q, k, v, bias: attention(q, k, v, bias, BOOL[:, 0, 0, :3], True),
        (wide(2, 2, 3, 2), wide(2, 1, 3, 2, seed=1), wide(2, 1, 3, 2, seed=2), wide(3, 3, seed=3)),
    ),
    "rms_norm": lambda: (lambda x, w: rms_norm(x, w, 1e-3), (wide(2, 4), wide(4, seed=1))),
    "add_rms_norm": lambda: (
        lambda x, y, w: add_rms_norm(x, y, w, 1e-3),
        (wide(2, 4), wide(2, 4, seed=2), wide(4, seed=1)),
    ),
    "add_layer_norm": lambda: (
        lambda x, y, w, b: add_layer_norm(x, y, w, b, 1e-3),
        (wide(2, 4), wide(2, 4, seed=2), wide(4, seed=1), wide(4, seed=3)),
    ),
    "gated_linear": lambda: (
        lambda x, g, u, b: gated_linear(x, g, u, b, None, "silu"),
        (wide(2, 4), wide(3, 4, seed=1), wide(3, 4, seed=2), wide(3, seed=3)),
    ),
    "rotary": lambda: (
        lambda x, cos, sin: rotary(x, cos, sin, True),
        (wide(2, 2, 3, 6), wide(1, 1, 3, 4, seed=1), wide(1, 1, 3, 4, seed=2)),
    ),
    "linear_act": lambda: (
        lambda x, w, b: linear_act(x, w, b, "gelu"),
        (wide(2, 4), wide(3, 4, seed=1), wide(3, seed=2)),
    ),
    "mlp": lambda: (
        lambda x, u, d, g, b: mlp(x, u, None, d, None, "silu", g, b),
        (wide(2, 4), wide(3, 4, seed=1), wide(2, 3, seed=2), wide(3, 4, seed=3), wide(3, seed=4)),
    ),
    "split_linear": lambda: (
        lambda x, w, b: tuple(split_linear(x, w, b, [1, 2])),
        (wide(2, 4), wide(3, 4, seed=1), wide(3, seed=2)),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name: str) -> None:
    function, examples = GRADIENTS[name]()
    assert torch.autograd.gradcheck(function, examples)


def test_every_operator_has_one_line_of_meaning() -> None:
    assert all(entry.meaning and "\n" not in entry.meaning for entry in OPERATORS.values())


def test_an_operator_is_declared_once() -> None:
    with pytest.raises(ValueError, match=r"operator fxpress::rms_norm is declared twice"):
        operator("rms_norm(Tensor input) -> Tensor", meaning="another")(lambda input: input)
