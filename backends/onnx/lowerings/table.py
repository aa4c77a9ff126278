"""The lowerings of each operator, in order of preference; operators that are not here are left to torch's exporter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ....ir.ops import (
    align,
    attention,
    block_attention,
    conv_attention,
    float8,
    int8_attention,
    integer,
    linear,
    linear_attention,
    low_rank_attention,
    lsh_attention,
    norm,
    padding,
    pool,
    quantize,
    rotary,
    window_attention,
)
from . import align as aligns
from . import attention as attentions
from . import banded, block_tables, causal, portable, samples
from . import block_attention as block_attentions
from . import conv_attention as conv_attentions
from . import float8 as floats8
from . import int8_attention as int8_attentions
from . import integer as integers
from . import linear as linears
from . import linear_attention as linear_attentions
from . import lsh_attention as lsh_attentions
from . import norm as norms
from . import padding as paddings
from . import quantize as quantizes
from . import rotary as rotaries
from . import window_attention as window_attentions
from .lowering import Lowering, Probe, reference

LOWERINGS: dict[Any, tuple[Lowering, ...]] = {
    attention.attention: attentions.ATTENTION,
    int8_attention.int8_attention: int8_attentions.INT8_ATTENTION,
    norm.add_layer_norm: norms.ADD_LAYER_NORM,
    norm.rms_norm: norms.RMS_NORM,
    norm.add_rms_norm: norms.ADD_RMS_NORM,
    torch.ops.aten.linear.default: linears.LINEAR,
    linear.linear_act: linears.LINEAR_ACT,
    linear.gated_linear: linears.GATED_LINEAR,
    linear.split_linear: linears.SPLIT_LINEAR,
    linear.mlp: linears.MLP,
    rotary.rotary: rotaries.ROTARY,
    padding.real_tokens: paddings.REAL_TOKENS,
    padding.pack_tokens: paddings.PACK_TOKENS,
    padding.unpack_tokens: paddings.UNPACK_TOKENS,
    padding.packed_attention: paddings.PACKED_ATTENTION,
    integer.requantize: integers.REQUANTIZE,
    integer.integer_add: integers.INTEGER_ADD,
    integer.integer_linear: integers.INTEGER_LINEAR,
    integer.integer_matmul: integers.INTEGER_MATMUL,
    integer.integer_gelu: integers.INTEGER_GELU,
    integer.integer_softmax: integers.INTEGER_SOFTMAX,
    integer.integer_layer_norm: integers.INTEGER_LAYER_NORM,
    quantize.quantize: quantizes.QUANTIZE,
    quantize.dequantize: quantizes.DEQUANTIZE,
    quantize.dynamic_quantize: quantizes.DYNAMIC_QUANTIZE,
    quantize.int8_linear: quantizes.INT8_LINEAR,
    quantize.int4_linear: quantizes.INT4_LINEAR,
    quantize.int4_embedding: quantizes.INT4_EMBEDDING,
    quantize.expand_int4: quantizes.EXPAND_INT4,
    float8.float8_quantize: floats8.FLOAT8_QUANTIZE,
    float8.float8_scale: floats8.FLOAT8_SCALE,
    float8.float8_linear: floats8.FLOAT8_LINEAR,
    conv_attention.conv_attention: conv_attentions.CONV_ATTENTION,
    lsh_attention.lsh_attention: lsh_attentions.LSH_ATTENTION,
    align.align_tokens: aligns.ALIGN_TOKENS,
    window_attention.window_attention: window_attentions.WINDOW_ATTENTION,
    block_attention.block_attention: block_attentions.BLOCK_ATTENTION,
    block_attention.random_blocks: block_tables.RANDOM_BLOCKS,
    block_attention.expander_blocks: block_tables.EXPANDER_BLOCKS,
    block_attention.dynamic_blocks: block_tables.DYNAMIC_BLOCKS,
    linear_attention.linear_attention: linear_attentions.LINEAR_ATTENTION,
    **{
        operator: (Lowering("MatMul and other primitives", reference(operator)),)
        for operator in (
            linear_attention.random_features,
            linear_attention.softmax_features,
            low_rank_attention.nystrom_attention,
            low_rank_attention.linformer_attention,
            pool.pool_tokens,
            pool.pool_mask,
            pool.unpool_tokens,
        )
    },
}

FUNCTIONS = (
    *banded.FUNCTIONS,
    *causal.FUNCTIONS,
    *samples.FUNCTIONS,
    *paddings.FUNCTIONS,
    *aligns.FUNCTIONS,
    *window_attentions.FUNCTIONS,
    *block_attentions.FUNCTIONS,
    *block_tables.FUNCTIONS,
    *linear_attentions.FUNCTIONS,
    *conv_attentions.FUNCTIONS,
    *lsh_attentions.FUNCTIONS,
)  # of our own, which lowerings call

# Where other runtimes than ONNX Runtime take other lowerings than it, these alone.
PORTABLE: dict[Any, tuple[Lowering, ...]] = {
    attention.attention: portable.ATTENTION,
    padding.packed_attention: portable.PACKED_ATTENTION,
    norm.rms_norm: portable.RMS_NORM,
    norm.add_rms_norm: portable.ADD_RMS_NORM,
    quantize.dequantize: portable.DEQUANTIZE,
    quantize.int8_linear: portable.INT8_LINEAR,
    quantize.int4_linear: portable.INT4_LINEAR,
    quantize.expand_int4: portable.EXPAND_INT4,
}

PROBES: dict[Any, Probe] = {
    attention.attention: attentions.PROBE,
    quantize.int8_linear: quantizes.PROBE,
}


def supported(node: fx.Node) -> tuple[list[Lowering], list[str]]:
    """The candidates that take a node, and the reasons of those that do not."""
    return _taking(node, LOWERINGS.get(node.target, ()))


def standard(node: fx.Node) -> tuple[list[Lowering], list[str]]:
    """`supported` of lowerings to the ONNX standard alone."""
    every = PORTABLE.get(node.target) or LOWERINGS.get(node.target, ())
    candidates, reasons = _taking(node, [lowering for lowering in every if lowering.standard])
    return candidates, [*reasons, *(f"{item.name}: for ONNX Runtime alone" for item in every if not item.standard)]


def _taking(node: fx.Node, lowerings: Iterable[Lowering]) -> tuple[list[Lowering], list[str]]:
    candidates, reasons = [], []
    for lowering in lowerings:
        reason = lowering.refuses(node)
        if reason is None:
            candidates.append(lowering)
        else:
            reasons.append(f"{lowering.name}: {reason}")
    return candidates, reasons
