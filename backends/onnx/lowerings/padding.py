"""Packed tokens: attention one sample after the other, each a slice of the row of all tokens.

No sample has a mask, so that each runs in the kernels that read none, with as many queries and keys as it has tokens.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, shape
from ....ir.ops.attention import cast
from ....ir.ops.padding import pack_tokens, real_tokens, unpack_tokens
from .causal import GROUP_QUERY_SIZES, CausalAttention
from .functions import DOMAIN
from .lowering import Lowering, reference, scaled
from .samples import MANY_SCORES, Unmasked

_FXPRESS = Opset(DOMAIN, 1)


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def EveryScore(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Of any kind but causal, in the one kernel that knows grouped heads, a soft cap and float16."""
    return op.Attention(
        query, key, value, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap
    )


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def EveryCausalScore(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """Causal, heads of any size."""
    return op.Attention(
        query, key, value,
        q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, is_causal=1,
    )  # fmt: skip


@script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
def FewOrManyScores(  # type: ignore[no-untyped-def]
    query, key, value, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
):
    """In float32, as many key heads as query heads, no soft cap: the kernel that is faster for a sample's length."""
    length = op.Squeeze(op.Shape(query, start=1, end=2))
    many = length * length * op.Constant(value_int=q_num_heads) >= MANY_SCORES
    return Unmasked(query, key, value, many, q_num_heads, kv_num_heads, scale, softcap)


def _by_samples(name: str, kernel: OnnxFunction) -> OnnxFunction:
    """Attention of packed tokens in a kernel for one sample without a mask."""

    @script(_FXPRESS, default_opset=op)  # type: ignore[untyped-decorator]
    def PackedAttention(  # type: ignore[no-untyped-def]
        query, key, value, lengths, together, q_num_heads: int, kv_num_heads: int, scale: float, softcap: float
    ):
        """Query [1, T, H * D], key [1, T, G * D], value [1, T, G * E], `lengths` [B] of the samples, T together.

        `together`: they are all as long, and all at once is faster.
        """
        one = op.Constant(value_ints=[1])
        # The width of a result, said in full: ONNX Runtime infers none through slices of lengths that it does not know.
        heads, groups = op.Constant(value_int=q_num_heads), op.Constant(value_int=kv_num_heads)
        width = op.Shape(value, start=2) / groups * heads
        every = op.Concat(op.Shape(query, start=0, end=2), width, axis=0)
        if together:
            batch = op.Concat(op.Shape(lengths), op.Constant(value_ints=[-1, 0]), axis=0)
            found = kernel(
                op.Reshape(query, batch), op.Reshape(key, batch), op.Reshape(value, batch),
                q_num_heads, kv_num_heads, scale, softcap,
            )  # fmt: skip
            result = op.Reshape(found, every)
        else:
            stops = op.CumSum(lengths, op.Constant(value_int=0))
            zero = op.Constant(value_ints=[0])
            none = op.Reshape(op.Slice(value, zero, zero, one), op.Concat(one, zero, width, axis=0), allowzero=1)
            rows = op.SequenceConstruct(none)  # there may be no token at all
            for sample in range(op.Squeeze(op.Shape(lengths))):
                stop = op.Reshape(op.Gather(stops, sample), one)
                start = stop - op.Reshape(op.Gather(lengths, sample), one)
                if op.Squeeze(stop > start):
                    found = kernel(
                        op.Slice(query, start, stop, one), op.Slice(key, start, stop, one),
                        op.Slice(value, start, stop, one), q_num_heads, kv_num_heads, scale, softcap,
                    )  # fmt: skip
                    longer = op.SequenceInsert(rows, found)
                else:
                    longer = op.Identity(rows)
                rows = longer
            result = op.Reshape(op.ConcatFromSequence(rows, axis=1), every)
        return result

    PackedAttention.function_ir.name = name  # several of one name are none to a model
    return PackedAttention


FewOrMany = _by_samples("PackedFewOrMany", FewOrManyScores)
Grouped = _by_samples("PackedEveryScore", EveryScore)
Causal = _by_samples("PackedCausal", CausalAttention)
OddCausal = _by_samples("PackedEveryCausalScore", EveryCausalScore)

FUNCTIONS = (EveryScore, EveryCausalScore, FewOrManyScores, FewOrMany, Grouped, Causal, OddCausal)


def _refuses(node: fx.Node) -> str | None:
    given = arguments(node)
    if not all(isinstance(shape(given[name])[1], int) for name in ("query", "key")):
        return "the number of heads is dynamic"
    if dtype(given["query"]) not in (torch.float32, torch.float16):
        return f"ONNX Runtime's kernels are for float32 and float16, found {dtype(given['query'])}"
    return None


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    query, factor = scaled(query, scale)
    heads, size = query.shape[1], query.shape[3]
    if causal:
        whole = size % GROUP_QUERY_SIZES == 0 and size == value.shape[3]
        function = Causal if whole else OddCausal
    else:
        plain = heads == key.shape[1] and not softcap and query.dtype == torch.float32
        function = FewOrMany if plain else Grouped
    rows = [item.transpose(1, 2).flatten(2) for item in (query, key, value)]
    lengths = cast(key_mask, torch.int64).sum(1)
    longest, samples = lengths.amax(0), torch.full((), key_mask.shape[0], dtype=torch.int64)
    few = torch.logical_or(heads * longest * longest * samples < MANY_SCORES, samples == 1)
    together = torch.logical_and(torch.logical_and(few, lengths.amin(0) == longest), longest > 0)
    result: Tensor = symbolic(
        f"{DOMAIN}::{function.function_ir.name}",
        (*rows, lengths, together),
        {"q_num_heads": heads, "kv_num_heads": key.shape[1], "scale": factor, "softcap": softcap},
        dtype=query.dtype,
        shape=(1, query.shape[2], heads * value.shape[3]),
        version=1,
    )
    return result.reshape(1, query.shape[2], heads, value.shape[3]).transpose(1, 2)


REAL_TOKENS = (Lowering("NonZero", reference(real_tokens)),)
PACK_TOKENS = (Lowering("Gather", reference(pack_tokens)),)
UNPACK_TOKENS = (Lowering("Gather with a row of zeros", reference(unpack_tokens)),)
PACKED_ATTENTION = (Lowering("one sample after the other", _packed_attention, _refuses, standard=False),)
