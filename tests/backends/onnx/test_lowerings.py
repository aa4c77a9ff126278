"""Every lowering of every fxpress operator equals the operator's reference, at the example's sizes and at others."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from sampled import sampled
from torch import Tensor, nn
from torch.export import Dim

from fxpress.backends.memory import Memory
from fxpress.backends.onnx.choose import choose
from fxpress.backends.onnx.export import save, standard_form, to_onnx, to_standard_onnx
from fxpress.backends.onnx.lowerings.lowering import STANDARD_OPSET
from fxpress.backends.onnx.lowerings.table import LOWERINGS, standard, supported
from fxpress.backends.onnx.session import Session
from fxpress.backends.openvino.session import OpenVinoSession
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.linear import ACTIVATIONS, gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from fxpress.ir.ops.rotary import rotary
from fxpress.ir.ops.table import OPERATORS

Inputs = dict[str, Tensor]


class Calls(nn.Module):
    """A model of equal calls; `weights` are parameters, everything else is an input."""

    def __init__(self, target: Any, weights: Inputs, options: dict[str, Any], count: int) -> None:
        super().__init__()
        self.target, self.options, self.count = target, options, count
        for name, value in weights.items():
            self.register_parameter(f"weight_{name}", nn.Parameter(value))
        self.names = list(weights)

    def forward(self, inputs: Inputs) -> Any:
        weights = {name: getattr(self, f"weight_{name}") for name in self.names}
        return [self.target(**inputs, **weights, **self.options) for _ in range(self.count)]


@dataclass(frozen=True)
class Case:
    """An operator, its inputs at a batch and length, its weights and other options."""

    name: str
    target: Any
    inputs: Callable[[int, int], Inputs]
    weights: Callable[[], Inputs] = dict
    options: tuple[tuple[str, Any], ...] = ()
    call: Callable[..., Any] | None = None  # computes the operator's arguments from the inputs; None: they are these

    def program(self, count: int = 1) -> Program:
        torch.manual_seed(0)
        model = Calls(self.call or self.target, self.weights(), dict(self.options), count).eval()
        example, other = self.inputs(2, 6), self.inputs(3, 9)
        # Equal sizes are one size, as in a model.
        dims = {2: Dim("batch"), 6: Dim("length", min=2)}
        varying = {
            name: {
                axis: dims.get(tensor.shape[axis], Dim.AUTO)
                for axis, size in enumerate(other[name].shape)
                if size != tensor.shape[axis]
            }
            for name, tensor in example.items()
        }
        return trace(model, bind_example(model, {"inputs": example}), {"inputs": varying})


def heads(batch: int, length: int, keys: int | None = None, groups: int = 4, size: int = 8) -> Inputs:
    torch.manual_seed(batch * 100 + length)
    keys = keys or length
    return {
        "query": torch.randn(batch, 4, length, size),
        "key": torch.randn(batch, groups, keys, size),
        "value": torch.randn(batch, groups, keys, size),
    }


def key_mask(batch: int, keys: int, none: bool = False) -> Tensor:
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[-1, keys - keys // 3 :] = False
    mask[0] &= not none
    return mask


def left_padded(batch: int, keys: int) -> Tensor:
    return key_mask(batch, keys).flip(1)


def bool_mask(batch: int, length: int, keys: int, none: bool = False) -> Tensor:
    mask = torch.rand(batch, 1, length, keys) > 0.3
    mask[..., 0] = True
    if none:
        mask[0, :, length // 2] = False
    return mask


def float_mask(batch: int, length: int, keys: int, none: bool = False) -> Tensor:
    shut = ~bool_mask(batch, length, keys, none)
    return torch.randn(batch, 1, length, keys).masked_fill(shut, -math.inf)


def case(name: str, inputs: Callable[[int, int], Inputs], **options: Any) -> Case:
    return Case(f"attention, {name}", attention, inputs, options=tuple(options.items()))


def bottom_right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Sizes as arguments."""
    result: Tensor = attention(query, key, value, left=key.shape[2], right=key.shape[2] - query.shape[2])
    return result


ATTENTIONS = [
    case("no mask", heads),
    case("scale", heads, scale=0.7),
    case("cross lengths", lambda b, n: heads(b, n, 2 * n + 1)),
    case("wide values", lambda b, n: {**heads(b, n), "value": torch.randn(b, 4, n, 12)}),
    case("causal, square", heads, right=0),
    case("causal, more keys", lambda b, n: heads(b, n, 2 * n + 1), right=0),
    case("causal, fewer keys", lambda b, n: heads(b, 2 * n + 1, n), right=0),
    case("grouped heads", lambda b, n: heads(b, n, groups=2)),
    case("grouped heads, key mask", lambda b, n: {**heads(b, n, groups=2), "key_mask": key_mask(b, n)}),
    case("key mask", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n)}),
    case("key mask without keys", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n, none=True)}),
    case("key mask, causal", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n)}, right=0),
    case("bool mask", lambda b, n: {**heads(b, n), "bias": bool_mask(b, n, n)}),
    case("bool mask, empty rows", lambda b, n: {**heads(b, n), "bias": bool_mask(b, n, n, none=True)}),
    case("bool mask, causal", lambda b, n: {**heads(b, n), "bias": bool_mask(b, n, n)}, right=0),
    case("bool mask of rank 2", lambda b, n: {**heads(b, n), "bias": bool_mask(1, n, n)[0, 0]}),
    case("float mask", lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n)}),
    case("float mask, empty rows", lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n, none=True)}),
    case(
        "float mask, rows of the lowest number",
        lambda b, n: {
            **heads(b, n),
            "bias": float_mask(b, n, n, none=True).clamp(min=torch.finfo(torch.float32).min),
        },
    ),
    case("float mask, causal", lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n)}, right=0),
    case(
        "float mask, key mask",
        lambda b, n: {**heads(b, n), "bias": float_mask(b, n, n), "key_mask": key_mask(b, n)},
        scale=0.3,
    ),
    case("bias a head, one row", lambda b, n: {**heads(b, n), "bias": torch.randn(1, 4, 1, n)}),
    case("soft cap", heads, softcap=2.0),
    case("soft cap, key mask", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n)}, softcap=2.0),
    case("sinks", lambda b, n: {**heads(b, n), "sinks": torch.arange(4.0)}),
    case("sinks, causal", lambda b, n: {**heads(b, n, groups=2), "sinks": torch.arange(4.0)}, right=0),
    case(
        "sinks, key mask, causal",
        lambda b, n: {**heads(b, n), "sinks": torch.arange(4.0), "key_mask": key_mask(b, n, none=True)},
        right=0,
    ),
    case("causal, grouped heads", lambda b, n: heads(b, n, groups=2), right=0),
    case("causal, soft cap", lambda b, n: heads(b, n, groups=2), right=0, softcap=2.0),
    case("causal, heads of an odd size", lambda b, n: heads(b, n, groups=2, size=5), right=0),
    case("causal window, heads of an odd size", lambda b, n: heads(b, n, groups=2, size=5), left=2, right=0),
    case("causal window", lambda b, n: heads(b, n, groups=2), left=2, right=0),
    case("causal window of one", heads, left=0, right=0),
    case("causal window, all keys", heads, left=50, right=0),
    case(
        "causal window, key mask", lambda b, n: {**heads(b, n), "key_mask": key_mask(b, n, none=True)}, left=2, right=0
    ),
    *[
        Case(f"attention, causal from the bottom right, {name}", attention, inputs, call=bottom_right)
        for name, inputs in (
            ("more keys", lambda b, n: heads(b, n, 2 * n + 1)),
            ("fewer keys", lambda b, n: heads(b, 2 * n + 1, n, groups=2)),
        )
    ],
    case("window", heads, left=2, right=1),
    case("window without the own place", heads, left=-1, right=3),
    case("window, cross lengths", lambda b, n: heads(b, 2 * n + 1, n), left=1, right=1),
    *[
        case(
            f"{name}, empty rows give {empty}",
            lambda b, n, none=none, groups=groups: {**heads(b, n, groups=groups), **none(b, n)},
            empty=empty,
            **options,
        )
        for empty in ("nan", "mean")
        for groups in (4, 2)
        for name, none, options in (
            (f"key mask, {groups} groups", lambda b, n: {"key_mask": key_mask(b, n, none=True)}, {}),
            (f"key mask, causal, {groups} groups", lambda b, n: {"key_mask": left_padded(b, n)}, {"right": 0}),
            (f"bool mask, causal, {groups} groups", lambda b, n: {"bias": bool_mask(b, n, n, none=True)}, {"right": 0}),
            (
                f"float mask, causal, {groups} groups",
                lambda b, n: {"bias": float_mask(b, n, n, none=True)},
                {"right": 0},
            ),
        )
    ],
    case("key mask, causal, left padded", lambda b, n: {**heads(b, n), "key_mask": left_padded(b, n)}, right=0),
    case("negative scale", heads, scale=-0.7),
    case("no scale", heads, scale=0.0),
]


def rows(batch: int, length: int) -> Inputs:
    torch.manual_seed(batch * 100 + length)
    return {"input": torch.randn(batch, length, 16)}


def two_rows(batch: int, length: int) -> Inputs:
    return {**rows(batch, length), "residual": torch.randn(batch, length, 16)}


def vectors(*names: str) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(16) for name in names}


def linear(out: int, bias: bool = True) -> Callable[[], Inputs]:
    return lambda: {"weight": torch.randn(out, 16)} | ({"bias": torch.randn(out)} if bias else {})


def gates(bias: str) -> Callable[[], Inputs]:
    """The weights of a gated linear layer, and the biases named in `bias`."""
    return lambda: (
        {"gate_weight": torch.randn(24, 16), "up_weight": torch.randn(24, 16)}
        | {name: torch.randn(24) for name in bias.split()}
    )


def wide_rows(batch: int, length: int) -> Inputs:
    """Rows of 1024 numbers: 4096 bytes."""
    torch.manual_seed(batch * 100 + length)
    return {"input": torch.randn(batch, length, 1024)}


def wide_weights(names: str) -> Callable[[], Inputs]:
    """Weights [8, 1024] and biases [8]."""
    return lambda: {name: torch.randn(*((8,) if "bias" in name else (8, 1024))) for name in names.split()}


def block(hidden: int, names: str) -> Callable[[], Inputs]:
    """The weights of a feed-forward block of 16 columns, those in `names`."""
    shapes = {"down_weight": (16, hidden), "down_bias": (16,), "up_bias": (hidden,), "gate_bias": (hidden,)}
    return lambda: {name: torch.randn(shapes.get(name, (hidden, 16))) for name in names.split()}


def no_bias(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, None) for name in names)


def turned(target: Any, columns: int, interleaved: bool, batch_angles: bool = True) -> Callable[..., Any]:
    """`rotary` of angles that are computed in the program, one a pair, different in each row of the batch."""

    def call(input: Tensor, angles: Tensor) -> Tensor:
        angles = angles if batch_angles else angles[:1]
        wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        return target(input, wide.cos().unsqueeze(1), wide.sin().unsqueeze(1), interleaved)

    return call


def angled(columns: int) -> Callable[[int, int], Inputs]:
    return lambda b, n: {"input": torch.randn(b, 4, n, 8), "angles": torch.randn(b, n, columns // 2)}


def free_angles(batch: int, length: int) -> Inputs:
    """cos and sin as inputs: nothing is known of them."""
    given = {name: torch.randn(batch, 1, length, 8) for name in ("cos", "sin")}
    return {"input": torch.randn(batch, 4, length, 8), **given}


ROTARIES = [
    Case(f"rotary, {columns} of 8 columns{kind}{rows}", rotary, angled(columns),
         call=turned(rotary, columns, bool(kind), not rows))
    for columns in (8, 4)
    for kind in ("", ", interleaved")
    for rows in ("", ", one row of angles")
]  # fmt: skip
OTHERS = [
    *ROTARIES,
    Case("rotary, any angles", rotary, free_angles),
    Case("gated_linear", gated_linear, rows, gates("gate_bias up_bias"), (("activation", "silu"),)),
    Case(
        "gated_linear, no bias",
        gated_linear,
        rows,
        gates(""),
        (*no_bias("gate_bias", "up_bias"), ("activation", "gelu_tanh")),
    ),
    Case(
        "gated_linear, one bias", gated_linear, rows, gates("up_bias"), (*no_bias("gate_bias"), ("activation", "relu"))
    ),
    Case("rms_norm, no weight", rms_norm, rows, options=(("weight", None), ("eps", 1e-5))),
    Case("add_rms_norm, no weight", add_rms_norm, two_rows, options=(("weight", None), ("eps", 1e-5))),
    Case("add_layer_norm, no bias", add_layer_norm, two_rows, vectors("weight"), (("bias", None), ("eps", 1e-5))),
    Case("add_layer_norm, no weight", add_layer_norm, two_rows, vectors("bias"), (("weight", None), ("eps", 1e-5))),
    Case("rms_norm", rms_norm, rows, vectors("weight"), (("eps", 1e-5),)),
    Case("rms_norm, large eps", rms_norm, rows, vectors("weight"), (("eps", 0.3),)),
    Case("add_rms_norm", add_rms_norm, two_rows, vectors("weight"), (("eps", 1e-6),)),
    Case("add_rms_norm, large eps", add_rms_norm, two_rows, vectors("weight"), (("eps", 0.3),)),
    Case("add_layer_norm", add_layer_norm, two_rows, vectors("weight", "bias"), (("eps", 1e-5),)),
    Case("add_layer_norm, large eps", add_layer_norm, two_rows, vectors("weight", "bias"), (("eps", 0.3),)),
    *[
        Case(f"linear_act, {name}", linear_act, rows, linear(24), (("activation", name),))
        for name in sorted(ACTIVATIONS)
    ],
    *[
        Case(
            f"mlp, {name}, {hidden} hidden columns",
            mlp,
            rows,
            block(hidden, names),
            (*no_bias(*missing), ("activation", activation)),
        )
        for hidden in (24, 1024)
        for name, names, missing, activation in (
            ("gelu", "up_weight up_bias down_weight down_bias", (), "gelu"),
            ("no bias", "up_weight down_weight", ("up_bias", "down_bias"), "relu"),
            ("gated", "gate_weight up_weight down_weight", ("up_bias", "down_bias"), "silu"),
            ("gated, biases", "gate_weight gate_bias up_weight up_bias down_weight down_bias", (), "gelu_tanh"),
        )
    ],
    Case(
        "mlp of a matrix",
        mlp,
        lambda b, n: {"input": rows(b, n)["input"].flatten(0, 1)},
        block(24, "up_weight up_bias down_weight"),
        (*no_bias("down_bias"), ("activation", "gelu")),
    ),
    Case("linear, rows of 4096 bytes", torch.ops.aten.linear.default, wide_rows, wide_weights("weight bias")),
    Case(
        "split_linear, rows of 4096 bytes", split_linear, wide_rows, wide_weights("weight bias"), (("sizes", [3, 5]),)
    ),
    Case(
        "linear_act, rows of 4096 bytes", linear_act, wide_rows, wide_weights("weight bias"), (("activation", "silu"),)
    ),
    Case(
        "gated_linear, rows of 4096 bytes",
        gated_linear,
        wide_rows,
        wide_weights("gate_weight up_weight"),
        (*no_bias("gate_bias", "up_bias"), ("activation", "silu")),
    ),
    Case("linear", torch.ops.aten.linear.default, rows, linear(24)),
    Case("linear, no bias", torch.ops.aten.linear.default, rows, linear(24, bias=False)),
    Case("linear_act, no bias", linear_act, rows, linear(24, bias=False), (("bias", None), ("activation", "gelu"))),
    Case("split_linear", split_linear, rows, linear(24), (("sizes", [12, 4, 8]),)),
    Case("split_linear, no bias", split_linear, rows, linear(24, bias=False), (("bias", None), ("sizes", [20, 4]))),
]
CASES = {item.name: item for item in (*ATTENTIONS, *OTHERS)}
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
WITH_EMPTY_ROWS = {*FEW, *(name for name in CASES if "without keys" in name or name.endswith(", empty rows"))}


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
