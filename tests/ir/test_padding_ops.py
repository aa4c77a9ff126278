"""Packed tokens: leaving padding out and back, and attention of one sample after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import normal, program
from torch import Tensor

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.graph import shape, size_text
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.padding import pack_tokens, packed_attention, real_tokens, unpack_tokens

HOLES = ("xxxx.", ".x..x", ".....", "xxxxx")
MASKS = {"holes": HOLES, "none": ("xx", "xx"), "all": ("...", "..."), "one": ("x",), "one of two": (".x",)}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_the_places_of_tokens() -> None:
    assert real_tokens(mask(".x", "x.", "..")).tolist() == [1, 2]


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_tokens_come_back_and_padding_is_zero(rows: tuple[str, ...]) -> None:
    key_mask = mask(*rows)
    x = normal(*key_mask.shape, 3, 2).masked_fill(~key_mask[..., None, None], torch.nan)
    packed = pack_tokens(x, real_tokens(key_mask))
    assert torch.equal(packed, x[key_mask][None])
    assert torch.equal(unpack_tokens(packed, key_mask), x.nan_to_num(0.0))


def test_token_ids_are_packed_as_well() -> None:
    key_mask = mask(".x", "xx")
    packed = pack_tokens(torch.tensor([[0, 5], [6, 7]]), real_tokens(key_mask))
    assert packed.tolist() == [[5, 6, 7]]
    assert unpack_tokens(packed, key_mask).tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.1, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_each_sample_attends_to_itself_alone(rows: tuple[str, ...], groups: int, options: dict[str, Any]) -> None:
    key_mask = mask(*rows)
    count = int(key_mask.sum())
    query, key, value = (normal(1, heads, count, 8, seed=heads) for heads in (4, groups, groups))
    found = packed_attention(query, key, value, key_mask, **options)
    start = 0
    for size in key_mask.sum(1).tolist():
        own = slice(start, start + size)
        kept = {name: option for name, option in options.items() if name != "causal"}
        right = 0 if "causal" in options else None
        alone = attention(query[:, :, own], key[:, :, own], value[:, :, own], right=right, **kept)
        torch.testing.assert_close(found[:, :, own], alone, rtol=1e-5, atol=1e-6)
        start += size
    assert found.shape == (1, 4, count, 8) and start == count


def test_a_gradient_reaches_tokens_and_no_padding() -> None:
    key_mask = mask("xx.", ".x.")
    x = normal(2, 3, 8).requires_grad_()
    packed = pack_tokens(x, real_tokens(key_mask))
    row = packed.unflatten(-1, (2, 4)).transpose(1, 2)
    unpack_tokens(packed_attention(row, row, row, key_mask).transpose(1, 2).flatten(2), key_mask).sum().backward()
    assert x.grad is not None and torch.equal(x.grad.abs().sum(-1) > 0, key_mask)


def test_a_trace_has_a_size_that_depends_on_the_mask() -> None:
    def function(m: Any, x: Tensor, key_mask: Tensor) -> Tensor:
        row = pack_tokens(x, real_tokens(key_mask)).unflatten(-1, (2, 4)).transpose(1, 2)
        return unpack_tokens(packed_attention(row, row, row, key_mask).transpose(1, 2).flatten(2), key_mask)

    found = program(function, normal(2, 3, 8), mask("xx.", ".x."))
    (row,), (back,) = found.calls(packed_attention), found.calls(unpack_tokens)
    assert [size_text(size, found.symbols) for size in shape(row)] == ["1", "2", "u0", "4"]
    assert [size_text(size, found.symbols) for size in shape(back)] == ["d2", "d3", "8"]  # those of the mask
    x, key_mask = normal(1, 4, 8), mask("x.xx")
    assert torch.equal(found.run([x, key_mask])[0], function(None, x, key_mask))
