"""2:4 sparse weights: how they are packed, and the linear layer that reads them so."""

from __future__ import annotations

import pytest
import torch
from build import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fxpress.ir.ops.sparse import pack_sparse24, sparse24_linear, sparse24_misfit, unpack_sparse24


def test_packed_by_hand() -> None:
    weight = torch.tensor(
        [[0, 5, 0, 7, 1, 2, 0, 0, 0, 0, 9, 0], [0, 0, 0, 0, 0, 0, 3, 4, 6, 0, 0, 8]], dtype=torch.half
    )
    values, positions = pack_sparse24(weight)
    assert values.tolist() == [[5, 7, 1, 2, 0, 9], [0, 0, 3, 4, 6, 8]]
    # Positions 1 and 3, 0 and 1; 0 (a zero that fills up) and 2; then 0 and 1, 2 and 3; 0 and 3.
    assert positions.tolist() == [[0b0100_1101, 0b1000], [0b1110_0100, 0b1100]]
    assert positions.dtype == torch.uint8


@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 2), st.integers(0, 99))
def test_what_is_packed_is_unpacked(rows: int, fours: int, kept: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, fours, 4, generator=generator).argsort(-1)
    weight = torch.where(order < kept, torch.randn(rows, fours, 4, generator=generator), 0.0).flatten(1)
    values, positions = pack_sparse24(weight)
    assert values.shape == (rows, 2 * fours) and positions.shape == (rows, -(-fours // 2))
    assert torch.equal(unpack_sparse24(values, positions), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0, -3, 0, 5]], dtype=dtype)
    assert torch.equal(unpack_sparse24(*pack_sparse24(weight)), weight)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(2, 6), "its rows have 6 numbers, no multiple of 4"),
        (torch.tensor([[0, 1, 2, 3, 0, 0, 0, 0.0]]), "3 of 4 neighbours are not zero"),
        (torch.tensor([[0, 0, 1, float("nan"), 0, 1, 1, 1.0]]), "3 of 4 neighbours are not zero"),
    ],
)
def test_what_is_not_sparse_enough_is_refused(weight: Tensor, reason: str) -> None:
    assert sparse24_misfit(weight) == reason
    with pytest.raises(ValueError, match=reason):
        pack_sparse24(weight)


def test_it_is_the_linear_layer_of_the_weight() -> None:
    weight, x, bias = torch.tensor([[0, 2.0, 0, 3, 0, 0, 4, 0]]).repeat(5, 1) * normal(5, 1), normal(2, 3, 8), normal(5)
    packed = pack_sparse24(weight)
    assert sparse24_misfit(weight) is None
    assert torch.equal(sparse24_linear(x, *packed, bias), torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(sparse24_linear(x, *packed, None, weight), torch.nn.functional.linear(x, weight))


def test_gradients_reach_the_numbers_that_are_kept() -> None:
    values, positions = pack_sparse24(torch.tensor([[0, 2.0, 0, 3]], dtype=torch.float64))
    given = (normal(3, 4).double().requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, values: sparse24_linear(x, values, positions, None), given)


def test_shapes_are_known_without_numbers() -> None:
    with FakeTensorMode():
        x, values = torch.empty(2, 3, 8), torch.empty(5, 4)
        assert sparse24_linear(x, values, torch.empty(5, 1, dtype=torch.uint8), None).shape == (2, 3, 5)
