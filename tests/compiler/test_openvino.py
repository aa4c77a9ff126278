"""compile(backend="openvino"): every family equal to eager, integers and padding as elsewhere, saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
import transformers

import fxpress
from fxpress.backends.openvino.session import check_dtype
from fxpress.compiler.families import families, try_family
from fxpress.ir.errors import InputError, LoweringError
from fxpress.ir.ops.padding import packed_attention


def has_bfloat16() -> bool:
    try:
        check_dtype("bfloat16")
    except InputError:
        return False
    return True


needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor does not compute in bfloat16")
QUICK, FEW = ("bert", "llama"), ("t5", "vit")


def tried(name: str) -> Any:
    """A few in each run: what is lowered is tested with ONNX Runtime."""
    mark = () if name in QUICK else pytest.mark.slow if name in FEW else pytest.mark.exhaustive
    return pytest.param(name, marks=mark)


@pytest.mark.parametrize("name", [tried(family.name) for family in families()])
def test_a_family_equals_eager(name: str) -> None:
    result = try_family(next(family for family in families() if family.name == name), backend="openvino")
    assert result.equal, result.failure


def test_without_padding() -> None:
    compiled = fxpress.compile(tiny.bert(), "remove_padding, fuse", tiny.text(), backend="openvino")
    assert compiled.program.calls(packed_attention)
    for size in ((2, 6), (3, 9), (1, 1)):
        assert compiled.verify(tiny.text(*size)).equal


@pytest.mark.parametrize("passes", ["quantize(int8, mode=static)", "quantize", "quantize(activations=None)"])
def test_a_vector_stays_one(passes: str) -> None:
    """OpenVINO 2026.4 gives [1, N] for a vector times a matrix of bytes."""
    torch.manual_seed(0)
    model, vector = torch.nn.Linear(24, 5).eval(), torch.randn(24)
    compiled = fxpress.compile(model, passes, (vector,), backend="openvino", calibration=[(vector,)])
    eager = fxpress.compile(model, passes, (vector,), backend="eager", calibration=[(vector,)])
    torch.testing.assert_close(compiled(vector), eager(vector), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2])
def test_fixed_sizes(make: Any) -> None:
    """OpenVINO 2026.4 ends the process over a product behind a masked attention of fixed sizes."""
    compiled = fxpress.compile(make(), "fuse", tiny.text(2, 6), dynamic_shapes=None, backend="openvino")
    assert compiled.report.equal and compiled.verify(tiny.text(2, 6)).equal


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT's artefact, for any sizes."""
    folder = tmp_path_factory.mktemp("openvino") / "bert"
    fxpress.compile(tiny.bert(), "fuse", tiny.text(), backend="openvino", threads=1).save(folder)
    return folder


@pytest.mark.parametrize("size", [(2, 6), (1, 9), (1, 1)])
def test_loaded_for_sizes_alone(stored: Path, size: tuple[int, int]) -> None:
    given = tiny.text(*size)
    planned = fxpress.load(stored, threads=1, sizes={name: tuple(value.shape) for name, value in given.items()})
    assert all(item.partial_shape.is_static for item in planned.session._model.inputs)
    with torch.no_grad():
        judge = tiny.bert().double()(**given).last_hidden_state
    for model in (planned, fxpress.load(stored, threads=1)):
        torch.testing.assert_close(model(**given).last_hidden_state.double(), judge, atol=2e-6, rtol=0)


def test_sizes_that_follow_need_not_be_given(stored: Path) -> None:
    given = tiny.text(2, 5)
    assert {"attention_mask", "token_type_ids"} & given.keys()
    assert fxpress.load(stored, sizes={"input_ids": (2, 5), "attention_mask": (2, 5)})(**given) is not None


def test_other_sizes_than_those_loaded_for_are_refused(stored: Path) -> None:
    planned = fxpress.load(stored, sizes=dict.fromkeys(tiny.text(), (2, 6)))
    with pytest.raises(InputError, match=r"input 'input_ids' has sizes \[3, 6\], the model was loaded for \[2, 6\]"):
        planned(**tiny.text(3, 6))


def test_a_backend_that_plans_for_no_sizes(tmp_path: Path) -> None:
    fxpress.compile(tiny.bert(), "fuse", tiny.text(), verify=False).save(tmp_path / "bert")
    with pytest.raises(InputError, match="is of the onnx backend, which plans for no sizes; give none"):
        fxpress.load(tmp_path / "bert", sizes={"input_ids": (2, 6)})


def test_what_generates_takes_no_sizes(tmp_path: Path) -> None:
    given = {name: tiny.text(2, 6)[name] for name in ("input_ids", "attention_mask")}
    model = transformers.GPT2LMHeadModel(tiny.gpt2().config).eval()
    fxpress.compile(model, None, given, backend="openvino", cache=True, verify=False).save(tmp_path / "gpt2")
    with pytest.raises(InputError, match="generates, and its cache grows by each token; give no sizes"):
        fxpress.load(tmp_path / "gpt2", sizes={"input_ids": (2, 6)})


def test_integers_of_constant_ranges_are_multiplied() -> None:
    batches = [tiny.text(2, 6), tiny.text(3, 9)]
    compiled = fxpress.compile(
        tiny.bert(), "quantize(int8, mode=static), fuse", tiny.text(), backend="openvino", calibration=batches
    )
    model: Any = compiled._product.runner
    nodes = [node.get_rt_info() for node in model.session._model.get_runtime_model().get_ops()]
    kinds = [n["runtimePrecision"].astype(str) for n in nodes if n["layerType"].astype(str) == "FullyConnected"]
    assert "u8" in kinds and not {"f32", "bf16"} & set(kinds)
    assert compiled.report.cosine is not None and compiled.report.cosine > 0.999


def test_ranges_found_at_each_run_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"whose ranges are found at each run.*mode='static'"):
        fxpress.compile(tiny.bert(), "quantize(int8, mode=dynamic), fuse", tiny.text(), backend="openvino")


@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e4m3"])
def test_weights_alone_are_multiplied_by_floats(weights: str) -> None:
    """Left to itself OpenVINO rounds the inputs of layers whose weights have 8 bits to 8 bits, too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 96)).eval()
    given, passes = (torch.randn(3, 96),), f"quantize({weights}, activations=None)"
    found, expected = (
        fxpress.compile(model, passes, given, backend=name, verify=False)(*given) for name in ("openvino", "eager")
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_activations_of_float8_are_refused() -> None:
    passes = "quantize(float8_e4m3, activations=float8_e4m3)"
    with pytest.raises(LoweringError, match="round no activations to float8; quantize with activations=None"):
        fxpress.compile(torch.nn.Linear(32, 8).eval(), passes, (torch.randn(3, 32),), backend="openvino")


def test_what_has_no_standard_form_is_named() -> None:
    given = tiny.text(2, 30)
    with pytest.raises(LoweringError, match="for ONNX Runtime alone"):
        fxpress.compile(
            tiny.bert(), "replace_attention(lsh, force=True)", given, backend="openvino", calibration=[given]
        )


def test_feed_forward_blocks_run_as_was_measured_in_openvino() -> None:
    """Hidden rows of 1024 numbers begin in one set of the cache: wider ones are a candidate."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(32, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 32)).eval()
    given = (torch.rand(2, 6, 32),)
    compiled = fxpress.compile(block, "fuse", given, backend="openvino", threads=1)
    (choice,) = compiled.report.choices
    assert list(choice["milliseconds"]) == ["Linear+Activation, Linear", "Linear+Activation, Linear, wider rows"]
    assert all(time > 0 for time in choice["milliseconds"].values())
    (first,) = fxpress.compile(block, "fuse", given, backend="openvino", tune=False).report.choices
    assert first["chosen"] == "Linear+Activation, Linear" and not first["milliseconds"]


RUN = """
import sys, numpy, fxpress
found = fxpress.load(sys.argv[1], threads=1)(**dict(numpy.load(sys.argv[2])))
numpy.savez(sys.argv[3], **found)
print("torch" in sys.modules)
"""


def test_a_new_process_gives_the_same_result_without_torch(tmp_path: Path) -> None:
    compiled = fxpress.compile(tiny.bert(), example_inputs=tiny.text(), backend="openvino", threads=1)
    compiled.save(tmp_path / "bert")
    given = tiny.text(3, 7)
    numpy.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in given.items()})
    command = [sys.executable, "-P", "-c", RUN, *(str(tmp_path / name) for name in ("bert", "in.npz", "out.npz"))]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["False"]
    found, expected = numpy.load(tmp_path / "out.npz"), compiled(**given)
    assert all(found[name].tobytes() == expected[name].numpy().tobytes() for name in found)


@needs_bfloat16
def test_matmuls_in_bfloat16(tmp_path: Path) -> None:
    model = tiny.bert()
    compiled = fxpress.compile(model, example_inputs=tiny.text(), backend="openvino", dtype="bfloat16")
    assert compiled.report.precision["dtype"] == "bfloat16"
    assert 30 < compiled.report.precision["sqnr_db"] < 80
    assert "bfloat16 against the model in its own precision" in str(compiled.report)
    found = compiled(**tiny.text())
    assert found.last_hidden_state.dtype is torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    compiled.save(tmp_path / "bert")
    assert json.loads((tmp_path / "bert" / "manifest.json").read_text())["dtype"] == "bfloat16"
    loaded = fxpress.load(tmp_path / "bert")(**tiny.text())
    assert torch.equal(loaded.last_hidden_state, found.last_hidden_state)
    assert compiled.then("", backend="openvino").report.precision["dtype"] == "bfloat16"
    assert compiled.then("", backend="onnx").report.precision == {}


@needs_bfloat16
def test_weights_of_matmuls_and_tables_take_half_the_room() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)).eval()
    compiled = fxpress.compile(model, [], (torch.arange(12)[None],), backend="openvino", dtype="bfloat16")
    assert compiled.report.bytes_after < 0.55 * compiled.report.bytes_before + 2000  # and the graph
    assert compiled.report.precision["sqnr_db"] > 40


@pytest.mark.parametrize("passes", ["fuse", "quantize(int4, group_size=16)"])
def test_rows_that_a_table_does_not_have(passes: str) -> None:
    """OpenVINO gives zeros for them."""
    model = torch.nn.Sequential(torch.nn.Embedding(10, 32), torch.nn.Linear(32, 4)).eval()
    compiled = fxpress.compile(model, passes, (torch.arange(6).reshape(2, 3),), backend="openvino", tune=False)
    assert compiled(torch.tensor([[9, 0]])).shape == (1, 2, 4)
    for wrong in (10, -11):
        with pytest.raises(InputError, match=rf"input '.*' holds {wrong}, the table that it reads has 10 rows"):
            compiled(torch.tensor([[wrong, 0]]))


@needs_bfloat16
def test_a_model_in_bfloat16_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = fxpress.compile(tiny.bert(), example_inputs=tiny.text(), backend="openvino", dtype="bfloat16")
    compiled.save(tmp_path / "bert")

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr("openvino.Core", Core)
    with pytest.raises(InputError, match="does not compute in bfloat16"):
        fxpress.load(tmp_path / "bert")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "computes in float32 or bfloat16, not in float16"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_other_dtypes_are_refused(options: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        fxpress.compile(tiny.bert(), example_inputs=tiny.text(), backend="openvino", **options)


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.compiler.runners.find_spec", lambda name: None)
    with pytest.raises(InputError, match="backend 'openvino' needs the package openvino: pip install openvino"):
        fxpress.compile(tiny.bert(), example_inputs=tiny.text(), backend="openvino")


def test_a_loaded_model_has_no_device(tmp_path: Path) -> None:
    fxpress.compile(torch.nn.Linear(4, 4).eval(), example_inputs=(torch.randn(2, 4),), backend="openvino").save(
        tmp_path / "linear"
    )
    with pytest.raises(InputError, match="of the openvino backend, which runs on the CPU; give no device"):
        fxpress.load(tmp_path / "linear", device="cuda")
