"""Every lowering of every fxpress operator equals the operator's reference, at the example's sizes and at others."""

from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from lowering_cases import ATTENTIONS, CASES, OTHERS, Case, two_rows, vectors
from sampled import sampled
from torch import Tensor, nn

from fxpress.backends.memory import Memory
from fxpress.backends.onnx.choose import choose
from fxpress.backends.onnx.export import save, standard_form, to_onnx, to_standard_onnx
from fxpress.backends.onnx.lowerings.lowering import STANDARD_OPSET
from fxpress.backends.onnx.lowerings.table import LOWERINGS, standard, supported
from fxpress.backends.onnx.session import Session
from fxpress.backends.openvino.session import OpenVinoSession
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.norm import add_rms_norm
from fxpress.ir.ops.rotary import rotary
from fxpress.ir.ops.table import OPERATORS

FEW = (  # of the masks in groups
    "attention, key mask, causal, 4 groups, empty rows give nan",
    "attention, bool mask, causal, 2 groups, empty rows give nan",
    "attention, float mask, causal, 2 groups, empty rows give mean",
    "attention, key mask, 2 groups, empty rows give mean",
)
ALIKE = {
    *({name for name in CASES if "groups, empty rows" in name} - {*FEW}),
    "attention, bool mask of rank 2",
    "attention, bool mask, causal",
    "attention, causal window, all keys",
    "attention, causal, fewer keys",
    "attention, causal, grouped heads",
    "attention, causal, heads of an odd size",
    "attention, causal, more keys",
    "attention, causal, soft cap",
    "attention, float mask, causal",
    "attention, float mask, key mask",
    "attention, grouped heads, key mask",
    "attention, no scale",
    "attention, sinks, causal",
    "attention, soft cap, key mask",
    "attention, wide values",
    "attention, window, cross lengths",
    "add_rms_norm, large eps",
    "gated_linear, no bias",
    "linear_act, no bias",
    "linear_act, quick_gelu",
    "linear_act, silu",
    "mlp, no bias, 1024 hidden columns",
    "mlp, no bias, 24 hidden columns",
    "rms_norm, large eps",
    "rotary, 4 of 8 columns, interleaved",
    "rotary, 4 of 8 columns, one row of angles",
    "rotary, 8 of 8 columns, interleaved, one row of angles",
    "split_linear, no bias",
}
WITH_EMPTY_ROWS = {
    *FEW,
    *(name for name in CASES if "without keys" in name or name.endswith("empty rows")),
    "attention, bias of rank 0",
}


def test_every_operator_has_a_case() -> None:
    """Here, or in a file named after its family, which then names it."""
    without = set(LOWERINGS) - {item.target for item in CASES.values()}
    for target in without:
        entry = OPERATORS[target]
        family = entry.reference.__module__.rpartition(".")[2]
        assert entry.name in (Path(__file__).parent / f"test_{family}.py").read_text(encoding="utf-8"), entry.name


def behind(values: Iterable[onnx_ir.Value]) -> list[onnx_ir.Node]:
    """The nodes that values are computed by, those of branches and loops too."""
    found: dict[onnx_ir.Node, None] = {}
    left = [value.producer() for value in values]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        found[node] = None
        for attribute in node.attributes.values():
            if attribute.type == onnx_ir.AttributeType.GRAPH:
                left += onnx_ir.traversal.RecursiveGraphIterator(attribute.as_graph())
        left += [value.producer() for value in node.inputs if value is not None]
    return list(found)


def is_standard(node: onnx_ir.Node) -> bool:
    return node.domain == "" and onnx.defs.has(node.op_type, STANDARD_OPSET)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(CASES, many=ALIKE))
def test_every_lowering_equals_the_reference(name: str, tmp_path: Path) -> None:
    item = CASES[name]
    node = item.program().calls(item.target)[0]
    candidates = list(dict.fromkeys([*supported(node)[0], *standard(node)[0]]))
    assert candidates
    program = item.program(len(candidates))
    model = to_onnx(program, dict(zip(program.calls(item.target), candidates, strict=True)))
    parts = len(model.graph.outputs) // len(candidates)
    for index, lowering in enumerate(candidates):
        outputs = model.graph.outputs[index * parts : (index + 1) * parts]
        assert lowering.standard == all(is_standard(made) for made in behind(outputs)), lowering.name
    save(model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    for size in ((2, 6), (3, 9), (4, 2), (1, 1)):
        given = item.inputs(*size)
        tensors = [given[tensor.path.rpartition(".")[2]] for tensor in program.signature.inputs]
        found = [torch.from_numpy(array) for array in session.run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = program.run(tensors)
        exact = run_float64(program, tensors)
        for index, lowering in enumerate(candidates):
            part = slice(index * parts, (index + 1) * parts)
            reasons = compare(found[part], expected[part], exact[part]).reasons
            assert reasons == (), (lowering.name, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(CASES, WITH_EMPTY_ROWS))
def test_the_standard_form_equals_the_reference_in_openvino(name: str, tmp_path: Path) -> None:
    program = CASES[name].program()
    save(to_standard_onnx(standard_form(program)), tmp_path / "model.onnx")
    session = OpenVinoSession(tmp_path / "model.onnx", threads=1)
    for size in ((2, 6), (3, 9), (4, 2), (1, 1)):
        given = CASES[name].inputs(*size)
        tensors = [given[tensor.path.rpartition(".")[2]] for tensor in program.signature.inputs]
        found = [torch.from_numpy(array) for array in session.run([tensor.numpy() for tensor in tensors])]
        with torch.no_grad():
            expected = program.run(tensors)
        assert compare(found, expected, run_float64(program, tensors)).reasons == (), size


def test_every_operator_has_a_lowering_that_takes_anything() -> None:
    refused = [
        item.name
        for item in (ATTENTIONS[7], *OTHERS)
        if not supported(next(iter(item.program().calls(item.target))))[0]
    ]
    assert refused == []


def test_grouped_heads_are_refused_by_the_fused_kernel() -> None:
    (node,) = CASES["attention, float mask, causal, 2 groups, empty rows give mean"].program().calls(attention)
    assert "MultiHeadAttention: MultiHeadAttention has no grouped key heads" in supported(node)[1]


@pytest.mark.parametrize(("columns", "reason"), [
    (1024, None),
    (1000, "rows of 1000 numbers begin in several sets of the cache"),
])  # fmt: skip
def test_rows_are_widened_where_they_fall_into_one_cache_set(columns: int, reason: str | None) -> None:
    linear = torch.ops.aten.linear.default
    item = Case("linear", linear, lambda b, n: {"input": torch.randn(b, n, columns)},
                lambda: {"weight": torch.randn(8, columns)})  # fmt: skip
    candidates, reasons = supported(item.program().calls(linear)[0])
    assert [candidate.name for candidate in candidates] == ["Gemm or MatMul", "Gemm or MatMul, wider rows"][
        : 2 - bool(reason)
    ]
    assert reasons == [f"Gemm or MatMul, wider rows: {reason}"] * bool(reason)


def test_rows_are_not_widened_for_a_weight_that_is_computed() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight * 2)

    program = trace(Computed().eval(), bind_example(Computed(), (torch.rand(2, 1024), torch.rand(3, 1024))), None)
    (node,) = program.calls(torch.ops.aten.linear.default)
    assert supported(node)[1] == ["Gemm or MatMul, wider rows: mul is no weight: it would be copied at each run"]


def test_rows_are_not_widened_for_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 1024)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.words(x), self.words.weight)

    program = trace(Tied().eval(), bind_example(Tied(), (torch.tensor([[1, 2]]),)), None)
    (node,) = program.calls(torch.ops.aten.linear.default)
    (reason,) = supported(node)[1]
    assert "weight words.weight is tied: 2 nodes read it" in reason


def test_the_skip_kernels_refuse_other_ranks() -> None:
    flat = Case("flat", add_rms_norm, lambda b, n: {k: v[0] for k, v in two_rows(b, n).items()}, vectors("weight"),
                (("eps", 1e-6),))  # fmt: skip
    (node,) = flat.program().calls(add_rms_norm)
    assert supported(node)[1] == ["SkipSimplifiedLayerNormalization: the kernel takes [batch, length, size] only"]


def test_what_is_known_of_the_angles_decides_for_each_node(tmp_path: Path) -> None:
    """Two rotations of one size: the kernel is a candidate only where the angles are known to come in pairs."""

    class Rotations(nn.Module):
        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            wide = torch.cat((angles, angles), -1).unsqueeze(1)
            other = torch.cat((angles, angles + 1), -1).unsqueeze(1)
            return rotary(rotary(x, wide.cos(), wide.sin()), other.cos(), other.sin())

    model = Rotations().eval()
    program = trace(model, bind_example(model, (torch.rand(2, 4, 6, 8), torch.rand(2, 6, 4))), None)
    chosen, _ = choose(program, memory=Memory("onnx", tmp_path))
    assert all(chosen[node] in supported(node)[0] for node in program.calls(rotary))
    first, second = program.calls(rotary)
    assert [len(supported(node)[0]) for node in (first, second)] == [2, 1]
