"""Mean of the values around each position, weighted by taps: lightweight and dynamic convolution (Wu et al., 2019) and
the convolution heads of ConvBERT (Jiang et al., 2020). Memory is that of the operands: nothing is padded, no window is
unfolded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


# fmt: off
@triton.jit
def conv_attention_kernel(
    value, taps, key_mask, out, num_heads, repeat, num_tokens,
    value_stride_b, value_stride_g, value_stride_n, value_stride_e,
    taps_stride_b, taps_stride_h, taps_stride_n, taps_stride_k,
    key_mask_stride_b, key_mask_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    WIDTH: tl.constexpr, BEFORE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # fmt: on
    """One program: BLOCK_N positions of one head; position i reads i - BEFORE .. i - BEFORE + WIDTH - 1.

    value [B, G, N, E], taps [B, H, N, WIDTH] (strides of 0 where they are fixed), key_mask [B, N] boolean or None, all
    of any strides; out [B, H, N, E] with a stride of 1 on its last axis. H is num_heads, H / G is repeat, N is
    num_tokens, E is VALUE_DIM. Sums are fp32. Grid: (blocks of N x B x H).
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = tl.program_id(0) // num_heads
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    i = batch % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = (batch // blocks).to(tl.int64)
    e = tl.arange(0, BLOCK_E)[None, :]
    value += batch * value_stride_b + head // repeat * value_stride_g + e.to(tl.int64) * value_stride_e
    taps += batch * taps_stride_b + head * taps_stride_h + i.to(tl.int64) * taps_stride_n
    if key_mask is not None:
        key_mask += batch * key_mask_stride_b
    sums = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for tap in tl.range(0, WIDTH, loop_unroll_factor=4):
        j = i + tap - BEFORE
        real = (j >= 0) & (j < num_tokens)
        offsets = j.to(tl.int64)
        if key_mask is not None:
            real = real & (tl.load(key_mask + offsets * key_mask_stride_n, mask=real, other=0) != 0)
        weight = tl.load(taps + tap * taps_stride_k, mask=i < num_tokens, other=0.0).to(tl.float32)
        inside = real[:, None] & (e < VALUE_DIM)
        values = tl.load(value + offsets[:, None] * value_stride_n, mask=inside, other=0.0)
        sums += weight[:, None] * values.to(tl.float32)
        total += weight * tl.where(real, 1.0, 0.0)
    nothing = total == 0.0
    sums = tl.where(nothing[:, None], 0.0, sums / tl.where(nothing, 1.0, total)[:, None])
    out += batch * out_stride_b + head * out_stride_h + i.to(tl.int64)[:, None] * out_stride_n
    tl.store(out + e, sums.to(out.dtype.element_ty), mask=(i < num_tokens)[:, None] & (e < VALUE_DIM))


def conv_attention(
    value: torch.Tensor, kernel: torch.Tensor, key_mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """What the operator fxpress::conv_attention defines, in fp16, bf16 or fp32.

    value [B, G, N, E], kernel [H, K] or [B, H, N, K], key_mask [B, N] boolean; any strides. The result [B, H, N, E] is
    contiguous once its axes 1 and 2 are exchanged. Values that are masked are not read, be they NaN or not.
    """
    batch, num_groups, length, value_dim = value.shape
    taps = kernel if kernel.dim() == 4 else kernel[None, :, None]
    num_heads, width = taps.shape[1], taps.shape[3]
    out = torch.empty((batch, length, num_heads, value_dim), dtype=value.dtype, device=value.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    block_e = triton.next_power_of_2(value_dim)
    block_n = max(1, min(2048 // block_e, triton.next_power_of_2(length)))
    conv_attention_kernel[(triton.cdiv(length, block_n) * batch * num_heads,)](
        value, taps, key_mask, out, num_heads, num_heads // num_groups, length,
        *value.stride(), *taps.expand(batch, num_heads, length, width).stride(),
        *((0, 0) if key_mask is None else key_mask.expand(batch, length).stride()), *out.stride()[:3],
        WIDTH=width, BEFORE=width - 1 if causal else width // 2, VALUE_DIM=value_dim,
        BLOCK_N=block_n, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return out
