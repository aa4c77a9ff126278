"""Program: running it, and edits that keep it well-formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, fx

from fxpress.ir import graph as g
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program, identifier, short_dtype, size_text, source_of
from fxpress.ir.ops.norm import rms_norm
from fxpress.ir.printer import print_program
from fxpress.ir.verify import verify

aten = torch.ops.aten
W = normal(6, 8)


@pytest.fixture
def made() -> Program:
    def forward(m: Any, x: Tensor) -> dict[str, Tensor]:  # torch notes the source line of a function of this name only
        return {"y": F.linear(x, m.w).relu()}

    return program(forward, normal(2, 5, 8), w=W)


def relu(made: Program) -> fx.Node:
    return made.calls(aten.relu.default)[0]


def test_call_gives_what_the_model_did(made: Program) -> None:
    x = normal(3, 4, 8)
    found = made(x)
    assert torch.equal(found["y"], F.linear(x, W).relu())
    assert torch.equal(made(x=x)["y"], found["y"])


def test_call_checks_its_inputs(made: Program) -> None:
    with pytest.raises(InputError, match="unknown input 'z'"):
        made(z=normal(3, 4, 8))


def test_copy_has_a_graph_of_its_own_and_the_same_weights(made: Program) -> None:
    other, text = made.copy(), print_program(made)
    other.replace(relu(other), relu(other).args[0])
    other.clean()
    assert print_program(made) == text
    assert other.module.w is made.module.w
    verify(made)


def test_inserted_call_has_value_and_source(made: Program) -> None:
    node = made.call(aten.tanh.default, relu(made), before=next(iter(relu(made).users)), like=relu(made))
    assert node.meta["val"].shape == relu(made).meta["val"].shape
    assert node.meta["stack_trace"] == relu(made).meta["stack_trace"]
    verify(made)


def test_call_that_does_not_fit_leaves_the_graph_alone(made: Program) -> None:
    text = print_program(made)
    with pytest.raises(RewriteError, match=r"^cannot insert linear\w*: "):
        made.call(aten.linear.default, relu(made), relu(made), before=next(iter(relu(made).users)))
    assert print_program(made) == text


def test_replace_by_another_shape(made: Program) -> None:
    source = next(node for node in made.graph.nodes if node.op == "placeholder")
    with pytest.raises(RewriteError, match=r"cannot replace relu: f32\[.*6\] by x: f32\[.*8\] \(test_graph.py:"):
        made.replace(relu(made), source)


def test_replaced_node_is_erased(made: Program) -> None:
    made.replace(relu(made), made.call(aten.tanh.default, relu(made).args[0], before=relu(made)))
    made.clean()
    assert not made.calls(aten.relu.default)
    verify(made)


def test_node_replaced_by_its_own_reader_stays(made: Program) -> None:
    new = made.call(aten.tanh.default, relu(made), before=next(iter(relu(made).users)))
    made.replace(relu(made), new)
    assert list(relu(made).users) == [new]


@pytest.mark.parametrize("tensor, kind", [(torch.nn.Parameter(normal(6)), "parameter"), (normal(6), "buffer")])
def test_added_weight(made: Program, tensor: Tensor, kind: str) -> None:
    node = made.add_weight("a.scale", tensor)
    made.replace(relu(made), made.call(rms_norm, relu(made).args[0], node, 1e-6, before=relu(made)))
    made.clean()
    verify(made)
    names = dict(made.module.named_parameters() if kind == "parameter" else made.module.named_buffers())
    assert torch.equal(names["a_scale"], tensor)
    assert names["a_scale"] is not tensor


def test_added_weights_of_one_name(made: Program) -> None:
    assert [made.add_weight("w", normal(6)).target for _ in range(2)] == ["w_1", "w_2"]


def test_added_weight_is_trainable_on_request(made: Program) -> None:
    made.add_weight("s", normal(6), trainable=True)
    assert made.module.s.requires_grad


def test_clean_erases_unread_weights(made: Program) -> None:
    made.add_weight("unread", normal(6))
    made.call(aten.tanh.default, relu(made), before=next(iter(relu(made).users)))
    made.clean()
    assert not hasattr(made.module, "unread")
    assert not made.calls(aten.tanh.default)


def test_clean_erases_unread_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    made = program(model, normal(2, 8))
    source = next(node for node in made.graph.nodes if node.op == "placeholder")
    made.replace(made.calls(aten.linear.default)[0], source)
    made.clean()
    assert not list(made.module.named_parameters())
    assert made.module.code.count("linear") == 0


def test_program_without_tensors_has_no_fake_mode(made: Program) -> None:
    for node in made.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(RewriteError, match="trace the model again"):
        _ = made.fake_mode


@pytest.mark.parametrize(
    "name, safe",
    [
        ("layer.0.weight", "layer._0.weight"),
        ("a-b c", "a_b_c"),
        ("class.x", "_class.x"),
        ("a..b", "a._.b"),
        ("é", "_"),
        ('x"); import os', "x____import_os"),
    ],
)
def test_identifier(name: str, safe: str) -> None:
    assert identifier(name) == safe


STACK = """\
  File "/home/me/model.py", line 7, in forward
    x = self.f(x)
  File "/lib/torch/nn/modules/linear.py", line 125, in forward
    return F.linear(input)
"""


@pytest.mark.parametrize(
    "stack, text",
    [
        (STACK, " (model.py:7: x = self.f(x))"),
        (STACK.split("\n", 2)[2], " (linear.py:125: return F.linear(input))"),
        ("", ""),
        (None, ""),
    ],
)
def test_source_of(made: Program, stack: str | None, text: str) -> None:
    relu(made).meta["stack_trace"] = stack
    assert source_of(relu(made)) == text


@pytest.mark.parametrize(
    "dtype, text",
    [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.int64, "i64"), (torch.uint8, "u8"), (torch.bool, "bool")],
)
def test_short_dtype(dtype: torch.dtype, text: str) -> None:
    assert short_dtype(dtype) == text


def test_size_text() -> None:
    assert size_text("s1 + 2*s77", {"s77": "d0", "s1": "d1"}) == "d1 + 2*d0"
    assert size_text("s1") == "s1"


def test_arguments_are_named_with_defaults(made: Program) -> None:
    linear = made.calls(aten.linear.default)[0]
    found = g.arguments(linear)
    assert list(found) == ["input", "weight", "bias"]
    assert found["bias"] is None


def test_path_of_the_module() -> None:
    made = program(torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU())), normal(2, 8))
    assert g.module_path(relu(made)) == "0.0"
    relu(made).meta.clear()
    assert g.module_path(relu(made)) == ""


SAME: dict[str, tuple[Any, Any, bool]] = {
    "tensors": (torch.ones(2), torch.zeros(2), True),
    "sizes": (torch.ones(2), torch.ones(3), False),
    "ranks": (torch.ones(2), torch.ones(2, 1), False),
    "dtypes": (torch.ones(2), torch.ones(2).half(), False),
    "tuples": ((torch.ones(2), 3), [torch.ones(2), 3], True),
    "lengths": ((torch.ones(2),), (), False),
    "mixed": (torch.ones(2), 2, False),
    "numbers": (2, 2, True),
}


@pytest.mark.parametrize("case", SAME)
def test_same_value(case: str) -> None:
    first, second, same = SAME[case]
    assert g.same_value(first, second) is same
