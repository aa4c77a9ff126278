"""The gradient of attention, in the interpreter, against autograd of the reference."""

import math
from typing import Any

import pytest
import torch
from attention_cases import LOWEST, inputs, interpreted, padded
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.equality import compare, widen
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.table import OPERATORS
from fxpress.kernels import attention as forward
from fxpress.kernels import attention_backward as kernels

REFERENCE = OPERATORS[attention].reference
NAMES = ("query", "key", "value", "sinks")


def gradients(function: Any, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    """The result and the gradients of a sum of it, whose weights are alternating, by query, key, value and sinks."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    query, key, value, *sinks = leaves
    result = function(query, key, value, sinks=sinks[0] if sinks else None, **options)
    weights = normal(*result.shape, seed=9).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, weights)]


def check(*tensors: Tensor, **options: Any) -> None:
    config = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    with interpreted(forward), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attention_backward_config", lambda *sizes: config)
        found = gradients(kernels.attention_with_gradient, tensors, options)
    eager = gradients(REFERENCE, tensors, options)
    wide = {name: widen(option) for name, option in options.items()}
    truth = gradients(REFERENCE, tuple(map(widen, tensors)), wide)
    size = max(tensor.abs().max() for tensor in truth)
    for name, *three in zip(("result", *NAMES), found, eager, truth, strict=False):
        if three[2].abs().max() < 1e-9 * size:  # where each row sees one key: the reference's gradient is exactly 0
            assert three[0].abs().max() < 1e-6 * size, name
        else:
            comparison = compare(*([tensor] for tensor in three), [name])
            assert comparison.equal, comparison.reasons


@settings(max_examples=20)
@given(data=st.data())
def test_it_is_the_gradient_of_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    batch, groups, repeat = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 3)]))
    num_queries, num_keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dims = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    offsets = st.none() | st.integers(-8, 24)
    sinks = (normal(groups * repeat, dtype=dtype),) if draw(st.booleans()) else ()
    mask = padded(batch, num_keys, draw(st.integers(0, 9)), draw(st.integers(0, 40)))
    check(
        *inputs(num_queries, num_keys, (groups * repeat, groups), dims, batch, dtype),
        *sinks,
        key_mask=mask if draw(st.booleans()) else None,
        left=draw(offsets),
        right=draw(offsets),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        scale=draw(st.sampled_from([None, 0.3])),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_causal(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(*inputs(45, 45, heads, batch=1, dtype=dtype), right=0)


@pytest.mark.parametrize(
    "bias",
    [
        normal(1, 2, 20, 37),
        normal(20, 37) > 0,
        normal(2, 1, 1, 37).masked_fill(normal(2, 1, 1, 37, seed=1) > 0, -math.inf),
        torch.zeros(20, 37).index_fill(0, torch.tensor([3]), LOWEST),
    ],
    ids=["added", "boolean", "-inf", "lowest"],
)  # fmt: skip
def test_a_bias_that_needs_no_gradient(bias: Tensor) -> None:
    check(*inputs(20, 37), bias=bias)


def test_layouts() -> None:
    tensors = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(20, 37, (4, 2)))
    check(*tensors, right=17)


def test_blocks_of_padding_are_not_read() -> None:
    tensors, mask = inputs(20, 100), padded(2, 100, 20, 30)
    check(*tensors, key_mask=mask)
    tensors[2][0, :, :16] = tensors[2][0, :, 80:] = torch.nan
    config = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    with interpreted(forward), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attention_backward_config", lambda *sizes: config)
        found = gradients(kernels.attention_with_gradient, tensors, {"key_mask": mask})
    for tensor in found:
        assert torch.isfinite(tensor).all()


def test_sizes_of_zero() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in inputs(5, 7))
    found = kernels.attention_with_gradient(query, key[:, :, :0], value[:, :, :0])
    found.sum().backward()
    assert not query.grad.any()


def test_what_has_no_kernel_is_refused() -> None:
    query, key, value = inputs(5, 7)
    with pytest.raises(ValueError, match="the bias of attention needs a gradient"):
        kernels.attention_with_gradient(query, key, value, bias=torch.zeros(7, requires_grad=True))
    with pytest.raises(ValueError, match="empty='zeros', found 'mean'"):
        kernels.attention_with_gradient(query, key, value, empty="mean")
