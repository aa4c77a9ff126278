"""Results known without running the reference are those of the reference; where it is not known it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import normal, program
from torch._subclasses import FakeTensorMode

from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program, describe_value, fake_result
from fxpress.ir.ops.attention import attention, attention_result
from fxpress.ir.ops.table import OPERATORS

QUERY, KEY, VALUE = normal(2, 4, 5, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 6)
MASK = torch.ones(2, 7, dtype=torch.bool)
KNOWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"key": KEY[:, :2], "value": VALUE[:, :2]},
    "transposed": {"query": normal(2, 5, 4, 8).transpose(1, 2), "value": normal(2, 7, 4, 6).transpose(1, 2)},
    "half": {"query": QUERY.half(), "key": KEY.half(), "value": VALUE.half(), "bias": normal(5, 7).half()},
    "half with a wide bias": {"query": QUERY.half(), "key": KEY.half(), "value": VALUE.half(), "bias": normal(5, 7)},
    "double": {"query": QUERY.double(), "key": KEY.double(), "value": VALUE.double(), "bias": normal(5, 7)},
    "bias": {"bias": normal(2, 4, 5, 7)},
    "bias that broadcasts": {"bias": normal(4, 1, 7)},
    "boolean bias": {"bias": MASK[:, None, None, :]},
    "whole bias": {"bias": torch.ones(7, dtype=torch.long)},
    "key mask": {"key_mask": MASK},
    "band": {"left": 3, "right": 0},
    "capped": {"scale": 0.3, "softcap": 5.0},
    "sinks": {"sinks": normal(4)},
    "mean": {"empty": "mean", "key_mask": MASK},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "of rank 3": {"query": QUERY[0], "key": KEY[0], "value": VALUE[0]},
    "one batch of keys": {"key": KEY[:1], "value": VALUE[:1]},
    "other head size": {"key": KEY[..., :6]},
    "other length": {"value": VALUE[:, :, :6]},
    "other groups": {"key": KEY[:, :2]},
    "heads that groups do not divide": {"key": KEY[:, :3], "value": VALUE[:, :3]},
    "other dtype": {"key": KEY.double()},
    "other bias": {"bias": normal(5, 6)},
    "bias of more axes": {"bias": normal(3, 2, 4, 5, 7)},
    "bias that widens the scores": {"bias": normal(5, 7).double()},
    "whole key mask": {"key_mask": MASK.long()},
    "other key mask": {"key_mask": MASK[:, :6]},
    "other sinks": {"sinks": normal(3)},
    "other rows without keys": {"empty": "ones"},
}  # fmt: skip


def given(case: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    whole = {"query": QUERY, "key": KEY, "value": VALUE, **case}
    return {name: mode.from_tensor(item) if isinstance(item, torch.Tensor) else item for name, item in whole.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    with FakeTensorMode() as mode:
        arguments = given(KNOWN[name], mode)
        found, expected = attention_result(**arguments), OPERATORS[attention].reference(**arguments)
    assert found is not None
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    with FakeTensorMode() as mode:
        assert attention_result(**given(UNKNOWN[name], mode)) is None


def traced() -> Program:
    def forward(self: Any, x: Any, y: Any, pad: Any) -> Any:
        return attention(x, y, y, key_mask=pad, right=0)

    return program(forward, QUERY, KEY, MASK)


def test_symbolic_sizes() -> None:
    made = traced()
    (call,) = made.calls(attention)
    sizes = [node.meta["val"] for node in made.graph.find_nodes(op="placeholder")]
    known = attention_result(sizes[0], sizes[1], sizes[1], key_mask=sizes[2])
    assert known is not None
    with made.fake_mode, torch.no_grad():
        expected = OPERATORS[attention].reference(sizes[0], sizes[1], sizes[1], key_mask=sizes[2])
    found = fake_result(made, call)
    assert describe_value(found) == describe_value(known) == describe_value(expected)
    assert [str(step) for step in found.stride()] == [str(step) for step in expected.stride()]


def test_arguments_that_do_not_fit_are_refused_as_the_reference_does() -> None:
    made = traced()
    query, key, _ = made.graph.find_nodes(op="placeholder")
    last = next(iter(reversed(made.graph.nodes)))
    with pytest.raises(RewriteError, match="empty must be one of"):
        made.call(attention, query, key, key, before=last, empty="ones")


def test_where_gradients_flow_the_reference_runs_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        arguments = given({}, mode)
        arguments["query"].requires_grad_()
        assert attention(**arguments).requires_grad
        with torch.no_grad():
            assert not attention(**arguments).requires_grad
