"""Rotary embedding: multiplications and additions, or one kernel where the angles are known to come in pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, same_sizes, shape
from ....ir.ops.rotary import rotary
from ....ir.spellings.rotary import states_pairs_twice
from .lowering import Lowering, reference


def _rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The kernel takes the angle of a pair once, for every row of the batch: [B, N, R / 2].

    Its rows are [B, N, H * D], as projections give them and attention reads them: transpositions around it cancel.
    """
    columns = cos.shape[-1]
    once = slice(None, None, 2) if interleaved else slice(columns // 2)
    caches = [item[:, 0, :, once].expand(input.shape[0], -1, -1) for item in (cos, sin)]
    attributes: dict[str, Any] = {
        "interleaved": int(interleaved),
        "num_heads": input.shape[1],
        "rotary_embedding_dim": 0 if columns == input.shape[-1] else columns,
    }
    rows = input.transpose(1, 2).flatten(2)
    result = symbolic("RotaryEmbedding", (rows, *caches), attributes,
                      dtype=rows.dtype, shape=rows.shape, version=23)  # fmt: skip
    batch, heads, length, size = input.shape
    return result.reshape(batch, length, heads, size).transpose(1, 2)


def _refuses_kernel(node: fx.Node) -> str | None:
    given = arguments(node)
    size, cos, sin = (shape(given[name]) for name in ("input", "cos", "sin"))
    if len(size) != 4 or not (isinstance(size[1], int) and isinstance(size[3], int)):
        return "the kernel takes [batch, heads, length, size] only, heads of a fixed number and size"
    for angle in (cos, sin):
        if len(angle) != 4 or not same_sizes(angle[1:3], (1, size[2])):
            return "cos and sin are not [batch, 1, length, columns]"
    if dtype(given["input"]) is not torch.float32:
        return "the kernel is for fp32 only"
    if not all(states_pairs_twice(given[name], given["interleaved"]) for name in ("cos", "sin")):
        return "cos and sin are not known to be the same for both columns of a pair"
    return None


ROTARY = (
    Lowering("Mul+Add", reference(rotary)),
    Lowering("RotaryEmbedding", _rotary_embedding, _refuses_kernel, standard=False),
)
