"""The form for other runtimes: the ONNX standard alone, integers between Q/DQ, run in OpenVINO beside ONNX Runtime."""

import ast
import socket
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import onnx
import openvino
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils import _pytree as pytree

from fxpress import compile, export_onnx
from fxpress.backends.onnx.files import check_weight_files
from fxpress.backends.onnx.lowerings.lowering import STANDARD_OPSET
from fxpress.backends.onnx.session import plain_session
from fxpress.compiler import hf
from fxpress.compiler.demo import packaged_model
from fxpress.compiler.driver import Compiled
from fxpress.ir.errors import InputError, LoweringError
from fxpress.passes import Fuse, IntegerOnly, Quantize, RemovePadding

SIZES = ((2, 6), (3, 9), (1, 1))  # the example's, another, a single token
Inputs = dict[str, Tensor]


class Runtimes:
    """One file in ONNX Runtime and in OpenVINO, both in fp32 outside the integers, on one thread."""

    def __init__(self, path: Path) -> None:
        self._onnxruntime = plain_session(path, threads=1)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        self.openvino = openvino.Core().compile_model(path, "CPU", options)
        self._names = [item.name for item in self._onnxruntime.get_inputs()]

    def run(self, inputs: Inputs) -> dict[str, list[Tensor]]:
        feed = {name: inputs[name].numpy() for name in self._names}
        found = self.openvino(feed)
        results = {
            "ONNX Runtime": self._onnxruntime.run(None, feed),
            "OpenVINO": [found[output] for output in self.openvino.outputs],
        }
        return {name: [torch.from_numpy(numpy.array(array)) for array in arrays] for name, arrays in results.items()}


@dataclass
class Product:
    """A compiled model, its file in the form for other runtimes, and that file in two of them."""

    compiled: Compiled
    path: Path
    runtimes: Runtimes
    graph: Any = field(init=False)

    def __post_init__(self) -> None:
        onnx.checker.check_model(self.path, full_check=True)
        self.graph = onnx.load(self.path).graph
        self.initializers = {item.name: item for item in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def nodes(self, kind: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type == kind]

    def integer_matmuls(self) -> list[Any]:
        """MatMul nodes of which both operands are dequantized."""
        kinds = [
            [self.makers[name].op_type for name in node.input if name in self.makers] for node in self.nodes("MatMul")
        ]
        return [
            node
            for node, made in zip(self.nodes("MatMul"), kinds, strict=True)
            if made == ["DequantizeLinear", "DequantizeLinear"]
        ]


def product(folder: Path, passes: Any, model: Any = None, inputs: Callable[..., Inputs] = tiny.text) -> Product:
    batches = [inputs(2, 6), inputs(3, 9)]
    compiled = compile(model or tiny.bert(), passes, inputs(), backend="eager", calibration=batches)
    compiled.to_onnx(folder / "model.onnx", form="qdq")
    return Product(compiled, folder / "model.onnx", Runtimes(folder / "model.onnx"))


@pytest.fixture(scope="module", autouse=True)
def _no_network() -> Any:
    """openvino imports its telemetry; whatever it does with it in these tests would be an error."""

    def refused(*_: Any) -> None:
        raise AssertionError("a test opens a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refused)
        patch.setattr(socket, "getaddrinfo", refused)
        yield


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Product:
    return product(tmp_path_factory.mktemp("static"), [Fuse(), Quantize(mode="static", sensitive=None)])


def steps(compiled: Compiled, inputs: Inputs, found: list[Tensor]) -> float:
    """The largest difference from the compiled model in steps: an output's range over the 255 steps of 8 bits."""
    with torch.no_grad():
        expected = pytree.tree_leaves(compiled(**inputs))
    assert len(expected) == len(found)
    return max(
        float((ours - theirs).abs().max() / ((ours.max() - ours.min()) / 255))
        for ours, theirs in zip(expected, found, strict=True)
    )


def test_holds_the_standard_alone(static: Product) -> None:
    model = onnx.load(static.path, load_external_data=False)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", STANDARD_OPSET)]
    assert {node.domain for node in static.graph.node} == {""}


def test_every_linear_is_a_matmul_of_two_dequantized_operands(static: Product) -> None:
    # Six linear layers, of which one matmul serves query, key and value.
    assert len(static.integer_matmuls()) == 5 == len(static.nodes("QuantizeLinear"))
    for node in static.integer_matmuls():
        activation, weight = (static.makers[name] for name in node.input)
        integers, scale, zero_point = (static.initializers[name] for name in weight.input)
        columns = integers.dims[1]
        assert integers.data_type == zero_point.data_type == onnx.TensorProto.INT8
        assert [*scale.dims] == [*zero_point.dims] == [columns]
        assert onnx.helper.get_node_attr_value(weight, "axis") == 1
        assert static.makers[activation.input[0]].op_type == "QuantizeLinear"


def test_ranges_of_activations_are_constants(static: Product) -> None:
    for node in static.nodes("QuantizeLinear"):
        scale, zero_point = (static.initializers[name] for name in node.input[1:])
        assert [*scale.dims] == [*zero_point.dims] == []
        assert zero_point.data_type == onnx.TensorProto.UINT8


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_runtimes_give_what_the_compiled_model_gives(static: Product, size: tuple[int, int]) -> None:
    inputs = tiny.text(*size)
    for name, found in static.runtimes.run(inputs).items():
        assert steps(static.compiled, inputs, found) < 1, name


def test_openvino_multiplies_the_integers(static: Product) -> None:
    nodes = [node.get_rt_info() for node in static.runtimes.openvino.get_runtime_model().get_ops()]
    found = [(node["layerType"].astype(str), node["runtimePrecision"].astype(str)) for node in nodes]
    assert [precision for kind, precision in found if kind == "FullyConnected"] == ["u8"] * 5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("by token", {"granularity": "token"}),
        pytest.param("by tensor", {"granularity": "tensor"}, marks=pytest.mark.exhaustive),
        ("weights alone", {"activations": None}),
        pytest.param("4 bits", {"weights": "int4", "group_size": 16}, marks=pytest.mark.exhaustive),
        ("4 bits, not symmetric", {"weights": "int4", "symmetric": False}),
        ("4 bits and activations of 8", {"weights": "int4", "activations": "int8"}),
        ("left for training", {"mode": "static", "fold": False}),
        ("not quantized", None),
    ],
)
@pytest.mark.slow
def test_other_forms_of_quantization_run_in_both(tmp_path: Path, name: str, options: dict[str, Any] | None) -> None:
    quantize = [] if options is None else [Quantize(sensitive=None, **options)]
    made = product(tmp_path, [Fuse(), *quantize])
    assert {node.domain for node in made.graph.node} == {""}
    assert bool(made.nodes("DequantizeLinear")) == (options is not None)
    for size in SIZES:
        inputs = tiny.text(*size)
        for runtime, found in made.runtimes.run(inputs).items():
            assert steps(made.compiled, inputs, found) < 1, (name, runtime, size)


@pytest.mark.slow
def test_padding_is_removed_in_both(tmp_path: Path) -> None:
    made = product(tmp_path, [RemovePadding(), Fuse(), Quantize(mode="static", sensitive=None)])
    assert made.nodes("NonZero")
    for size in SIZES:
        inputs = tiny.text(*size)
        for runtime, found in made.runtimes.run(inputs).items():
            assert steps(made.compiled, inputs, found) < 1, (runtime, size)


@pytest.mark.slow
def test_integers_of_4_bits_are_stored_two_a_byte(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)).eval()
    x = torch.randn(5, 100)
    compiled = compile(model, [Quantize("int4", group_size=32)], (x,), backend="eager")
    compiled.to_onnx(tmp_path / "model.onnx", form="qdq")
    made = Product(compiled, tmp_path / "model.onnx", Runtimes(tmp_path / "model.onnx"))
    weights = [made.initializers[node.input[0]] for node in made.nodes("DequantizeLinear")]
    assert [(item.data_type, [*item.dims]) for item in weights] == [
        (onnx.TensorProto.INT4, [512, 128]),  # whole blocks: the last one is filled up with zeros
        (onnx.TensorProto.INT4, [64, 512]),
    ]
    assert sum(len(item.raw_data) for item in weights) == (512 * 128 + 64 * 512) / 2
    with torch.no_grad():
        ours = compiled(x)
    step = (ours.max() - ours.min()) / 255
    for name, (found,) in made.runtimes.run({"input": x}).items():
        assert (found - ours).abs().max() < step, name


@pytest.mark.slow
def test_a_causal_model_runs_in_both(tmp_path: Path) -> None:
    made = product(tmp_path, [Fuse(), Quantize(mode="static", sensitive=None)], tiny.gpt2())
    for size in SIZES:
        inputs = tiny.text(*size)
        for runtime, found in made.runtimes.run(inputs).items():
            assert steps(made.compiled, inputs, found) < 1, (runtime, size)


def test_an_unknown_form_is_refused_before_any_work(static: Product, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown form 'qdp': did you mean 'qdq'"):
        static.compiled.to_onnx(tmp_path / "model.onnx", form="qdp")
    with pytest.raises(InputError, match="unknown form 'qdp'"):
        export_onnx(torch.nn.Linear(1, 1), tmp_path / "model.onnx", "never parsed(", form="qdp")


def test_integers_alone_are_refused(tmp_path: Path) -> None:
    batches = [tiny.inputs(2, 6), tiny.inputs(3, 9)]
    compiled = compile(tiny.encoder(), [IntegerOnly()], batches[0], backend="eager", calibration=batches, verify=False)
    with pytest.raises(LoweringError, match=r"fxpress\.integer_linear: MatMulInteger: for ONNX Runtime alone"):
        compiled.to_onnx(tmp_path / "model.onnx", form="qdq")
    assert not list(tmp_path.iterdir())


def test_the_runtime_form_needs_the_onnx_backend(static: Product, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only the onnx backend"):
        static.compiled.to_onnx(tmp_path / "model.onnx")


def test_files_are_not_overwritten(static: Product) -> None:
    with pytest.raises(InputError, match="exists already"):
        static.compiled.to_onnx(static.path, form="qdq")


def test_weights_lie_beside_the_model(static: Product) -> None:
    check_weight_files(static.path, {"model.safetensors"})


def docstrings(count: int) -> list[str]:
    """Docstrings of the standard library's functions, in the order of modules and lines."""
    found: dict[str, None] = {}
    for module in (ast, socket, textwrap):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        found |= dict.fromkeys(text for text in map(ast.get_docstring, functions) if text and len(text) > 40)
    assert len(found) >= count
    return list(found)[:count]


@pytest.mark.slow
def test_minilm_runs_in_both_close_to_fp32(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, tokenizer = hf.load_model(packaged_model()), hf.load_tokenizer(packaged_model())
    texts = docstrings(48)

    def tokens(chosen: list[str]) -> Inputs:
        return dict(tokenizer(chosen, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    batches = [tokens(texts[start : start + 8]) for start in range(0, 32, 8)]
    compiled = compile(model, [Fuse(), Quantize(mode="static")], batches[0], backend="eager", calibration=batches)
    compiled.to_onnx(tmp_path / "qdq.onnx", form="qdq")
    export_onnx(model, tmp_path / "fp32.onnx", example_inputs=batches[0], form="qdq", verify=False)
    size, whole = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("qdq", "fp32"))
    assert size < 0.27 * whole
    runtimes = Runtimes(tmp_path / "qdq.onnx")
    cosines: dict[str, list[Tensor]] = {"ONNX Runtime": [], "OpenVINO": []}
    for inputs in (tokens(texts[32:40]), tokens(texts[40:])):
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[real]
            ours = compiled(**inputs).last_hidden_state[real]
        step = (ours.max() - ours.min()) / 255
        for name, found in runtimes.run(inputs).items():
            # Rounding that falls the other way adds up over 25 matmuls: a number may be several steps off, few are.
            assert (found[0][real] - ours).abs().mean() < 0.5 * step, name
            cosines[name].append(cosine_similarity(found[0][real], expected, -1))
    means = {name: float(torch.cat(found).mean()) for name, found in cosines.items()}
    assert min(means.values()) >= 0.97, means
