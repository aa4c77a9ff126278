"""Binding a call to a signature: what is taken, and what the error says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fxpress.ir.errors import InputError
from fxpress.ir.signature import ConstantInput, Signature, TensorInput, describe, leaves

SIGNATURE = Signature(
    inputs=(
        TensorInput("input_ids", "input_ids", "int64", ("d0", "d1")),
        TensorInput("mask", "mask", "bool", ("d0", "d1")),
        TensorInput("past.0.key", "past_0_key", "float32", ("d0", 4)),
    ),
    constants=(ConstantInput("use_cache", False), ConstantInput("scale", None)),
    positional=("input_ids", "mask", "past", "use_cache"),
    outputs=("logits",),
    ranges={"d0": (1, 8), "d1": (2, None)},
)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def example(batch: int = 2, length: int = 5) -> dict[str, Any]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return {"input_ids": ids(batch, length), "mask": mask, "past": [{"key": torch.zeros(batch, 4)}]}


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as error:
        SIGNATURE.bind(args, kwargs)
    return str(error.value)


def test_by_name() -> None:
    given = example()
    bound = SIGNATURE.bind((), given)
    assert [id(item) for item in bound] == [id(given["input_ids"]), id(given["mask"]), id(given["past"][0]["key"])]


def test_by_position() -> None:
    given = example()
    assert SIGNATURE.bind((given["input_ids"], given["mask"]), {"past": given["past"]})[1] is given["mask"]


def test_constants_may_be_repeated_and_none_be_given() -> None:
    assert len(SIGNATURE.bind((), {**example(), "use_cache": False, "scale": None, "other": None})) == 3


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"mask": None}, "missing input 'mask'; the program takes ['input_ids', 'mask', 'past.0.key']"),
    "unknown": ({"masc": ids(1)}, "unknown input 'masc': did you mean 'mask'? (valid: input_ids, mask, past.0.key)"),
    "unknown_nested": ({"past": [{"kei": ids(1)}]}, "unknown input 'past.0.kei': did you mean 'past.0.key'?"),
    "no_tensor": ({"mask": 3}, "input 'mask' must be a tensor, found 3"),
    "dtype": ({"mask": ids(2, 5)}, "input 'mask' must have dtype bool, found int64"),
    "rank": ({"input_ids": ids(2)}, "input 'input_ids' must have shape ['d0', 'd1'], found [2]"),
    "fixed": ({"past": [{"key": torch.zeros(2, 3)}]}, "axis 1 of input 'past.0.key' must be 4, found 3"),
    "tied": (
        {"mask": torch.ones(2, 6, dtype=torch.bool)},
        "axis 1 of input 'mask' is 6, but must equal axis 1 of input 'input_ids', which is 5",
    ),
    "constant": ({"use_cache": True}, "input 'use_cache' was False when the model was traced"),
    "constant_kind": ({"use_cache": 0}, "compile again with an example in which it is 0"),
    "constant_tensor": ({"scale": ids(2)}, "in which it is a tensor int64[2]"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    changed, reason = CASES[case]
    assert reason in refused(**{**example(), **changed})


@pytest.mark.parametrize("batch, length, bound", [(9, 5, "at most 8"), (0, 5, "at least 1"), (2, 1, "at least 2")])
def test_out_of_range(batch: int, length: int, bound: str) -> None:
    assert refused(**example(batch, length)).endswith(f"the traced program is valid for {bound}")


def test_given_twice() -> None:
    assert refused(ids(2, 5), **example()) == "argument 'input_ids' is given twice, by position and by name"


def test_too_many() -> None:
    assert refused(*range(5)) == "5 positional arguments given, the program takes 4"


def test_plain_data_and_back() -> None:
    assert Signature.from_dict(json.loads(json.dumps(SIGNATURE.as_dict()))) == SIGNATURE


def test_leaves_of_nested_values() -> None:
    assert list(leaves({"a": [1, (2, None)]}, "x")) == [("x.a.0", 1), ("x.a.1.0", 2), ("x.a.1.1", None)]


def test_leaves_of_a_pytree_node() -> None:
    pair = torch.ones(2, 3).max(1)  # a return type of torch, a named tuple
    from collections import OrderedDict

    found = list(leaves(OrderedDict(values=pair.values), "x"))
    assert [path for path, _ in found] == ["x.values"]


@pytest.mark.parametrize(
    "value, text", [(ids(2), "a tensor int64[2]"), (None, "None"), ("x" * 99, "'" + "x" * 59), (object(), "a object")]
)
def test_description(value: Any, text: str) -> None:
    assert describe(value) == text


def test_shapes_follow_from_sizes_that_inputs_share() -> None:
    assert SIGNATURE.shapes({"input_ids": (2, 5)}) == [(2, 5), (2, 5), (2, 4)]
    assert SIGNATURE.shapes({"mask": [8, 2]}) == [(8, 2), (8, 2), (8, 4)]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((2, 5), "sizes must be given by input, {name: (size, ...)}, found (2, 5)"),
        ({"masc": (2, 5)}, "sizes of an unknown input 'masc': did you mean 'mask'?"),
        ({"past.0.key": (2, 4)}, "sizes of input 'input_ids' are missing: ['d0', 'd1']"),
        ({"input_ids": 5}, "sizes of input 'input_ids' must be integers of at least 0, found 5"),
        ({"input_ids": (2, -1)}, "sizes of input 'input_ids' must be integers of at least 0, found (2, -1)"),
        ({"input_ids": (2, 5, 1)}, "input 'input_ids' must have shape ['d0', 'd1'], found [2, 5, 1]"),
        ({"input_ids": (2, 1)}, "axis 1 of input 'input_ids' is 1, the traced program is valid for at least 2"),
        ({"input_ids": (9, 5)}, "axis 0 of input 'input_ids' is 9, the traced program is valid for at most 8"),
        ({"input_ids": (2, 5), "mask": (2, 6)}, "axis 1 of input 'mask' is 6, but must equal axis 1 of input 'input_i"),
        ({"input_ids": (2, 5), "past.0.key": (2, 3)}, "axis 1 of input 'past.0.key' must be 4, found 3"),
    ],
)
def test_sizes_that_are_no_shapes(sizes: Any, reason: str) -> None:
    with pytest.raises(InputError) as error:
        SIGNATURE.shapes(sizes)
    assert str(error.value).startswith(reason)
