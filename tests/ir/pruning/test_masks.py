"""Masks that are multiplied with weights: put, found, trained with, folded."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import inputs, normal, program
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxpress.ir.graph import Program
from fxpress.ir.printer import print_program
from fxpress.ir.pruning.masks import fold, is_masked, masked, put, stored
from fxpress.ir.verify import verify

aten = torch.ops.aten
ROWS, COLUMNS = 3, 4
W, B, X = normal(ROWS, COLUMNS), normal(ROWS, seed=1), normal(2, COLUMNS, seed=2)
MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
OTHER = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


def linear() -> Program:
    return program(lambda m, x: F.linear(x, m.w, m.b), X, w=W, b=B)


@functools.cache
def unmasked() -> Program:
    """`linear`; not to be changed, nor its weights."""
    return linear()


class Tied(nn.Module):
    """An embedding whose weight is that of the layer that makes the outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, COLUMNS)
        self.head = nn.Linear(COLUMNS, ROWS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(ids))
        return found


def weight(traced: Program, name: str = "w") -> fx.Node:
    return next(node for node in traced.graph.nodes if node.op == "get_attr" and node.target == name)


def with_mask(mask: Tensor, name: str = "w") -> Program:
    """`linear` with one weight masked."""
    traced = linear()
    put(traced, weight(traced, name), mask)
    traced.clean()
    verify(traced)
    return traced


# --- put -------------------------------------------------------------------------------------------------------


def test_what_read_the_weight_reads_its_product_with_the_mask() -> None:
    lines = print_program(with_mask(MASK)).splitlines()
    assert lines[1:3] == [
        "  %mul: f32[3, 4] = aten.mul.Tensor(@w, @w_mask)",
        "  %linear: f32[d0, 3] = aten.linear(%x, %mul, @b)",
    ]


def test_a_masked_program_computes_with_the_masked_weight() -> None:
    assert torch.equal(with_mask(MASK).run([X])[0], F.linear(X, W * MASK, B))


def test_the_weight_itself_stays_as_it_was() -> None:
    assert torch.equal(with_mask(MASK).module.w, W)


def test_the_mask_is_a_buffer_of_zeros_and_ones_of_the_weights_type() -> None:
    traced = program(lambda m, x: F.linear(x, m.w), X.half(), w=W.half())
    put(traced, weight(traced), MASK)
    assert [name for name, _ in traced.module.named_buffers()] == ["w_mask"]
    assert traced.module.w_mask.dtype == torch.float16
    assert torch.equal(traced.module.w_mask.bool(), MASK)


@pytest.mark.parametrize("mask", [MASK[:, :1], MASK[:1], MASK[0]])
def test_a_mask_of_rows_or_columns_is_spread(mask: Tensor) -> None:
    assert torch.equal(with_mask(mask).module.w_mask, mask.float().expand(ROWS, COLUMNS))


def test_a_bias_can_be_masked() -> None:
    mask = torch.tensor([True, False, True])
    assert torch.equal(with_mask(mask, "b").run([X])[0], F.linear(X, W, B * mask))


def test_all_readers_of_a_tied_weight_share_one_mask() -> None:
    traced = program(Tied(), torch.tensor([[0, 2], [1, 1]]))
    put(traced, weight(traced, "embed.weight"), MASK)
    (found,) = masked(traced)
    embedding, head = traced.calls(aten.embedding.default, aten.linear.default)
    assert embedding.args[0] is head.args[1] is found.product
    verify(traced)


def test_masking_twice_multiplies() -> None:
    traced = with_mask(MASK)
    put(traced, weight(traced), OTHER)
    (found,) = masked(traced)
    assert torch.equal(traced.tensor(found.mask).bool(), MASK & OTHER)
    assert torch.equal(traced.run([X])[0], F.linear(X, W * (MASK & OTHER), B))


def test_a_copy_made_before_a_second_mask_keeps_the_first() -> None:
    traced = with_mask(MASK)
    copy = traced.copy()
    put(traced, weight(traced), OTHER)
    assert torch.equal(copy.module.w_mask.bool(), MASK)


def test_a_name_that_is_taken_is_left_to_its_owner() -> None:
    given = {"w": W, "w_mask": normal(ROWS, seed=3)}
    traced = program(lambda m, x: F.linear(x, m.w, m.w_mask), X, **given)
    put(traced, weight(traced), MASK)
    (found,) = masked(traced)
    assert found.mask.target == "w_mask_1"
    assert torch.equal(traced.module.w_mask, given["w_mask"])


# --- masked, is_masked, stored ---------------------------------------------------------------------------------


def test_masked_weights_are_found_in_the_order_of_their_products() -> None:
    """The last one put stands first."""
    traced = program(lambda m, x: F.linear(F.linear(x, m.w), m.v), X, w=W, v=normal(2, ROWS))
    for name in "wv":
        put(traced, weight(traced, name), torch.ones_like(traced.tensor(weight(traced, name))))
    assert [(item.weight.target, item.mask.target) for item in masked(traced)] == [("v", "v_mask"), ("w", "w_mask")]


@pytest.mark.parametrize(
    "computed",
    [lambda m: m.w * 2, lambda m: m.w * m.v, lambda m: m.w * m.w_mask, lambda m: m.w * m.w_mask.relu()],
    ids=["number", "another_weight", "mask_of_the_model", "computed_mask"],
)
def test_products_of_the_models_own_are_no_masked_weights(computed: Any) -> None:
    traced = program(lambda m, x: F.linear(x, computed(m)), X, w=W, v=normal(ROWS, COLUMNS), w_mask=MASK.float())
    (layer,) = traced.calls(aten.linear.default)
    assert not is_masked(layer.args[1])
    assert masked(traced) == []


def test_stored_is_the_weight_masked_or_not() -> None:
    plain, thinned = linear(), with_mask(MASK)
    for traced in (plain, thinned):
        (layer,) = traced.calls(aten.linear.default)
        assert stored(layer.args[1]) is weight(traced)


def test_stored_is_nothing_for_what_is_computed_or_given() -> None:
    traced = program(lambda m, x: F.linear(x, m.w * 2), X, w=W)
    (layer,) = traced.calls(aten.linear.default)
    assert [stored(layer.args[0]), stored(layer.args[1]), stored(None), stored(1.0)] == [None] * 4


def test_a_product_of_the_models_own_is_not_folded() -> None:
    """What else reads the weight reads it without the mask."""
    traced = program(lambda m, x: F.linear(x, m.w * m.w_mask) + F.linear(x, m.w), X, w=W, w_mask=MASK.float())
    text = print_program(traced)
    assert fold(traced) == 0
    assert print_program(traced) == text


# --- training --------------------------------------------------------------------------------------------------


def test_masked_numbers_have_no_gradient() -> None:
    traced = with_mask(MASK)
    traced.run([X])[0].square().sum().backward()
    grad = traced.module.w.grad
    assert torch.equal(grad != 0, MASK)


def test_masks_are_not_trained() -> None:
    assert {name for name, _ in with_mask(MASK).module.named_parameters()} == {"w", "b"}


def test_zeros_survive_training() -> None:
    traced = with_mask(MASK)
    optimizer = torch.optim.AdamW(traced.module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (traced.run([X])[0] - 1).square().sum().backward()
        optimizer.step()
    fold(traced)
    assert torch.equal(traced.module.w != 0, MASK)
    assert not torch.isclose(traced.module.w, W)[MASK].any()


# --- fold ------------------------------------------------------------------------------------------------------


def test_folding_leaves_the_program_as_it_was_before_the_mask() -> None:
    traced = with_mask(MASK)
    assert fold(traced) == 1
    verify(traced)
    assert print_program(traced) == print_program(linear())
    assert {name for name, _ in traced.module.named_parameters()} == {"w", "b"}
    assert list(traced.module.named_buffers()) == []


def test_folding_does_not_change_the_result() -> None:
    traced = with_mask(MASK)
    expected = [traced.run(inputs(traced, base))[0] for base in (3, 6)]
    fold(traced)
    for base, before in zip((3, 6), expected, strict=True):
        assert torch.equal(traced.run(inputs(traced, base))[0], before)


@given(st.lists(st.booleans(), min_size=ROWS * COLUMNS, max_size=ROWS * COLUMNS))
def test_a_folded_weight_is_exact(bits: list[bool]) -> None:
    """What stays is the very number, what goes is 0."""
    keep = torch.tensor(bits).reshape(ROWS, COLUMNS)
    traced = unmasked().copy()
    put(traced, weight(traced), keep)
    fold(traced)
    assert torch.equal(traced.module.w, torch.where(keep, W, 0))


def test_folding_again_does_nothing() -> None:
    traced = with_mask(MASK)
    fold(traced)
    text, before = print_program(traced), traced.module.w.clone()
    assert fold(traced) == 0
    assert print_program(traced) == text
    assert torch.equal(traced.module.w, before)


def test_folding_counts_weights_and_not_readers() -> None:
    traced = program(Tied(), torch.tensor([[0, 2], [1, 1]]))
    put(traced, weight(traced, "embed.weight"), MASK)
    assert fold(traced) == 1
    verify(traced)
    ids = torch.tensor([[2, 1, 0]])
    table = Tied().embed.weight * MASK
    assert torch.equal(traced.run([ids])[0], F.linear(F.embedding(ids, table), table))


def test_folding_a_copy_leaves_the_masked_program() -> None:
    traced = with_mask(MASK)
    assert fold(traced.copy()) == 1
    assert torch.equal(traced.module.w, W)
    assert len(masked(traced)) == 1
