"""Reductions, softmax and norms beside PyTorch's own, in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from kernels_agree import agree, calling, placed
from torch import Tensor

from fxpress.backends.triton import partition
from fxpress.backends.triton.lowerings.reductions import REDUCED
from fxpress.backends.triton.runner import Loaded
from fxpress.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm

aten = torch.ops.aten
x = normal(3, 5, 33)
half = normal(3, 5, 33, dtype=torch.float16)
whole = torch.randint(-9, 9, (3, 33), generator=torch.Generator().manual_seed(0))
endless = torch.tensor([[1.0, float("inf"), 2.0], [float("nan"), 1.0, 2.0], [-float("inf")] * 3])
weight, bias = normal(33, seed=1), normal(33, seed=2)

ONE_CALL: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.sum.default, (x,), {}),
    (aten.sum.dim_IntList, (x, [-1]), {}),
    (aten.sum.dim_IntList, (x, [1], True), {}),
    (aten.sum.dim_IntList, (x, [0, 2]), {}),
    (aten.sum.dim_IntList, (whole, [1]), {}),
    (aten.sum.dim_IntList, (whole > 0, [1]), {}),
    (aten.sum.dim_IntList, (half, [-1]), {"dtype": torch.float32}),
    (aten.mean.default, (x,), {}),
    (aten.mean.dim, (x, [-1], True), {}),
    (aten.mean.dim, (half, [1]), {}),
    (aten.amax.default, (x, [-1]), {}),
    (aten.amax.default, (endless, [-1], True), {}),
    (aten.amin.default, (whole, [-1]), {}),
    (aten.amax.default, (-whole.to(torch.int8).abs() - 1, [-1]), {}),  # all below zero
    (aten.max.default, (x,), {}),
    (aten.min.default, (endless,), {}),
    (aten.any.default, (whole > 8,), {}),
    (aten.any.dim, (whole > 7, 1), {}),
    (aten.any.dims, (x > 2, [0, 1]), {}),
    (aten.all.default, (whole > -10,), {}),
    (aten.all.dim, (whole > -9, 1, True), {}),
    (aten.all.dims, (x > -2, [1, 2]), {}),
    (aten.var.correction, (x, [-1]), {"correction": 0, "keepdim": True}),
    (aten.var.correction, (x, [-1]), {}),
    (aten.var.dim, (x + 100.0, [-1], False), {}),
    (aten.std.correction, (x, [-1]), {}),
    (aten.std.dim, (x, [-1], True, True), {}),
    (aten.softmax.int, (x, -1), {}),
    (aten.softmax.int, (x, 1), {}),
    (aten.softmax.int, (half * 20, -1), {}),
    (aten.softmax.int, (half, -1, torch.float32), {}),
    (aten.softmax.int, (endless, -1), {}),
    (aten._softmax.default, (x, -1, False), {}),
    (aten.log_softmax.int, (x * 5, -1), {}),
    (aten._log_softmax.default, (x, 1, False), {}),
    (aten.logsumexp.default, (x * 5, [-1]), {}),
    (aten.logsumexp.default, (endless, [-1], True), {}),
    (aten.logsumexp.default, (whole, [-1]), {}),
    (aten.cumsum.default, (x, -1), {}),
    (aten.cumsum.default, (whole, 1), {}),
    (aten.layer_norm.default, (x, [33], weight, bias), {}),
    (aten.layer_norm.default, (x, [5, 33]), {}),
    (aten.layer_norm.default, (half, [33], weight.half(), bias.half(), 1e-3), {}),
    (aten.layer_norm.default, (x + 1000.0, [33], weight, None), {}),  # squares alone would cancel
    (rms_norm, (x, weight, 1e-6), {}),
    (rms_norm, (half, weight.half(), 1e-6), {}),
    (rms_norm, (half, weight, 1e-6), {}),
    (rms_norm, (x, None, 1e-2), {}),
    (aten.rms_norm.default, (x, [33], weight, 1e-5), {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "args", "options"), ONE_CALL, ids=[f"{number}-{case[0]}" for number, case in enumerate(ONE_CALL)]
)
def test_equals_eager(target: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    runner = agree(*calling(target, *args, **options))
    assert not runner.generated.externs


@pytest.mark.parametrize(
    ("target", "args", "options"),
    [case for case in ONE_CALL if "cumsum" not in str(case[0])],
    ids=[f"{number}-{case[0]}" for number, case in enumerate(ONE_CALL) if "cumsum" not in str(case[0])],
)
def test_rows_of_several_tiles(
    target: Any, args: tuple[Any, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a row is too long for one tile: here no row is short enough, and a tile has 8 columns."""
    monkeypatch.setattr(partition, "ONE_TILE", 0)
    runner = agree(*calling(target, *args, **options))
    source = runner.source.replace("LOOP = 4096", "LOOP = 8")
    assert "for start in range(0, " in source and source != runner.source
    traced, tensors = calling(target, *args, **options)
    with np.errstate(all="ignore"):
        found = Loaded(source).module.forward(placed(tensors), {})[0].cpu()
    torch.testing.assert_close(found, traced.run(tensors)[0], rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (2, 65), (0, 5)])
def test_sizes_that_vary(size: tuple[int, int]) -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return F.softmax(x * 2.0, -1) * x.shape[1]

    agree(program(function, normal(3, 6)), [normal(*size)])


def test_a_residual_and_its_norm_are_one_kernel() -> None:
    for target, given in ((add_layer_norm, (weight, bias, 1e-5)), (add_rms_norm, (weight, 1e-5))):

        def function(self: Any, x: Tensor, y: Tensor, _target: Any = target, _given: Any = given) -> list[Tensor]:
            return list(_target(x, y, *_given))

        runner = agree(program(function, x, normal(3, 5, 33, seed=4)), [x, normal(3, 5, 33, seed=5)])
        assert len(runner.generated.groups) == 1


def test_what_a_row_gives_may_be_a_result_of_its_own() -> None:
    def function(self: Any, x: Tensor) -> list[Tensor]:
        top = x.amax(-1)
        return [top, x - top.unsqueeze(-1), x.sum(-1, keepdim=True)]

    runner = agree(program(function, x), [x])
    assert len(runner.generated.groups) == 1


def test_reductions_of_different_rows_are_two_kernels() -> None:
    runner = agree(program(lambda self, x: x.sum(1, keepdim=True) + x.sum(2, keepdim=True), x), [x])
    assert len(runner.generated.groups) == 2


def test_every_reduction_is_tried() -> None:
    assert REDUCED.keys() - {case[0] for case in ONE_CALL} == set()
