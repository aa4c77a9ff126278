"""Convolution over tokens as products of small matrices: blocks of queries times the values around them.

The taps of a block's queries are the diagonals of a matrix, which is divided by its rows' sums over the places that
are left: [L, L + K - 1] times values [L + K - 1, E], for taps fixed and given alike. Masking and dividing are then done
on taps, not on values, and the values are read twice and written once. A sum of K shifted products reads and writes
them all K times (three times slower at K = 9, 8192 tokens); a Conv, for fixed taps, needs a pass before it to mask and
one after it to divide (a third slower).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from onnxscript import graph, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, shape
from .functions import DOMAIN
from .lowering import Lowering

_FXPRESS = Opset(DOMAIN, 1)


def block_size(width: int) -> int:
    """Queries a block, for K taps: the matrix is about half zeros, and a third to half of the values is read twice."""
    return 16 * -(-width // 16)


def _by_blocks(value: Tensor, kernel: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
    if value.dtype == torch.float16:
        return _by_blocks(value.float(), kernel.float(), key_mask, causal).to(value.dtype)
    width = kernel.shape[-1]
    size = block_size(width)
    (batch, groups, length, _), heads = value.shape, kernel.shape[-3] if kernel.dim() == 4 else kernel.shape[0]
    real = torch.ones((1, length), dtype=value.dtype) if key_mask is None else key_mask.to(value.dtype)
    offsets = torch.arange(size + width - 1) - (width - 1 if causal else width // 2)
    if kernel.dim() == 4:
        function, taps = DynamicConvolution, kernel
    else:
        function, taps = StaticConvolution, _diagonals(kernel, size)
    return symbolic(
        f"{DOMAIN}::{function.name}",
        (value, taps, real, offsets),
        {"heads": heads, "each": heads // groups, "size": size},
        dtype=value.dtype,
        shape=(batch, heads, length, value.shape[3]),
        version=1,
    )


def _diagonals(kernel: Tensor, size: int) -> Tensor:
    """[H, K] -> [H, 1, size, size + K - 1]: row i holds the taps from column i on."""
    heads, width = kernel.shape
    rows = F.pad(kernel, (0, size))[:, None].expand(heads, size, size + width)
    return rows.reshape(heads, -1)[:, : size * (size + width - 1)].reshape(heads, 1, size, -1)


def refuses(node: fx.Node) -> str | None:
    """Why a node cannot be computed by blocks."""
    given = arguments(node)
    sizes = (shape(given["value"])[1], *shape(given["kernel"])[-1:], shape(given["kernel"])[-3:][0])
    return None if all(isinstance(size, int) for size in sizes) else "the heads or the taps have no fixed number"


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def BlockPlaces(value, offsets, size: int):  # type: ignore[no-untyped-def]
    """The places that each block of a tensor [B, G, N, E] reads, [blocks, width]; beyond the ends too."""
    one = op.Constant(value_int=1)
    step = op.Constant(value_int=size)
    count = (op.Squeeze(op.Shape(value, start=2, end=3)) + step - one) / step
    starts = op.Range(op.Constant(value_int=0), count, one) * step
    return op.Unsqueeze(starts, op.Constant(value_ints=[1])) + offsets


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def MixBlocks(value, taps, real, places, heads: int, each: int):  # type: ignore[no-untyped-def]
    """taps [B or 1, H, blocks or 1, size, width], real [B or 1, N], places [blocks, width] -> [B, H, N, E].

    One head at a time (of a group, `each`): its values and the copies that blocks read stay in the cache.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    batch = op.Shape(value, start=0, end=1)
    length = op.Shape(value, start=2, end=3)
    inside = op.Max(op.Min(places, length - one), zero)
    left = op.Gather(real, inside, axis=1) * op.CastLike(op.Equal(inside, places), real)
    kept = taps * op.Unsqueeze(left, op.Constant(value_ints=[1, 3]))
    total = op.ReduceSum(kept, rest)
    nothing = op.CastLike(op.Equal(total, op.CastLike(zero, total)), total)
    every = op.Expand(kept / (total + nothing), op.Concat(batch, op.Constant(value_ints=[1, 1, 1, 1]), axis=0))
    group = op.Constant(value_int=each) * one
    weights = op.Reshape(every, op.Concat(rest, group, op.Shape(kept, start=2), axis=0))

    @graph()
    def head(some, values):  # type: ignore[no-untyped-def]
        mixed = op.MatMul(some, op.Gather(values, inside))
        return mixed

    table = op.Reshape(value, op.Concat(rest, op.Shape(value, start=2), axis=0))
    found = op.Scan(weights, table, body=head, num_scan_inputs=2)
    head_count = op.Constant(value_int=heads) * one
    joined = op.Reshape(found, op.Concat(batch, head_count, rest, op.Shape(value, start=3), axis=0))
    if op.Squeeze(op.Shape(joined, start=2, end=3) > length):
        result = op.Slice(joined, zero, length, op.Constant(value_ints=[2]))
    else:
        result = op.Identity(joined)
    return result


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def StaticConvolution(value, taps, real, offsets, heads: int, each: int, size: int):  # type: ignore[no-untyped-def]
    """taps [H, 1, size, width], the same for every block."""
    places = BlockPlaces(value, offsets, size)
    return MixBlocks(value, op.Unsqueeze(taps, op.Constant(value_ints=[0])), real, places, heads, each)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def DynamicConvolution(value, taps, real, offsets, heads: int, each: int, size: int):  # type: ignore[no-untyped-def]
    """taps [B, H, N, K]: filled up to rows of K + size numbers, row i begins i places later in rows of one less."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    step = op.Constant(value_int=size) * one
    places = BlockPlaces(value, offsets, size)
    blocks = op.Shape(places, start=0, end=1)
    width = op.Shape(places, start=1, end=2)
    heads_of = op.Shape(taps, start=0, end=2)
    more = blocks * step - op.Shape(taps, start=2, end=3)
    filled = op.Pad(taps, op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0, 0]), more, step, axis=0))
    flat = op.Reshape(filled, op.Concat(heads_of, blocks, op.Constant(value_ints=[-1]), axis=0))
    cut = op.Slice(flat, zero, step * width, op.Constant(value_ints=[3]))
    diagonals = op.Reshape(cut, op.Concat(heads_of, blocks, step, width, axis=0))
    return MixBlocks(value, diagonals, real, places, heads, each)


CONV_ATTENTION = (Lowering("Convolution by blocks", _by_blocks, refuses),)
FUNCTIONS = (BlockPlaces, MixBlocks, StaticConvolution, DynamicConvolution)
