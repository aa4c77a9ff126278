"""Examples as users give them: one tensor for several inputs, weights, `*args` and `**kwargs`, names of weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from build import normal
from torch import Tensor, nn

import fxpress
from fxpress.compiler import trace
from fxpress.ir.errors import InputError, TraceError

X, Y = normal(2, 3, seed=1), normal(2, 3, seed=2)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(2, 3, seed=3))
        self.register_buffer("b", normal(2, 3, seed=4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * 2 - y * self.w + self.b


# --- one object ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [(X, X), {"x": X, "y": X}, {"y": X, "x": X}], ids=["tuple", "dict", "other order"])
def test_one_tensor_for_two_inputs_is_two_inputs(example: Any) -> None:
    compiled = fxpress.compile(Weights().eval(), example_inputs=example, backend="eager")
    assert torch.equal(compiled(X, Y), Weights()(X, Y))


@pytest.mark.parametrize("name", ["w", "b"])
def test_a_weight_as_example_is_an_input(name: str) -> None:
    model = Weights().eval()
    compiled = fxpress.compile(model, example_inputs=(getattr(model, name), X), backend="eager")
    assert torch.equal(compiled(X, Y), model(X, Y))


def test_query_key_and_value_of_one_tensor() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, q, k, v = (normal(2, 5, 8, seed=seed) for seed in range(4))
    compiled = fxpress.compile(attention, example_inputs=(x, x, x), backend="onnx")
    torch.testing.assert_close(compiled(q, k, v)[0], attention(q, k, v)[0], rtol=1e-5, atol=1e-5)


def test_labels_that_are_the_input() -> None:
    model, ids = tiny.gpt2(), tiny.text()["input_ids"]
    other = {"input_ids": ids, "labels": ids.flip(0)}
    compiled = fxpress.compile(model, example_inputs={"input_ids": ids, "labels": ids}, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**other).loss, model(**other).loss)


def test_a_graph_that_is_not_the_model_is_not_said_to_equal_it() -> None:
    """Eager is not taken for imprecise: the traced graph here gives its first input for both."""
    with patch.object(trace, "_distinct", lambda model, args: args):
        compiled = fxpress.compile(Weights().eval(), example_inputs=(X, X), backend="eager")
    verdict = compiled.verify((X, Y))
    assert verdict.reasons == ("the traced graph is not the model: output has other values than the model's",)


def test_a_model_that_computes_something_else_while_traced_is_refused() -> None:
    """As where a mask of all tokens is left out, and attention then causal, unless it is traced."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1) if torch.compiler.is_compiling() else x

    with pytest.raises(TraceError, match="not the model: on the example 'output' has other values than the model's"):
        fxpress.compile(Two().eval(), example_inputs=(X,), dynamic_shapes=None, backend="eager")


# --- parameters of forward -------------------------------------------------------------------------------------------


class Rest(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return sum((item * place for place, item in enumerate(rest, 1)), x)


class Named(nn.Module):
    def forward(self, x: Tensor, **named: Any) -> Tensor:
        return x * named["factor"] - (named["shift"] if named.get("shifts") else 0)


CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    "rest": (Rest, (X, Y, X), {}),
    "no rest": (Rest, (X,), {}),
    "named": (Named, (X,), {"factor": Y}),
    "named, one a constant": (Named, (X,), {"factor": Y, "shift": X, "shifts": True}),
}


@pytest.mark.parametrize("backend", ["eager", "onnx"])
@pytest.mark.parametrize("name", CALLS)
def test_inputs_that_forward_does_not_name(name: str, backend: str) -> None:
    make, args, named = CALLS[name]
    model = make().eval()
    example = dict(zip(("x",), args, strict=True)) | named if named else args
    compiled = fxpress.compile(model, example_inputs=example, backend=backend)
    for rows in (2, 5):
        a = [normal(rows, 3, seed=seed) for seed, _ in enumerate(args)]
        n = {key: normal(rows, 3, seed=9) if isinstance(value, Tensor) else value for key, value in named.items()}
        torch.testing.assert_close(compiled(*a, **n), model(*a, **n))


def test_as_many_as_in_the_example() -> None:
    compiled = fxpress.compile(Rest().eval(), example_inputs=(X, Y, X), backend="eager")
    assert [item.path for item in compiled.signature.inputs] == ["x", "rest.0", "rest.1"]
    with pytest.raises(InputError, match=r"missing input 'rest\.1'"):
        compiled(X, Y)
    with pytest.raises(InputError, match="4 positional arguments given, the program takes 3"):
        compiled(X, Y, X, Y)


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2])
def test_options_of_transformers_models(make: Callable[[], Any]) -> None:
    """Which their forward takes as `**kwargs`."""
    model, example = make(), {**tiny.text(), "output_hidden_states": True}
    compiled = fxpress.compile(model, example_inputs=example, backend="eager")
    other = {**tiny.text(3, 9), "output_hidden_states": True}
    with torch.no_grad():
        found, expected = compiled(**other), model(**other)
    assert list(found) == list(expected) and len(found.hidden_states) == 2
    for value, truth in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(value, truth)


def test_what_torch_prints_of_a_failure_is_kept_off_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("seen", file=sys.stderr)
            return x * 2 if x.max() > 3 else x

    with pytest.raises(TraceError, match="cannot trace Branch at test_example"):
        fxpress.compile(Branch().eval(), example_inputs=(X,), backend="eager")
    assert {*capsys.readouterr().err.split()} == {"seen"}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "onnx"])
@pytest.mark.parametrize("passes", [[], None], ids=["no pass", "fuse"])
def test_an_input_with_a_weights_name(passes: Any, backend: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(normal(3, seed=5))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * self.scale + scale

    model = Model().eval()
    compiled = fxpress.compile(model, passes, (X, Y), backend=backend)
    torch.testing.assert_close(compiled(Y, X), model(Y, X))
    torch.testing.assert_close(compiled(x=Y, scale=X), model(Y, X))
