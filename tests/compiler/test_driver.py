"""compile() on tiny models: what it takes, gives, refuses, and leaves alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress import compile, export_onnx
from fxpress.compiler.driver import Compiled
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.errors import InputError, LoweringError, TraceError
from fxpress.ir.printer import print_program


@dataclass
class Case:
    """A compiled model, with the model's state before."""

    model: nn.Module
    before: dict[str, Tensor]
    training: list[bool]
    compiled: Compiled


@pytest.fixture(scope="module")
def case() -> Case:
    model = tiny.encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    return Case(model, before, training, compile(model, example_inputs=tiny.inputs(), backend="onnx"))


@pytest.fixture(scope="module")
def gpt2() -> Compiled:
    return compile(tiny.gpt2(), example_inputs=tiny.text(), backend="onnx")


def close(found: Any, expected: Any) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


# --- the model and its inputs are left alone -------------------------------------------------------------------


def test_weights_are_unchanged_bit_for_bit(case: Case) -> None:
    after = case.model.state_dict()
    assert after.keys() == case.before.keys()
    assert all(torch.equal(after[name].view(torch.int32), old.view(torch.int32)) for name, old in case.before.items())


def test_training_flags_are_unchanged(case: Case) -> None:
    assert [module.training for module in case.model.modules()] == case.training


def test_weights_still_require_gradients(case: Case) -> None:
    assert all(weight.requires_grad and weight.grad is None for weight in case.model.parameters())


def test_inputs_are_unchanged(case: Case) -> None:
    given = tiny.inputs(3, 7)
    kept = {name: value.clone() for name, value in given.items()}
    case.compiled(**given)
    assert all(torch.equal(given[name], kept[name]) for name in given)


def test_the_program_does_not_share_memory_with_the_model(case: Case) -> None:
    theirs = {weight.data_ptr() for weight in case.model.parameters()}
    assert theirs.isdisjoint(weight.data_ptr() for weight in case.compiled.program.module.parameters())


# --- calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 6), (3, 9), (1, 5), (1, 1), (4, 1)])
def test_equal_to_the_model_at_other_sizes(case: Case, size: tuple[int, int]) -> None:
    assert case.compiled.verify(tiny.inputs(*size)).reasons == ()


def test_the_same_input_gives_the_same_result(case: Case) -> None:
    first, other, second = (case.compiled(**tiny.inputs(*size)) for size in ((2, 6), (3, 4), (2, 6)))
    assert torch.equal(first, second) and other.shape == (3, 4, 16)


def test_compiling_twice_gives_the_same_program(case: Case) -> None:
    again = compile(case.model, example_inputs=tiny.inputs(), backend="eager")
    assert print_program(again.program) == print_program(case.compiled.program)


def test_positional_and_named_calls_are_the_same(case: Case) -> None:
    given = tiny.inputs(3, 5)
    named = case.compiled(**given)
    assert torch.equal(case.compiled(*given.values()), named)
    assert torch.equal(case.compiled(given["ids"], mask=given["mask"]), named)


def test_an_argument_given_twice(case: Case) -> None:
    given = tiny.inputs()
    with pytest.raises(InputError, match="'ids' is given twice"):
        case.compiled(given["ids"], **given)


def test_a_missing_argument(case: Case) -> None:
    with pytest.raises(InputError, match="missing input 'mask'"):
        case.compiled(tiny.inputs()["ids"])


def test_an_unknown_argument(case: Case) -> None:
    with pytest.raises(InputError, match=r"unknown input .maks.: did you mean .mask."):
        case.compiled(tiny.inputs()["ids"], maks=tiny.inputs()["mask"])


def test_a_wrong_dtype(case: Case) -> None:
    with pytest.raises(InputError, match="'ids' must have dtype int64, found int32"):
        case.compiled(tiny.inputs()["ids"].int(), tiny.inputs()["mask"])


def test_axes_that_must_agree(case: Case) -> None:
    with pytest.raises(InputError, match=r"axis 1 of input 'mask' is 7, but must equal axis 1 of input 'ids'"):
        case.compiled(tiny.inputs(2, 6)["ids"], tiny.inputs(2, 7)["mask"])


def test_fully_masked_rows_equal_eager(case: Case) -> None:
    given = tiny.inputs(3, 5)
    given["mask"][1] = False
    assert case.compiled.verify(given).reasons == ()


# --- structure of inputs and outputs ---------------------------------------------------------------------------


class Structured(nn.Module):
    def forward(self, batch: dict[str, Tensor], extra: Tensor | None = None, double: bool = False) -> dict[str, Any]:
        x = batch["x"] * 2 if double else batch["x"] + 1
        return {"sum": x.sum(-1), "pair": (x, None), "given": [batch["x"].flatten(), extra]}


@pytest.fixture(scope="module")
def structured() -> Compiled:
    example = {"batch": {"x": torch.rand(2, 3)}, "extra": None, "double": True}
    return compile(Structured().eval(), example_inputs=example, backend="onnx")


def test_nested_inputs_and_outputs(structured: Compiled) -> None:
    x = torch.rand(4, 3)
    found, expected = structured({"x": x}, None, True), Structured()({"x": x}, None, True)
    assert found.keys() == expected.keys() and type(found["pair"]) is tuple and type(found["given"]) is list
    assert found["pair"][1] is None and found["given"][1] is None
    assert close(found["sum"], expected["sum"]) and torch.equal(found["pair"][0], expected["pair"][0])


def test_a_flag_that_changed_is_an_error(structured: Compiled) -> None:
    with pytest.raises(InputError, match="'double' was True when the model was traced"):
        structured({"x": torch.rand(2, 3)}, None, False)


def test_a_tensor_where_none_was_traced(structured: Compiled) -> None:
    with pytest.raises(InputError, match="'extra' was None when the model was traced"):
        structured({"x": torch.rand(2, 3)}, torch.rand(2), True)


def test_a_model_output_keeps_its_class(gpt2: Compiled) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    found = gpt2(**tiny.text(3, 7))
    assert isinstance(found, CausalLMOutputWithCrossAttentions) and found.logits.shape == (3, 7, 1000)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class SameTwice(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x + 1
        return {"a": y, "b": y, "x": x}


class FindsPlaces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.5).nonzero()


@pytest.mark.parametrize("kind", [Identity, SameTwice, FindsPlaces])
def test_unusual_outputs(kind: type[nn.Module]) -> None:
    compiled = compile(kind().eval(), example_inputs=(torch.rand(3, 3),), backend="onnx")
    assert compiled.verify((torch.rand(5, 4),)).reasons == ()


# --- options ---------------------------------------------------------------------------------------------------


def test_without_an_example_it_compiles_at_the_first_call() -> None:
    model = tiny.encoder()
    compiled = compile(model, backend="eager")
    with pytest.raises(InputError, match="not compiled yet"):
        compiled.report  # noqa: B018  # the property is what is tested
    assert close(compiled(**tiny.inputs()), model(**tiny.inputs()))
    assert compiled.report.equal


def test_no_passes_leave_the_graph_as_traced() -> None:
    model = tiny.encoder()
    compiled = compile(model, passes=[], example_inputs=tiny.inputs(), backend="eager")
    assert print_program(compiled.program) == print_program(trace(model, bind_example(model, tiny.inputs())))
    assert compiled.report.passes == [] and compiled.verify(tiny.inputs(3, 4)).equal


def test_the_eager_backend() -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="eager")
    assert compiled.report.backend == "eager" and compiled.verify(tiny.inputs(3, 4)).equal


def test_the_eager_backend_is_not_saved(tmp_path: Path) -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="eager")
    with pytest.raises(InputError, match="the eager backend has nothing to save"):
        compiled.save(tmp_path / "out")


@pytest.mark.parametrize("size", [(1, 6), (2, 1), (1, 1)])
def test_an_example_of_size_one_leaves_its_axes_dynamic(size: tuple[int, int]) -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(*size), backend="eager")
    assert compiled.verify(tiny.inputs(3, 5)).equal and compiled.verify(tiny.inputs(*size)).equal


def test_static_sizes() -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), dynamic_shapes=None, backend="eager")
    assert compiled.verify(tiny.inputs()).equal
    with pytest.raises(InputError, match=r"axis 1 of input 'ids' must be 6, found 7"):
        compiled(**tiny.inputs(2, 7))


def test_an_explicit_dynamic_axis() -> None:
    axes = {"ids": {0: Dim("batch")}, "mask": {0: Dim("batch")}}
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), dynamic_shapes=axes, backend="eager")
    assert compiled.verify(tiny.inputs(5, 6)).equal


class Specialised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3) + torch.ones(2, 3)


def test_an_explicit_axis_that_cannot_vary_is_an_error() -> None:
    with pytest.raises(TraceError, match="cannot trace Specialised"):
        compile(Specialised().eval(), example_inputs=(torch.rand(2, 3),), dynamic_shapes={"x": {0: Dim("batch")}})


def test_no_rewrites_allowed() -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="eager", max_rewrites=0)
    assert sum(item.changes for item in compiled.report.passes) == 0 and compiled.report.equal


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_as_many_rewrites_as_allowed(budget: int) -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="eager", max_rewrites=budget)
    assert sum(item.changes for item in compiled.report.passes) == budget and compiled.report.equal


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("passes", ["replace_attention(sliding_window, force=True)", "remove_padding"])
def test_a_pass_does_not_miss_what_there_were_no_rewrites_left_for(passes: str, budget: int) -> None:
    compiled = compile(tiny.encoder(), passes, tiny.inputs(), backend="eager", max_rewrites=budget)
    assert [item.changes for item in compiled.report.passes] == [budget, 0] and compiled.report.equal


def test_without_verification() -> None:
    compiled = compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="eager", verify=False)
    assert compiled.report.equal is None and "not measured" in str(compiled.report)
    with pytest.raises(InputError, match="verify=False"):
        compiled.verify(tiny.inputs())


def test_the_report_is_plain_json(case: Case) -> None:
    data = json.loads(json.dumps(case.compiled.report.as_dict(), allow_nan=False))
    assert data["equal"] is True and [item["name"] for item in data["passes"]] == ["canonicalize", "fuse"]


def test_the_report_is_read_by_people(case: Case) -> None:
    assert "equal to eager PyTorch" in str(case.compiled.report)


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_model_in_training_mode() -> None:
    with pytest.raises(InputError, match=r"training mode.*model\.eval\(\)"):
        compile(tiny.encoder().train(), example_inputs=tiny.inputs())


def test_a_part_in_training_mode() -> None:
    model = tiny.encoder()
    model.norm1.train()
    with pytest.raises(InputError, match="training mode"):
        compile(model, example_inputs=tiny.inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onxx"}, "unknown backend 'onxx': did you mean 'onnx'"),
        ({"max_rewrites": -1}, "max_rewrites must be 0 or more, found -1"),
        ({"max_rewrites": "a"}, "max_rewrites must be int or None, found 'a'"),
        ({"max_rewrites": True}, "max_rewrites must be int or None, found True"),
        ({"max_rewrites": 1.5}, "max_rewrites must be int or None, found 1.5"),
        ({"calibration": None}, r"calibration must be a list of inputs, found .*None.*write calibration="),
        ({"calibration": 5}, r"calibration must be a list of inputs, found .*5.*write calibration="),
        ({"dynamic_shapes": "all"}, "dynamic_shapes is 'all'"),
        ({"threads": 0}, "threads must be at least 1, found 0"),
        ({"threads": "2"}, "threads must be int or None, found '2'"),
        ({"backend": None}, "unknown backend None"),
        ({"dtype": torch.bfloat16, "backend": "eager"}, r"unknown dtype torch.bfloat16: did you mean 'bfloat16'"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile(tiny.encoder(), example_inputs=tiny.inputs(), **options)


def test_something_that_is_no_model() -> None:
    with pytest.raises(InputError, match=r"model must be an nn\.Module"):
        compile("bert")  # type: ignore[arg-type]


def test_a_model_that_fails_on_the_example() -> None:
    with pytest.raises(InputError, match=r"the model itself fails on the example inputs: index out of range"):
        compile(tiny.encoder(), example_inputs={"ids": torch.full((2, 3), 50)})


# --- other models ----------------------------------------------------------------------------------------------


def test_tied_weights_are_one_weight_of_the_program(gpt2: Compiled) -> None:
    shapes = [tuple(weight.shape) for weight in gpt2.program.module.parameters()]
    assert shapes.count((1000, 16)) == 1


def test_an_exported_program() -> None:
    model = tiny.encoder()
    given = tiny.inputs()
    axes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in given}
    exported = torch.export.export(model, (), given, dynamic_shapes=axes)
    compiled = compile(exported, backend="eager")
    assert close(compiled(**tiny.inputs(3, 5)), model(**tiny.inputs(3, 5)))
    assert compiled.verify(tiny.inputs(3, 5)).equal


def test_half_precision() -> None:
    compiled = compile(tiny.encoder().half(), example_inputs=tiny.inputs(), backend="onnx")
    assert compiled(**tiny.inputs(3, 5)).dtype == torch.float16
    assert compiled.verify(tiny.inputs(3, 5)).reasons == ()


def test_the_program_can_be_trained(case: Case) -> None:
    module = case.compiled.program.copy().module
    module(*tiny.inputs().values())[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())
    for weight in module.parameters():
        weight.grad = None


# --- ONNX files ------------------------------------------------------------------------------------------------


def test_export_onnx_writes_a_graph_and_its_weights(tmp_path: Path) -> None:
    model = tiny.encoder()
    report = export_onnx(model, tmp_path / "small.onnx", example_inputs=tiny.inputs())
    assert report.equal and sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx", "small.safetensors"]
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    given = tiny.inputs(3, 8)
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    numpy.testing.assert_allclose(found, model(**given).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_to_onnx_writes_a_valid_model(case: Case, tmp_path: Path) -> None:
    case.compiled.to_onnx(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx")


def test_to_onnx_does_not_overwrite(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        case.compiled.to_onnx(tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_to_onnx_wants_the_suffix(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.onnx"):
        case.compiled.to_onnx(tmp_path / "model.pt")


def test_export_onnx_takes_no_backend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out backend"):
        export_onnx(tiny.encoder(), tmp_path / "x.onnx", example_inputs=tiny.inputs(), backend="eager")


def test_export_onnx_refuses_a_bad_path_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        export_onnx(nn.Linear(1, 1), tmp_path / "missing" / "model.onnx", passes="never parsed(")


def test_numpy_inputs_of_a_compiled_model() -> None:
    compiled = compile(nn.Linear(4, 3).eval(), example_inputs=(torch.randn(2, 4),), backend="eager")
    x = numpy.ones((5, 4), dtype=numpy.float32)
    assert torch.equal(compiled(x), compiled(torch.from_numpy(x)))


def test_a_returned_parameter_is_compared_without_a_warning() -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, self.weight

    compiled = compile(Returning().eval(), example_inputs=(torch.randn(2, 3),), backend="eager")
    assert compiled.report.equal


def test_an_operator_whose_parts_cannot_be_translated_is_named() -> None:
    class Cholesky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.cholesky(x @ x.mT + torch.eye(4))

    with pytest.raises(LoweringError, match=r"no translation of .*cholesky"):
        compile(Cholesky().eval(), example_inputs=(torch.randn(2, 4, 4),), backend="onnx")


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_a_branch_is_taken_as_its_condition_holds(backend: str) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.cond(x.sum() > 0, lambda v: self.linear(v).sin(), lambda v: v * 2, (x,))
            return found

    x = torch.ones(3, 8)
    for example in (x, -x):
        compiled = compile(Either().eval(), example_inputs=(example,), backend=backend)
        assert compiled.verify((x,)).equal and compiled.verify((-x,)).equal
        assert compiled.report.macs_before == (3 * 8 * 8 if example is x else 0)
