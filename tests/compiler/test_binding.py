"""A call is checked once for each kind; what is remembered of it is its order alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from build import normal, program
from torch import Tensor

from fxpress.compiler.binding import Binder
from fxpress.ir.errors import InputError
from fxpress.ir.signature import Signature


def less(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return x - y


@pytest.fixture
def bind() -> Binder:
    return Binder(program(less, normal(3, 4), normal(3, 4)).signature)


def test_calls_of_a_kind_are_checked_once(bind: Binder) -> None:
    with mock.patch.object(Signature, "bind", autospec=True, side_effect=Signature.bind) as checked:
        for _ in range(3):
            x, y = normal(5, 4), normal(5, 4)
            for found in (bind((x, y), {}), bind((), {"y": y, "x": x}), bind((x,), {"y": y})):
                assert found[0] is x and found[1] is y
    assert checked.call_count == 3


def test_one_tensor_for_two_inputs_is_no_order(bind: Binder) -> None:
    x, y = normal(3, 4), normal(3, 4, seed=1)
    assert bind((x, x), {})[1] is x
    assert bind((x, y), {})[1] is y


@pytest.mark.parametrize(
    "change", [lambda x: x[:2], lambda x: x.double(), lambda x: x[0]], ids=["size", "dtype", "rank"]
)
def test_another_kind_is_checked_anew(bind: Binder, change: Any) -> None:
    x, y = normal(3, 4), normal(3, 4)
    bind((x, y), {})
    with pytest.raises(InputError):
        bind((x, change(y)), {})


def test_a_default_device_takes_tensors_along(bind: Binder) -> None:
    x, y = normal(3, 4), normal(3, 4)
    for _ in range(2):
        with torch.device("meta"):
            assert all(tensor.is_meta for tensor in bind((x, y), {}))
        assert bind((x, y), {})[1] is y


def test_arrays_become_tensors(bind: Binder) -> None:
    x = normal(3, 4)
    assert torch.equal(bind((x.numpy(), x), {})[0], x)
