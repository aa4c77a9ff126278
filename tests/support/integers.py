"""What the tests of integer-only inference share: models, calibration data and the search for floats."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxpress.ir.graph import Program
from fxpress.ir.ops.quantize import dequantize, quantize
from fxpress.ir.rewrite import Context, PassResult
from fxpress.ir.verify import verify
from fxpress.passes import Canonicalize, IntegerOnly

_copy = torch.ops.aten._to_copy.default


class Layer(nn.Module):
    """An encoder layer by hand: 3 heads of 4, LayerNorm before or after, a key mask, optionally causal."""

    def __init__(self, first: bool, activation: Any, causal: bool) -> None:
        super().__init__()
        self.first, self.activation, self.causal = first, activation, causal
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.causal:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        return self.o(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.first:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.down(self.activation(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.down(self.activation(self.up(x))))


class Encoder(nn.Module):
    """Several layers on a tensor [B, N, 12] and a boolean mask [B, N]."""

    def __init__(self, first: bool = False, activation: Any = F.gelu, causal: bool = False, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(first, activation, causal) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Packed(nn.Module):
    """Torch's own layer: one weight for query, key and value, the length first inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, norm_first=True, activation="relu", batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=~mask)


def batch(rows: int = 2, length: int = 7, seed: int = 0) -> list[Tensor]:
    """Activations with a channel of outliers, and a mask that pads the last row unless it is of one token."""
    outliers = torch.ones(12)
    outliers[5] = 8.0
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    return [normal(rows, length, 12, seed=seed) * outliers, mask]


CALIBRATION = [batch(16, 24, seed) for seed in range(1, 4)]


def canonical(model: nn.Module, *examples: Tensor) -> Program:
    traced = program(model.eval(), *(examples or batch()))
    Canonicalize().apply(traced, Context())
    return traced


@functools.cache
def encoder() -> Program:
    """A program of one layer, LayerNorm after; not to be changed."""
    return canonical(Encoder(layers=1))


def integer(traced: Program, calibration: Sequence[Sequence[Tensor]] = CALIBRATION) -> tuple[Program, PassResult]:
    """A copy in integers, verified."""
    after = traced.copy()
    result = IntegerOnly().apply(after, Context(calibration=calibration))
    verify(after)
    return after, result


class NoFloats(TorchDispatchMode):
    """Fails at the first operation that gives or takes a tensor of floats."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, found)):
            assert not (isinstance(value, Tensor) and value.is_floating_point()), f"{function} computes in floats"
        return found


class NoFloatsInside(fx.Interpreter):
    """Runs a program; between its quantize and its dequantize nothing may compute in floats, in any operator."""

    def __init__(self, traced: Program) -> None:
        super().__init__(traced.module)
        self.inside: set[fx.Node] = set()
        for node in traced.graph.nodes:
            starts = node.target is _copy and any(used.target is quantize for used in node.all_input_nodes)
            ends = node.target is _copy and any(user.target is dequantize for user in node.users)
            if starts or (not ends and any(used in self.inside for used in node.all_input_nodes)):
                self.inside.add(node)
        self.boundary = {node for node in self.inside if node.target is _copy}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.inside - self.boundary or n.target is dequantize or n.op == "output":
            return super().run_node(n)
        with NoFloats():
            return super().run_node(n)
