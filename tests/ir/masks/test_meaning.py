"""What masks mean: as arguments of attention, as answers to a kernel's questions, or why they stay tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import assert_equal, before_after, module, normal, program, reasons, rewritten
from torch import Tensor, fx

from fxpress.ir.graph import Program, arguments, shape
from fxpress.ir.masks.meaning import Meaning, read
from fxpress.ir.masks.reader import Reader
from fxpress.ir.ops.attention import attention
from fxpress.ir.pattern import Refusal
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize

LOWEST = torch.finfo(torch.float32).min


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2])[:, None]


def columns(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2])[None, :]


def padded(pad: Tensor) -> Tensor:
    return pad.bool()[:, None, None, :]


def causal(x: Tensor) -> Tensor:
    return columns(x) <= rows(x)


def slopes() -> Tensor:
    """Those of ALiBi."""
    return torch.pow(0.5, torch.arange(1, 3))[:, None, None]


def any_bias(x: Tensor) -> Tensor:
    """A user's numbers for each key, among which a mask may be."""
    return x[..., 0][:, :, None]


def masked(mask: Callable[[Any, Tensor, Tensor], Tensor], **options: Any) -> Program:
    """Attention of x [B, 2, N, 4] to itself under mask(self, x, pad), pad [B, N]."""

    def forward(self: Any, x: Tensor, pad: Tensor) -> Tensor:
        return attention(x, x, x, mask(self, x, pad), **options)

    return program(module(forward, bias=normal(1, 2, 1, 1)), normal(3, 2, 6, 4), torch.ones(3, 6, dtype=torch.long))


def tensors(batch: int, length: int, pad: list[int]) -> list[Tensor]:
    """x and a mask that hides as many keys of each row as `pad` says: on the right, if negative on the left."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, count in zip(mask, pad, strict=True):
        row[length - count :] = 0
        row[: max(-count, 0)] = 0
    return [normal(batch, 2, length, 4), mask]


INPUTS = (tensors(2, 6, [0, 2]), tensors(3, 9, [9, -3, 0]), tensors(1, 1, [0]), tensors(1, 5, [-2]))

MEANINGS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "padding": (lambda m, x, pad: padded(pad), {"key_mask": True}),
    "causal": (lambda m, x, pad: causal(x), {"right": 0}),
    "causal_and_padding": (lambda m, x, pad: causal(x) & padded(pad), {"key_mask": True, "right": 0}),
    "causal_window": (lambda m, x, pad: causal(x) & (rows(x) - columns(x) < 3), {"left": 2, "right": 0}),
    "window_and_padding": (
        lambda m, x, pad: ((rows(x) - columns(x)).abs() <= 2) & padded(pad),
        {"key_mask": True, "left": 2, "right": 2},
    ),
    "two_windows": (
        lambda m, x, pad: ((rows(x) - columns(x)).abs() <= 2) & (columns(x) <= rows(x) + 1),
        {"left": 2, "right": 1},
    ),
    "last_keys_hidden": (lambda m, x, pad: columns(x) < x.shape[2] - 1, {"key_mask": True}),
    "nothing_hidden": (lambda m, x, pad: columns(x) >= 0, {}),
    "nothing_added": (lambda m, x, pad: torch.zeros(x.shape[2], x.shape[2]), {}),
    "infinite": (
        lambda m, x, pad: torch.zeros(x.shape[2], x.shape[2]).masked_fill(~causal(x) | ~padded(pad), -math.inf),
        {"key_mask": True, "right": 0},
    ),
    "lowest": (lambda m, x, pad: torch.where(padded(pad), 0.0, LOWEST), {"key_mask": True, "empty": "mean"}),
    "biased": (
        lambda m, x, pad: torch.where(padded(pad), m.bias, LOWEST),
        {"key_mask": True, "bias": True, "empty": "mean"},
    ),
    "biased_by_slopes": (
        lambda m, x, pad: torch.where(causal(x), slopes() * (columns(x) - rows(x)), LOWEST),
        {"right": 0, "bias": True, "empty": "mean"},
    ),
    "infinite_with_any_bias": (
        lambda m, x, pad: torch.where(causal(x), any_bias(x), -math.inf),
        {"right": 0, "bias": True},
    ),
    "added_to_a_bias": (
        lambda m, x, pad: m.bias + torch.where(padded(pad), 0.0, LOWEST),
        {"key_mask": True, "bias": True, "empty": "mean"},
    ),
    "count_of_keys": (
        lambda m, x, pad: (torch.arange(x.shape[2]) < pad.sum(-1, keepdim=True))[:, None, None, :],
        {"key_mask": True},
    ),
}


def attention_of(traced: Program) -> fx.Node:
    (node,) = traced.calls(attention)
    return node


@pytest.mark.parametrize("name", MEANINGS)
def test_arguments(name: str, golden: Callable[[str], None]) -> None:
    mask, expected = MEANINGS[name]
    before = masked(mask)
    after, result = rewritten(before, Canonicalize())
    for given in INPUTS:
        assert_equal(before, after, given)
    found = arguments(attention_of(after))
    said = {key: value for key, value in found.items() if key in ("bias", "key_mask", "left", "right", "empty")}
    said = {key: True if isinstance(value, fx.Node) else value for key, value in said.items()}
    assert said == {"bias": None, "key_mask": None, "left": None, "right": None, "empty": "zeros"} | expected
    golden(before_after(before, after, result))


def test_keys_and_queries_of_other_lengths() -> None:
    """A cache before the queries: causal attention is aligned at the bottom right, by sizes of the inputs."""

    def forward(self: Any, x: Tensor, past: Tensor) -> Tensor:
        keys = torch.cat([past, x], 2)
        row = torch.arange(x.shape[2])[:, None] + past.shape[2]
        return attention(x, keys, keys, torch.arange(keys.shape[2])[None, :] <= row)

    before = program(module(forward), normal(2, 2, 5, 4), normal(2, 2, 7, 4))
    after, _ = rewritten(before, Canonicalize())
    for length, past in ((5, 7), (3, 11)):
        assert_equal(before, after, [normal(2, 2, length, 4), normal(2, 2, past, 4)])
    right = arguments(attention_of(after))["right"]
    assert str(right.meta["val"]) == str(shape(after.graph.find_nodes(op="placeholder")[1])[2])


def test_attentions_share_their_padding() -> None:
    def forward(self: Any, x: Tensor, pad: Tensor) -> Tensor:
        once = attention(x, x, x, padded(pad))
        return attention(once, once, once, padded(pad) & causal(x))

    after, _ = rewritten(program(module(forward), *tensors(3, 6, [0, 0, 2])), Canonicalize())
    first, second = (arguments(node)["key_mask"] for node in after.calls(attention))
    assert first is second


TABLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "first_keys": lambda table, length: table[..., :length],
    "last_keys_as_in_mpt": lambda table, length: table[..., max(0, 16 - length) :],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bias_of_the_length_at_hand_is_the_slice(name: str) -> None:
    """The table that a bias is sliced from holds the same numbers at the same indices, and is larger."""

    def forward(self: Any, x: Tensor, pad: Tensor) -> Tensor:
        return attention(x, x, x, torch.where(padded(pad), TABLES[name](self.table, x.shape[2]), LOWEST))

    before = program(module(forward, table=normal(1, 2, 1, 16)), *tensors(3, 6, [0, 0, 2]))
    after, result = rewritten(before, Canonicalize())
    assert arguments(attention_of(after))["key_mask"] is not None, reasons(result, "mask")
    for given in INPUTS:
        assert_equal(before, after, given)


def halved(x: Tensor) -> Tensor:
    return columns(x) < x.shape[2] // 2


REFUSALS: dict[str, tuple[Callable[[], Program], str]] = {
    "either": (
        lambda: masked(lambda m, x, pad: causal(x) | padded(pad)),
        "no argument says j <= i | pad[b, j] != 0; the mask is (j <= i | pad[b, j] != 0)",
    ),
    "blocks": (
        lambda: masked(lambda m, x, pad: (rows(x) // 4 == columns(x) // 4) & causal(x)),
        "no argument says (i) // 4 == (j) // 4; the mask is j <= i & (i) // 4 == (j) // 4",
    ),
    "padded_queries": (
        lambda: masked(lambda m, x, pad: pad.bool()[:, None, :, None]),
        "no argument says pad[b, i] != 0; the mask is pad[b, i] != 0",
    ),
    "small_number": (
        lambda: masked(lambda m, x, pad: torch.where(padded(pad), 0.0, -1e4)),
        "hidden keys get -10000.0, which scores show through in a row without visible keys",
    ),
    "two_numbers": (
        lambda: masked(lambda m, x, pad: torch.where(padded(pad), torch.where(causal(x), 0.0, -1e9), LOWEST)),
        f"hidden keys get -1000000000.0 or {LOWEST}",
    ),
    "added_twice": (
        lambda: masked(lambda m, x, pad: torch.where(padded(pad), 0.0, LOWEST) + torch.where(causal(x), 0.0, LOWEST)),
        f"hidden keys get -inf or {LOWEST}",
    ),
    "any_bias": (
        lambda: masked(lambda m, x, pad: torch.where(causal(x), any_bias(x), LOWEST)),
        f"x[b, h, j, 0] may itself be as low as the {LOWEST} that hidden keys get",
    ),
    "computed_size": (lambda: masked(lambda m, x, pad: halved(x)), "the size (N//2) is that of no input"),
    "nothing_of_one": (
        lambda: masked(lambda m, x, pad: causal(x) | (torch.zeros_like(columns(x)) < x.shape[2] // 2)),
        "no argument says 1 <= (N//2) | j <= i; the mask is (1 <= (N//2) | j <= i)",
    ),
    "second_mask": (
        lambda: masked(lambda m, x, pad: padded(pad), right=0),
        "the attention has a mask besides its bias",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    build, reason = REFUSALS[name]
    before = build()
    after, result = rewritten(before, Canonicalize())
    assert [re.sub(r"\bs\d+\b", "N", found) for found in reasons(result, "mask")] == [reason]
    assert isinstance(arguments(attention_of(after))["bias"], fx.Node)


def test_scores_with_a_lowest_number_take_any_bias() -> None:
    """A key that the bias hides then has the same number as one that the mask hides."""
    before = masked(lambda m, x, pad: torch.where(causal(x), any_bias(x), LOWEST), empty="mean")
    after, result = rewritten(before, Canonicalize())
    assert arguments(attention_of(after))["right"] == 0, reasons(result, "mask")
    x, pad = tensors(2, 6, [0, 0])
    x[0, :, :2, 0], x[1, :, :2, 0] = LOWEST, -math.inf
    assert_equal(before, after, [x, pad])


def test_budget() -> None:
    before, _ = rewritten(masked(lambda m, x, pad: padded(pad)), Canonicalize(), Context(max_rewrites=0))
    assert isinstance(arguments(attention_of(before))["bias"], fx.Node)


# --- questions -------------------------------------------------------------------------------------------------


def meaning(mask: Callable[[Any, Tensor, Tensor], Tensor]) -> Meaning:
    traced = program(module(mask), *tensors(3, 6, [0, 0, 2]))
    Canonicalize().apply(traced, Context())
    x = traced.graph.find_nodes(op="placeholder")[0]
    (result,) = next(iter(reversed(traced.graph.nodes))).args[0]
    found = read(Reader(traced, (*shape(x)[:3], shape(x)[2])).mask(result))
    assert not isinstance(found, Refusal)
    return found


def test_is_it_key_padding() -> None:
    assert meaning(lambda m, x, pad: padded(pad)).is_key_padding
    assert not meaning(lambda m, x, pad: padded(pad) & causal(x)).is_key_padding


def test_is_it_causal() -> None:
    assert meaning(lambda m, x, pad: padded(pad) & causal(x)).is_causal
    assert not meaning(lambda m, x, pad: columns(x) <= rows(x) + 1).is_causal


def test_how_wide_is_the_window() -> None:
    assert meaning(lambda m, x, pad: (rows(x) - columns(x)).abs() <= 3).window == 7
    assert meaning(lambda m, x, pad: causal(x)).window is None


def test_how_large_are_the_blocks() -> None:
    assert meaning(lambda m, x, pad: (rows(x) // 4 == columns(x) // 4) & causal(x)).block == 4
    assert meaning(lambda m, x, pad: rows(x) // 4 == columns(x) // 3).block is None
    assert meaning(lambda m, x, pad: causal(x)).block is None


def test_does_the_bias_depend_on_positions_alone() -> None:
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    assert meaning(lambda m, x, pad: (columns(x) - rows(x)).float() * slopes).is_position_bias
    assert not meaning(lambda m, x, pad: (columns(x) + rows(x)).float() * slopes).is_position_bias
    assert not meaning(lambda m, x, pad: padded(pad)).is_position_bias
