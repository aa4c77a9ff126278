"""Moving outliers from activations to weights."""

from __future__ import annotations

import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.quantization.smooth import smooth_scale


def test_half_way_makes_both_sides_alike() -> None:
    top = torch.tensor([1.0, 100.0, 4.0])
    weights = [torch.tensor([[1.0, -0.5, 0.25], [0.5, 1.0, 0.0]]), torch.tensor([[-4.0, 0.0, 1.0]])]
    scale = smooth_scale(top, weights, 0.5)
    columns = torch.tensor([4.0, 1.0, 1.0])  # the largest of all rows of all weights
    ratio = (top / scale) / (columns * scale)
    torch.testing.assert_close(ratio, ratio[:1].expand(3))


def test_all_to_the_weights() -> None:
    scale = smooth_scale(torch.tensor([1.0, 100.0, 10.0]), [torch.ones(2, 3)], 1.0)
    torch.testing.assert_close(scale, torch.tensor([0.1, 10.0, 1.0]))


def test_all_to_the_activations() -> None:
    scale = smooth_scale(torch.ones(3), [torch.tensor([[1.0, 100.0, 10.0]])], 0.0)
    torch.testing.assert_close(scale, torch.tensor([10.0, 0.1, 1.0]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_geometric_mean_is_one(alpha: float) -> None:
    scale = smooth_scale(normal(20).abs(), [normal(5, 20)], alpha)
    torch.testing.assert_close(scale.log().mean(), torch.tensor(0.0))


def test_zeros_are_taken_for_1e_minus_5() -> None:
    top, weight = torch.tensor([0.0, 1e-5]), torch.tensor([[1e-5, 0.0]])
    torch.testing.assert_close(smooth_scale(top, [weight], 0.5), torch.ones(2))


@pytest.mark.parametrize(
    ("top", "weights", "alpha", "problem"),
    [
        (torch.ones(3), [torch.ones(2, 3)], 1.5, "alpha is 1.5, expected 0 to 1"),
        (torch.ones(3), [], 0.5, "expected one or more"),
        (torch.ones(3), [torch.ones(2, 4)], 0.5, r"weights are \[\[2, 4\]\]"),
        (torch.tensor([torch.nan]), [torch.ones(2, 1)], 0.5, "NaN, infinity or negative"),
        (torch.tensor([-1.0]), [torch.ones(2, 1)], 0.5, "NaN, infinity or negative"),
        (torch.ones(1), [torch.ones(2, 1) * torch.inf], 0.5, "NaN, infinity or negative"),
    ],
)
def test_statistics_that_do_not_fit_are_an_error(
    top: Tensor, weights: list[Tensor], alpha: float, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        smooth_scale(top, weights, alpha)
