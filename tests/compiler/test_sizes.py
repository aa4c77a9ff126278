"""Where a graph is right at the example's sizes alone, these are fixed; one that is right everywhere keeps its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.errors import InputError, TraceError


class Of(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def compiled(function: Any, dynamic_shapes: Any = "auto", batch: int = 4, length: int = 6) -> Any:
    x = torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(0))
    model = Of(function).eval()
    return fxpress.compile(model, [], {"x": x}, dynamic_shapes, backend="eager")


def pairs(x: Tensor) -> Tensor:
    """Neighbours added; an odd length loses its last row, which torch.export does not see."""
    even = torch.empty(x.shape[1] // 2 * 2, device="meta").shape[0] if not torch.compiler.is_compiling() else x.shape[1]
    return x[:, :even].cumsum(1)


def baked(x: Tensor) -> Tensor:
    """The length of the example, as a number of the graph."""
    return x * (6.0 if torch.compiler.is_compiling() else float(x.shape[1]))


WRONG = [
    (pairs, "axis 1 of 'x'", "at 5, 'output' has shape [4, 5, 8], the model's [4, 4, 8]"),
    (baked, "axis 1 of 'x'", "at 5, 'output' has other values than the model's"),
]


@pytest.mark.parametrize(("function", "axis", "why"), WRONG)
def test_an_axis_along_which_the_graph_is_wrong_is_fixed(function: Any, axis: str, why: str) -> None:
    found = compiled(function)
    assert found.report.fixed == [f"{axis}: {why}"] and why in found.report.summary()
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(found(x), function(x))
    with pytest.raises(InputError, match="axis 1 of input 'x' must be 6, found 5"):
        found(torch.randn(3, 5, 8))


@pytest.mark.parametrize(("function", "axis", "why"), WRONG)
def test_an_axis_that_was_declared_dynamic_and_is_wrong_is_refused(function: Any, axis: str, why: str) -> None:
    auto = torch.export.Dim.AUTO
    with pytest.raises(TraceError) as error:
        compiled(function, dynamic_shapes={"x": {0: auto, 1: auto}})
    assert f"with {axis} {why}" in str(error.value) and "dynamic_shapes=None" in str(error.value)


@pytest.mark.parametrize("function", [pairs, baked])
def test_fixed_sizes_are_taken(function: Any) -> None:
    assert compiled(function, dynamic_shapes=None).report.equal


def test_lengths_that_the_graph_does_not_take_are_not_tried() -> None:
    """Two is the least size that torch.export admits; one is tried apart, and only left out where it is wrong."""

    def doubled(x: Tensor) -> Tensor:
        return x * (2.0 if torch.compiler.is_compiling() else float(x.shape[1]))

    report = compiled(doubled, length=2).report
    assert sorted(low for low, _ in report.ranges.values()) == [1, 1, 2]


@pytest.mark.parametrize("error", [ValueError, AssertionError, NotImplementedError])
def test_sizes_at_which_the_model_fails_say_nothing(error: type[Exception]) -> None:
    def even(x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and x.shape[1] % 2:
            raise error("even lengths alone")
        return x * 2

    assert compiled(even).report.equal


def test_which_of_two_lengths_is_longer_is_tried() -> None:
    """Both axes are fixed: the graph has the longer one of the example."""

    def longer(x: Tensor) -> Tensor:
        return x * max(x.shape[1] / x.shape[2], 1.0)

    with_rows = compiled(longer, length=12)
    assert [item.partition(":")[0] for item in with_rows.report.fixed] == ["axis 1 of 'x'", "axis 2 of 'x'"]


def test_lengths_that_do_not_depend_on_each_other_stay_dynamic() -> None:
    found = compiled(lambda x: x.transpose(1, 2) * (x.shape[1] / x.shape[2]), length=12)
    assert not found.report.fixed
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(found(x), x.transpose(1, 2) * 0.6)


def test_inputs_that_cannot_be_rebuilt_say_nothing() -> None:
    class WithList(nn.Module):
        def forward(self, x: Tensor, others: list[Tensor]) -> Tensor:
            return x + len(others)

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert fxpress.compile(WithList().eval(), [], {"x": x, "others": []}, backend="eager").report.equal


class Nested(nn.Module):
    """Inputs in a list, with a number between them."""

    def forward(self, parts: Any) -> Tensor:
        first, times, last = parts
        return first * times - last


def test_inputs_in_a_list_keep_their_places() -> None:
    """One row is tried with the model as the others are, whatever stands between the tensors."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = fxpress.compile(Nested().eval(), [], {"parts": [x, 2.0, x + 1]}, backend="eager")
    assert all(low == 1 for low, _ in found.report.ranges.values())


@pytest.mark.parametrize("offset", [0, 2])
def test_a_table_of_positions_bounds_the_length(offset: int) -> None:
    """A model fails beyond it, where a backend may give zeros."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], dtype=torch.int64)[None] + offset
            return x + self.table(positions.expand(x.shape[0], -1))

    model = Positions().eval()
    found = fxpress.compile(model, [], (torch.randn(2, 6, 8),), backend="eager")
    longest = torch.randn(1, 20 - offset, 8)
    torch.testing.assert_close(found(longest), model(longest))
    with pytest.raises(InputError, match=f"is 21, the traced program is valid for at most {20 - offset}"):
        found(torch.randn(1, 21, 8))
