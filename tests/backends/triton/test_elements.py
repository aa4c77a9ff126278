"""Operators that choose, make, gather, join or move elements, beside PyTorch's own, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import normal, program
from kernels_agree import agree, calling, made_of, ran
from torch import Tensor

from fxpress.backends.triton.lowerings.reductions import REDUCED
from fxpress.backends.triton.lowerings.table import VALUES
from fxpress.ir.ops.quantize import dequantize, quantize
from fxpress.ir.ops.rotary import rotary

aten = torch.ops.aten
ids = torch.tensor([[3, 0, 6, 6, 1], [2, 5, 4, 0, 0]])
flag = normal(5, 7, seed=3) > 0

ONE_CALL: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.tril.default, (normal(5, 7), 1), {}),
    (aten.triu.default, (normal(2, 5, 7), -2), {}),
    (aten.fill.Scalar, (normal(5, 7, dtype=torch.float16), 0.1), {}),
    (aten.fill.Tensor, (normal(5, 7), torch.tensor(3.0)), {}),
    (aten.where.self, (flag, normal(5, 7), normal(7)), {}),
    (aten.where.ScalarOther, (flag, normal(5, 7), float("-inf")), {}),
    (aten.where.ScalarSelf, (flag, 0.5, normal(5, 7)), {}),
    (aten.where.Scalar, (flag, 1, 0), {}),
    (aten.masked_fill.Scalar, (normal(5, 7), flag, float("-inf")), {}),
    (aten.masked_fill.Scalar, (normal(5, 7, dtype=torch.float16), flag, torch.finfo(torch.float16).min), {}),
    (aten.masked_fill.Tensor, (normal(5, 7), flag, torch.tensor(3.0)), {}),
    (aten.clamp.default, (normal(5, 7), -0.5, None), {}),
    (aten.clamp.default, (normal(5, 7), None, 0.5), {}),
    (aten.clamp.default, (torch.tensor([float("nan"), float("inf"), 1.0]), -0.5, 0.5), {}),
    (aten.clamp.default, (torch.arange(9), 2, 5), {}),
    (aten.clamp.Tensor, (normal(5, 7), normal(7) - 1, normal(7, seed=1) + 1), {}),
    (aten.nan_to_num.default, (torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]),), {}),
    (aten.nan_to_num.default, (torch.tensor([float("nan"), float("inf"), 1.0]).half(), 1.0, 2.0, None), {}),
    (aten.pow.Tensor_Scalar, (normal(9), 2), {}),
    (aten.pow.Tensor_Scalar, (normal(9), 3.0), {}),
    (aten.pow.Tensor_Scalar, (normal(9), 0), {}),
    (aten.pow.Tensor_Scalar, (normal(9).abs(), 0.5), {}),
    (aten.pow.Tensor_Scalar, (normal(9), -1), {}),
    (aten.pow.Tensor_Scalar, (normal(9).abs(), -0.5), {}),
    (aten.pow.Tensor_Scalar, (normal(9).abs(), 1.7), {}),
    (aten.pow.Tensor_Tensor, (normal(64), (normal(64, seed=1) * 3).round()), {}),
    (aten.pow.Scalar, (10000.0, normal(9)), {}),
    (aten._to_copy.default, (normal(33),), {"dtype": torch.float16}),
    (aten._to_copy.default, (normal(33) * 5,), {"dtype": torch.int64}),
    (aten._to_copy.default, (normal(33, dtype=torch.float16),), {"dtype": torch.float32}),
    (aten._to_copy.default, (torch.arange(5),), {"dtype": torch.bool}),
    (aten._to_copy.default, (flag,), {"dtype": torch.float32}),
    (aten.embedding.default, (normal(7, 9), ids), {}),
    (aten.embedding.default, (normal(7, 9, dtype=torch.float16), ids[0]), {}),
    (aten.index_select.default, (normal(3, 7, 5), 1, ids[0]), {}),
    (aten.gather.default, (normal(2, 7), 1, ids), {}),
    (aten.index.Tensor, (normal(7, 5), [ids]), {}),
    (aten.index.Tensor, (normal(7, 5), [torch.tensor([-1, 0, 2])]), {}),
    (aten.index.Tensor, (normal(2, 7, 5), [torch.arange(2)[:, None], ids]), {}),
    (aten.index.Tensor, (normal(4, 7, 5), [None, ids]), {}),
    (aten.index.Tensor, (normal(3, 4, 7), [torch.tensor([0, 2]), None, torch.tensor([6, 1])]), {}),
    (aten.cat.default, ([normal(2, 3), normal(2, 5, seed=1)], 1), {}),
    (aten.cat.default, ([normal(2, 3), normal(4, 3, seed=1), normal(1, 3)], 0), {}),
    (aten.cat.default, ([torch.empty(0), normal(2, 3)], -1), {}),
    (aten.cat.default, ([torch.arange(3), normal(4)], 0), {}),
    (aten.stack.default, ([normal(2, 3), normal(2, 3, seed=1)], 1), {}),
    (aten.stack.default, ([normal(2, 3), normal(2, 3, seed=1), normal(2, 3)], -1), {}),
    (aten.constant_pad_nd.default, (normal(3, 5), [1, 2], 0.5), {}),
    (aten.constant_pad_nd.default, (normal(3, 5), [0, 0, 2, 1]), {}),
    (aten.constant_pad_nd.default, (normal(3, 5), [-1, 0]), {}),
    (aten.pad.default, (normal(3, 5), [0, 3]), {"mode": "constant"}),
    (aten.flip.default, (normal(3, 5), [0, -1]), {}),
    (aten.repeat.default, (normal(3, 5), [2, 1, 3]), {}),
    (quantize, (normal(5, 16) * 50, torch.tensor(0.5)), {}),
    (quantize, (normal(5, 16), normal(5, 1, seed=1).abs(), normal(5, 1, seed=2).round()), {"stored": True}),
    (quantize, (normal(5, 16), normal(5, 4, seed=1).abs()), {"bits": 4}),
    (dequantize, (torch.arange(-8, 8, dtype=torch.int8), torch.tensor(0.25)), {}),
    (dequantize, (torch.arange(-8, 8, dtype=torch.int8)[None], normal(3, 5).abs(), normal(3, 5).round()), {}),
    (rotary, (normal(2, 3, 5, 8), normal(1, 1, 5, 8, seed=1), normal(1, 1, 5, 8, seed=2)), {}),
    (rotary, (normal(2, 3, 5, 8), normal(5, 4, seed=1), normal(5, 4, seed=2)), {}),
    (rotary, (normal(2, 3, 5, 8), normal(2, 1, 5, 6, seed=1), normal(2, 1, 5, 6, seed=2), True), {}),
    (rotary, (normal(2, 3, 5, 8, dtype=torch.float16), normal(5, 8), normal(5, 8, seed=2)), {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "args", "options"), ONE_CALL, ids=[f"{number}-{case[0]}" for number, case in enumerate(ONE_CALL)]
)
def test_equals_eager(target: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    runner = agree(*calling(target, *args, **options))
    assert not runner.generated.externs


def test_powers_of_special_numbers() -> None:
    inf, nan = float("inf"), float("nan")
    numbers = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 3.0, -3.0, 1e30, -1e30, 0.5, -2.0])
    (found,) = ran(made_of(calling(aten.pow.Tensor_Tensor, numbers[:, None], numbers)[0]), [numbers[:, None], numbers])
    expected = numbers[:, None] ** numbers
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert torch.equal(1 / found < 0, 1 / expected < 0)  # zeros have their signs


def made(self: Any, x: Tensor) -> list[Tensor]:
    length = x.shape[1]
    return [
        torch.arange(length) * 2, torch.arange(3, length + 3), torch.arange(0, 7, 3),
        torch.arange(4, dtype=torch.float32), torch.full((x.shape[0], 3), 0.5), torch.zeros(length),
        torch.ones_like(x), torch.zeros_like(x, dtype=torch.int64),
        torch.full((2,), float("-inf")), torch.full_like(x, float("nan")), torch.scalar_tensor(3.0), x.new_zeros(2, 2),
        x.new_ones(length), x.new_full((2,), 7.0), x * length,
    ]  # fmt: skip


def test_numbers_from_nothing_follow_the_sizes() -> None:
    agree(program(made, normal(2, 6)), [normal(2, 6)], [normal(3, 9)])


def test_numbers_from_nothing_are_in_memory_where_they_are_multiplied() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return x.softmax(-1) @ torch.arange(8.0).view(4, 2)

    agree(program(function, normal(2, 4)), [normal(2, 4)], [normal(3, 4)])


def test_a_half_from_nothing_is_rounded() -> None:
    """Else it would not equal itself."""

    def function(self: Any, x: Tensor) -> Tensor:
        return x == torch.full_like(x, 0.1)

    x = torch.full((2, 3), 0.1, dtype=torch.float16)
    agree(program(function, x), [x])


@pytest.mark.parametrize(
    ("function", "host"),
    [
        (lambda self, x: x.tril(x.shape[1] - 3), False),
        (lambda self, x: x.var(-1, correction=x.shape[0] - 2), False),
        (lambda self, x: x * (x.shape[1] > 7), True),
        (lambda self, x: x / x.shape[1] ** 0.5, True),
        (lambda self, x: torch.add(x, x, alpha=x.shape[1]), True),
        (lambda self, x: torch.full((3,), x.shape[1] / x.shape[0]) * x[0, 0], True),
    ],
    ids=["diagonal", "correction", "condition", "fraction", "number", "generator"],
)
def test_sizes_where_a_number_may_stand(function: Any, host: bool) -> None:
    """Kernels know whole numbers of sizes; what is given others is left to PyTorch."""
    runner = agree(program(function, normal(4, 6)), [normal(4, 6)], [normal(5, 9)])
    assert bool(runner.generated.externs) == host


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 4, 3).transpose(1, 2),
    "merged": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1),
    "flat": lambda x: x.flatten(),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "slice": lambda x: x[:, 1:, 2:9:3],
    "last": lambda x: x[:, -1],
    "select": lambda x: x[..., 3],
    "unflatten": lambda x: x.unflatten(-1, (2, 6)).flatten(1, 2),
    "shuffled": lambda x: x.reshape(x.shape[0], 12, -1).transpose(1, 2),
    "chunk": lambda x: x.unflatten(-1, (4, 3)).chunk(2, 2)[1],
    "unbind": lambda x: x.unflatten(-1, (3, 4)).unbind(2)[2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_within_a_kernel(name: str) -> None:
    """Between two operators a view is arithmetic on indices: one kernel, and nothing is copied."""
    traced = program(lambda self, x: torch.tanh(VIEWS[name](x * 2.0) + 1.0), normal(2, 6, 12))
    runner = agree(traced, [normal(2, 6, 12)], [normal(3, 5, 12)])
    assert len(runner.generated.groups) == 1


@pytest.mark.parametrize("name", VIEWS)
def test_views_between_kernels(name: str) -> None:
    """A view that is a result is one of memory."""
    traced = program(lambda self, x: [VIEWS[name](x * 2.0), VIEWS[name](x)], normal(2, 6, 12))
    agree(traced, [normal(2, 6, 12)], [normal(3, 5, 12).transpose(0, 1).contiguous().transpose(0, 1)])


def test_an_index_out_of_range_reads_nothing_else() -> None:
    """PyTorch raises on the CPU and asserts on a GPU; here what is read is 0, never memory of others."""
    traced, (table, _) = calling(aten.embedding.default, normal(7, 9), ids)
    runner = agree(traced, [table, ids])
    assert float(ran(runner, [table, torch.full_like(ids, 1000)])[0].abs().max()) == 0.0


def test_every_value_is_tried() -> None:
    made_here = ("arange", "full", "zeros", "ones", "new", "scalar", "to")
    left = VALUES.keys() - REDUCED.keys() - {case[0] for case in ONE_CALL}
    assert {target for target in left if not str(target).split(".")[1].strip("_").startswith(made_here)} == set()


def test_what_would_double_without_end_is_parted() -> None:
    """Each step reads the one before at two places: as one kernel 2^14 lines."""

    def function(self: Any, x: Tensor) -> Tensor:
        for _ in range(14):
            x = torch.cat([x[..., 1:], x[..., :1]], -1) * 0.5 + x
        return x

    runner = agree(program(function, normal(2, 5), dynamic=None), [normal(2, 5)])
    assert len(runner.generated.groups) > 1


def test_a_single_number_is_read_where_a_block_says_so() -> None:
    """Both halves of the result read one element, at a distance that is a stride, where the column says so."""

    def function(self: Any, x: Tensor) -> Tensor:
        y = torch.exp(x)
        return torch.cat([y[..., 1:], y[..., :1]], -1)

    x = normal(1, 1, 2)
    agree(program(function, x, dynamic=None), [x])


@pytest.mark.parametrize("equation", ["bnd,bmd->bnm", "bnd,bmd->bmn", "bnd,bmd->bd"])
def test_einsum_is_products_and_views(equation: str) -> None:
    def function(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(torch.einsum(equation, x, y))

    x, y = normal(2, 3, 4), normal(2, 5, 4, seed=1)
    runner = agree(program(function, x, y), [x, y], [x[:1], y[:1]])
    assert not runner.generated.externs
