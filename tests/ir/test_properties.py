"""Random small Transformer layers: rewriting them changes nothing that can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from build import check, normal, program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fuse


@dataclass(frozen=True)
class Shape:
    heads: int
    groups: int
    size: int
    inner: int
    pre: bool
    causal: bool
    masked: bool
    bias: bool
    rms: bool
    activation: str


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups = draw(st.integers(1, 2))
    masked = draw(st.booleans())
    return Shape(
        heads=groups * draw(st.integers(1, 2)),
        groups=groups,
        size=draw(st.sampled_from([2, 4, 5])),
        inner=draw(st.integers(3, 12)),
        pre=draw(st.booleans()),
        causal=draw(st.booleans()) and not masked,
        masked=masked,
        bias=draw(st.booleans()),
        rms=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "relu", "silu", "tanh", "spelled"])),
    )


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def spelled(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.heads * shape.size
        self.shape = shape
        self.q, self.o = nn.Linear(width, width, shape.bias), nn.Linear(width, width, shape.bias)
        self.k, self.v = (nn.Linear(width, shape.groups * shape.size, shape.bias) for _ in range(2))
        self.up, self.down = nn.Linear(width, shape.inner, shape.bias), nn.Linear(shape.inner, width, shape.bias)
        self.first, self.second = (RMSNorm(width) if shape.rms else nn.LayerNorm(width) for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.shape.size).transpose(1, 2)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q, self.k, self.v))
        allowed = mask[:, None, None, :] if self.shape.masked else None
        grouped = self.shape.heads != self.shape.groups
        mixed = F.scaled_dot_product_attention(q, k, v, allowed, 0.0, self.shape.causal, enable_gqa=grouped)
        return self.o(mixed.transpose(1, 2).contiguous().view(x.shape))

    def feed(self, x: Tensor) -> Tensor:
        act = spelled if self.shape.activation == "spelled" else getattr(torch, self.shape.activation, None)
        return self.down((act or getattr(F, self.shape.activation))(self.up(x)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.shape.pre:
            x = x + F.dropout(self.attend(self.first(x), mask), 0.1, self.training)
            return x + self.feed(self.second(x))
        x = self.first(x + F.dropout(self.attend(x, mask), 0.1, self.training))
        return self.second(x + self.feed(x))


class Both(Fuse):
    """Canonicalize, then fuse."""

    def apply(self, program, context: Context):  # type: ignore[no-untyped-def]
        result = Canonicalize().apply(program, context)
        result.rewrites += Fuse().apply(program, context).rewrites
        return result


@given(shapes())
@settings(max_examples=10)
def test_a_rewritten_layer_is_equal(shape: Shape) -> None:
    torch.manual_seed(0)
    width = shape.heads * shape.size
    _, result = check(program(Layer(shape), normal(2, 5, width), normal(2, 5) > -0.5), Both())
    assert result.rewrites["attention"] == 1
    assert result.rewrites["pack_projections"] == 1
    assert result.rewrites["add_rms_norm" if shape.rms else "add_layer_norm"] == (1 if shape.pre else 2)
