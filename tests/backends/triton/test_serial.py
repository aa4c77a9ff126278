"""Prepared programs as data: the same module is written from them, and nothing that they say can become code."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import tiny
import torch
from build import normal, program
from kernels_agree import calling
from operator_cases import BY_NAME, CASES
from torch import Tensor, nn

from fxpress.backends.triton.module import generate, write
from fxpress.backends.triton.prepare import prepare
from fxpress.backends.triton.serial import dump, restore
from fxpress.compiler.families import families
from fxpress.compiler.pipeline import run_passes
from fxpress.compiler.trace import trace
from fxpress.ir.errors import ArtifactError, LoweringError
from fxpress.ir.graph import Program, attribute
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fuse


def weights_of(ready: Program) -> dict[str, Tensor]:
    names = [str(node.target) for node in ready.graph.nodes if node.op == "get_attr"]
    return {name: attribute(ready.module, name) for name in names}


def read_again(ready: Program) -> Program:
    return restore(json.loads(json.dumps(dump(ready))), ready.signature, weights_of(ready))


def prepared(model: nn.Module, given: dict[str, Tensor]) -> Program:
    traced = trace(model.eval(), ((), given))
    run_passes(traced, [Canonicalize(), Fuse()], Context(list(given.values())))
    return prepare(traced)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_model_gives_the_same_module_again(name: str) -> None:
    (family,) = (item for item in families() if item.name == name)
    ready = prepared(family.model(), family.inputs(2, 12))
    assert write(read_again(ready)).source == write(ready).source


@pytest.mark.slow
def test_every_operator_gives_the_same_module_again() -> None:
    for name, args, options in CASES:
        ready = prepare(calling(BY_NAME[name], *args, **options)[0])
        assert write(read_again(ready)).source == write(ready).source, name


def test_sizes_infinities_and_dtypes_are_kept() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        ahead = torch.arange(x.shape[1] * 2, dtype=torch.float16)
        return torch.where(x > 0, x, float("-inf")).repeat(1, 2) + ahead / x.shape[0]

    ready = prepare(program(function, normal(3, 5)))
    source = write(read_again(ready)).source
    assert source == write(ready).source
    assert "inf" in source and "2*d1" in source


def test_another_device_is_that_of_all() -> None:
    ready = prepare(program(lambda self, x: x + torch.arange(x.shape[0]), normal(3)))
    again = restore(dump(ready), ready.signature, {}, torch.device("cuda", 0))
    assert "device('cuda:0')" in write(again).source and "device('cpu')" not in write(again).source


@pytest.fixture(scope="module")
def ready() -> Program:
    return prepared(tiny.encoder(), tiny.inputs())


@pytest.fixture
def data(ready: Program) -> dict[str, Any]:
    return copy.deepcopy(dump(ready))


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in data["nodes"] if entry["op"] == op)
    return found


def refused(ready: Program, data: Any, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        restore(data, ready.signature, weights_of(ready))


@pytest.mark.parametrize("target", ["aten.from_file.default", "posix.system", "builtins.eval", "fxpress.none.default"])
def test_only_what_the_backend_lowers_is_called(ready: Program, data: dict[str, Any], target: str) -> None:
    node(data, "call_function")["target"] = target
    refused(ready, data, f"calls '{target}', which this backend does not have")


@pytest.mark.parametrize("name", ['x"), f() or getattr(self, "x', "a b", "lambda", "", "x\n", "ä"])
def test_names_are_identifiers(ready: Program, data: dict[str, Any], name: str) -> None:
    node(data, "call_function")["name"] = name
    refused(ready, data, "no identifier")


def test_texts_are_words(ready: Program, data: dict[str, Any]) -> None:
    node(data, "call_function")["args"] = ["tanh')\nimport os"]
    refused(ready, data, "a text that is no word")


@pytest.mark.parametrize("part", ["f", None, True, {"node": "ids"}])
def test_a_part_is_named_by_a_number(ready: Program, data: dict[str, Any], part: Any) -> None:
    node(data, "call_function").update(target="getitem", args=[{"node": "ids"}, part], kwargs={})
    refused(ready, data, "takes a part of something that has none")


def test_arguments_have_names_of_the_operator(ready: Program, data: dict[str, Any]) -> None:
    node(data, "call_function")["kwargs"] = {"x=f()": 1}
    refused(ready, data, "arguments that it does not have")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["nodes"].pop(0), "another form|its signature says otherwise"),
        (lambda data: data["nodes"].pop(), "gives no list of outputs"),
        (lambda data: data["nodes"].append(data["nodes"][0]), "which is taken"),
        (lambda data: data["symbols"].update({"f()": 2}), r"a size of the name 'f\(\)'"),
        (lambda data: data["symbols"].clear(), "another form: KeyError"),
        (lambda data: node(data, "placeholder")["value"].update(dtype="Tensor"), "no dtype 'Tensor'"),
        (lambda data: node(data, "placeholder")["value"].update(shape=[["Sub", 1, 2]]), "another form: KeyError"),
        (lambda data: node(data, "placeholder")["value"].update(shape=[["FloorDiv", 1, 0]]), "another form: ZeroDiv"),
        (lambda data: node(data, "placeholder")["value"].update(shape=[2**70]), "beyond 64 bits"),
        (lambda data: node(data, "placeholder")["value"].update(shape=[["Mul", 2**62, 2**62]]), "another form: "),
        (lambda data: node(data, "placeholder")["value"].update(shape=[["Pow", 9, 10**10]]), "a power of another kind"),
        (lambda data: node(data, "placeholder")["value"].update(shape=[["Pow", ["Pow", 9, 8], 8]]), "a power of"),
        (lambda data: data.update(nodes=[{}] * 200_001), "has 200001 nodes"),
        (lambda data: node(data, "get_attr").update(target="missing"), "a weight 'missing', which is not there"),
        (lambda data: data.pop("nodes"), "another form: KeyError"),
        (lambda data: data.update(nodes=3), "another form: TypeError"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_one_error(ready: Program, data: dict[str, Any], change: Any, match: str) -> None:
    change(data)
    refused(ready, data, match)


def test_a_program_without_a_form_as_data_is_refused() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return torch.einsum("ij,kj->ik", x, x)

    with pytest.raises(LoweringError, match="cannot be saved: its argument 'ij,kj->ik' has no form as data"):
        dump(program(function, normal(3, 5)))  # not prepared


def test_what_is_read_is_checked_by_the_generator(ready: Program) -> None:
    assert generate(read_again(ready)).source == write(ready).source  # preparing again changes nothing
