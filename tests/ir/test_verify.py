"""The verifier: every kind of broken program, and what it is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, fx

from fxpress.ir.errors import VerifyError
from fxpress.ir.graph import Program, fake_result
from fxpress.ir.verify import verify

aten = torch.ops.aten


@pytest.fixture
def made() -> Program:
    def forward(m: Any, x: Tensor) -> Tensor:  # torch notes the source line of a function of this name only
        return F.linear(x, m.w).relu()

    return program(forward, normal(2, 5, 8), w=normal(6, 8))


def relu(made: Program) -> fx.Node:
    return made.calls(aten.relu.default)[0]


def weight(made: Program) -> fx.Node:
    return next(node for node in made.graph.nodes if node.op == "get_attr")


def output(made: Program) -> fx.Node:
    return next(node for node in made.graph.nodes if node.op == "output")


def test_a_traced_program_is_right(made: Program) -> None:
    verify(made)
    verify(made)  # and is taken as checked the second time


def test_a_copy_of_what_was_checked_is_taken_as_checked_until_it_changes(
    made: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxpress.ir import verify as module

    verify(made)
    again: list[fx.Node] = []
    monkeypatch.setattr(module, "fake_result", lambda program, node: again.append(node) or fake_result(program, node))
    copied = made.copy()
    verify(copied)
    assert again == []
    relu(copied).meta["val"] = weight(copied).meta["val"]
    with pytest.raises(VerifyError, match=r"^node relu: "):
        verify(copied)
    assert again == [relu(copied)]
    verify(made)


def unknown(x: Any) -> Any:
    return x


def test_unknown_function(made: Program) -> None:
    relu(made).target = unknown
    with pytest.raises(VerifyError, match=r"^node relu: unknown function .*test_verify.unknown"):
        verify(made)


def test_unknown_operator_of_ours(made: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpress.ir import verify as module
    from fxpress.ir.ops.norm import rms_norm

    scale = made.add_weight("scale", normal(6))
    made.replace(relu(made), made.call(rms_norm, relu(made).args[0], scale, 1e-6, before=relu(made)))
    monkeypatch.setattr(module, "OPERATORS", {})
    with pytest.raises(VerifyError, match=r"unknown operator fxpress.rms_norm.default"):
        verify(made)


def test_mutable_operator(made: Program) -> None:
    relu(made).target = aten.relu_.default
    with pytest.raises(VerifyError, match=r"aten.relu_ changes its arguments; programs are functional"):
        verify(made)


def test_missing_value(made: Program) -> None:
    del relu(made).meta["val"]
    with pytest.raises(VerifyError, match=r"node relu: aten.relu has no fake value"):
        verify(made)


@pytest.mark.parametrize("wrong", ["dtype", "size", "rank", "kind", "none"])
def test_wrong_value(made: Program, wrong: str) -> None:
    value = relu(made).meta["val"]
    with made.fake_mode:
        relu(made).meta["val"] = {
            "dtype": value.half(),
            "size": value[..., 1:],
            "rank": value[0],
            "kind": (value,),
            "none": None,
        }[wrong]
    with pytest.raises(VerifyError, match=r"aten.relu gives f32\[d0, d1, 6\], its node says "):
        verify(made)


def test_arguments_that_do_not_fit(made: Program) -> None:
    relu(made).target = aten.linear.default
    with pytest.raises(VerifyError, match=r"node relu: aten.linear does not accept its arguments"):
        verify(made)


def test_missing_weight(made: Program) -> None:
    del made.module.w
    with pytest.raises((VerifyError, AttributeError), match="w"):
        verify(made)


def test_weight_of_another_shape(made: Program) -> None:
    made.module.w = torch.nn.Parameter(normal(6, 4))
    with pytest.raises(VerifyError, match=r"weight 'w' is f32\[6, 4\], its node says f32\[6, 8\]"):
        verify(made)


def test_weight_without_value(made: Program) -> None:
    del weight(made).meta["val"]
    with pytest.raises(VerifyError, match=r"weight 'w' without a fake value"):
        verify(made)


def test_input_without_value(made: Program) -> None:
    del next(iter(node for node in made.graph.nodes if node.op == "placeholder")).meta["val"]
    with pytest.raises(VerifyError, match=r"node x: an input without a fake value"):
        verify(made)


def test_wrong_number_of_outputs(made: Program) -> None:
    output(made).args = ((relu(made), relu(made)),)
    with pytest.raises(VerifyError, match=r"node output: the graph gives 2 outputs, the model 1"):
        verify(made)


def test_other_placeholders_than_the_signature(made: Program) -> None:
    other = dataclasses.replace(made, signature=dataclasses.replace(made.signature, inputs=()))
    with pytest.raises(VerifyError, match=r"the graph takes \['x'\], its signature says \[\]"):
        verify(other)


def test_operation_of_another_kind(made: Program) -> None:
    made.module.layer = torch.nn.ReLU()
    relu(made).op, relu_node = "call_module", relu(made)
    relu_node.target = "layer"
    with pytest.raises(VerifyError, match=r"node relu: operation call_module is not allowed in a program"):
        verify(made)


def test_malformed_graph(made: Program) -> None:
    first = made.calls(aten.linear.default)[0]
    relu(made).append(first)  # read before it is computed
    with pytest.raises(VerifyError, match=r"^the graph is malformed: "):
        verify(made)


def test_the_source_line_is_told(made: Program) -> None:
    del relu(made).meta["val"]
    with pytest.raises(VerifyError, match=r"\(test_verify.py:\d+: return F.linear\(x, m.w\).relu\(\)\)"):
        verify(made)


def test_several_results_and_sizes_are_right() -> None:
    verify(program(lambda m, x: [*x.split(x.shape[0] // 2 + 1), x.shape[0] * 2], normal(4, 8), dynamic=None))


def test_sizes_that_depend_on_data_are_right() -> None:
    verify(program(lambda m, x: x.nonzero(), normal(4, 8)))
