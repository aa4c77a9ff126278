"""The report of pruning: multiplications and parameters before and after, what is left by layer, and in words."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, nn

from fxpress import compile
from fxpress.compiler.driver import Compiled
from fxpress.compiler.pipeline import counted, has_masks, parameters, zeros
from fxpress.compiler.report import PassReport, Report, render
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.integer import integer_linear
from fxpress.ir.ops.linear import gated_linear, linear_act, mlp, split_linear
from fxpress.ir.ops.quantize import int4_linear, int8_linear, pack_int4
from fxpress.passes import MaskWeights

prune = partial(MaskWeights, method="random")


# --- multiplications ---------------------------------------------------------------------------------------------

X = normal(2, 5, 8)  # 10 rows
W, B, DOWN = normal(12, 8), normal(12), normal(8, 12)
HEADS = normal(2, 4, 5, 8)
SCORES = 2 * 4 * 5 * 5 * 8  # of four heads, as many as their sums of values
BYTES = torch.ones(2, 5, 8, dtype=torch.int8)
ONE = torch.tensor(1.0)

MULTIPLICATIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), (X,), 10 * 8 * 12),
    "matmul": (lambda m, x: x @ x.mT, (X,), 2 * 5 * 5 * 8),
    "convolution": (lambda m, x: F.conv1d(x, m.w[:, :5, None]), (X,), 2 * 8 * 5 * 12),
    "linear_act": (lambda m, x: linear_act(x, m.w, m.b, "gelu"), (X,), 10 * 8 * 12),
    "gated_linear": (lambda m, x: gated_linear(x, m.w, m.w, None, None, "silu"), (X,), 2 * 10 * 8 * 12),
    "mlp": (lambda m, x: mlp(x, m.w, m.b, m.down, None, "relu"), (X,), 2 * 10 * 8 * 12),
    "gated mlp": (lambda m, x: mlp(x, m.w, None, m.down, None, "relu", m.w, None), (X,), 3 * 10 * 8 * 12),
    "split_linear": (lambda m, x: split_linear(x, m.w, None, [4, 8]), (X,), 10 * 8 * 12),
    "attention": (lambda m, x: attention(x, x, x), (HEADS,), 2 * SCORES),
    "attention in grouped heads": (lambda m, x: attention(x, x[:, :2], x[:, :2]), (HEADS,), 2 * SCORES),
    "causal attention: hidden scores count too": (lambda m, x: attention(x, x, x, right=0), (HEADS,), 2 * SCORES),
    "torch's attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), (HEADS,), 2 * SCORES),
    "torch's attention, values of other width": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x[..., :3]), (HEADS,), SCORES + SCORES * 3 // 8
    ),
    "int8_linear": (lambda m, x: int8_linear(x, ONE, None, m.w.to(torch.int8), m.b[:, None], None), (BYTES,), 960),
    "int4_linear": (lambda m, x: int4_linear(x, pack_int4(m.w.to(torch.int8)), m.w[:, :1], None, None), (X,), 960),
    "integer_linear": (lambda m, x: integer_linear(x, m.w.to(torch.int8), None), (BYTES,), 960),
    "by element: none": (lambda m, x: x * x, (X,), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", MULTIPLICATIONS)
def test_multiplications_are_counted(case: str) -> None:
    function, examples, expected = MULTIPLICATIONS[case]
    made = program(function, *examples, dynamic=None, w=W, b=B, down=DOWN)
    outputs, count = counted(made, examples)
    assert count == expected
    assert all(torch.equal(a, b) for a, b in zip(outputs, made.run(examples), strict=True))


def encoder_macs(batch: int, length: int, heads: int = 4, hidden: int = 32) -> int:
    """Of `tiny.encoder()`, heads of 4 numbers and a width of 16: its six linear layers, and attention."""
    rows = batch * length
    return rows * (4 * 16 * 4 * heads + 2 * 16 * hidden) + 2 * batch * heads * length * length * 4


@pytest.fixture(scope="module")
def fused() -> Report:
    return compile(tiny.encoder(), example_inputs=tiny.inputs(2, 6), backend="eager").report


def test_fused_operators_multiply_as_many_numbers(fused: Report) -> None:
    assert fused.macs_before == fused.macs_after == encoder_macs(2, 6)


def test_a_report_without_pruning_does_not_speak_of_it(fused: Report) -> None:
    assert fused.zeros is None and not any(item.sparsity for item in fused.passes)
    assert not any(word in str(fused) for word in ("multiplications", "parameters", "speed-up", "what pruning left"))


def test_without_verification_nothing_is_run_to_be_counted() -> None:
    passes = [prune(0.5, pattern="neurons")]
    report = compile(tiny.encoder(), passes, tiny.inputs(), backend="eager", verify=False).report
    assert report.macs_before is None and report.macs_after is None
    assert "parameters: 3.02 k -> 2.5 k\n" in report.summary() and "multiplications" not in report.summary()


# --- parameters --------------------------------------------------------------------------------------------------


def size(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_tied_weights_count_once() -> None:
    model = tiny.gpt2()
    report = compile(model, example_inputs=tiny.text(), backend="eager", verify=False).report
    assert report.parameters_before == report.parameters_after == size(model)


@pytest.mark.parametrize(
    "passes",
    [
        "quantize(int8)",
        "quantize(int8, fold=False)",
        "quantize(int4)",
        "quantize(int4, activations=int8)",
        "integer_only",
    ],
)
def test_quantized_weights_count_as_before_and_their_scales_do_not(passes: str) -> None:
    model = tiny.bert()
    compiled = compile(model, passes, tiny.text(), backend="eager", calibration=[tiny.text()], verify=False)
    assert compiled.report.parameters_after == compiled.report.parameters_before == size(model)


def test_frozen_weights_count_though_they_are_buffers_once_packed() -> None:
    model = tiny.encoder().requires_grad_(False)
    report = compile(model, example_inputs=tiny.inputs(), backend="eager", verify=False).report
    assert report.parameters_before == report.parameters_after == size(model)


# --- pruning -----------------------------------------------------------------------------------------------------


def pruned(*passes: Any, backend: str = "eager") -> Compiled:
    return compile(tiny.encoder(), list(passes), tiny.inputs(2, 6), backend=backend)


@dataclass
class Pruned:
    """A model compiled with each kind of pruning."""

    cut: Compiled
    zeroed: Compiled
    masked: Compiled


@pytest.fixture(scope="module")
def case() -> Pruned:
    both = "heads+neurons"
    return Pruned(
        pruned(prune(0.5, pattern=both)), pruned(prune(pattern="2:4")), pruned(prune(0.5, pattern=both, fold=False))
    )


def test_what_is_cut_is_not_multiplied(case: Pruned) -> None:
    report = case.cut.report
    assert report.macs_before == encoder_macs(2, 6)
    assert report.macs_after == encoder_macs(2, 6, heads=2, hidden=16)
    assert report.parameters_before == size(tiny.encoder())
    assert report.parameters_after == parameters(case.cut.program) == size(case.cut.program.module)
    assert report.zeros == 0
    assert "multiplications: 26.9 k -> 13.4 k (50%) at the example's sizes; parameters: 3.02 k -> 1.96 k" in str(report)
    assert "speed-up" not in str(report)


def test_zeros_are_multiplied_and_counted(case: Pruned) -> None:
    report = case.zeroed.report
    assert report.macs_after == report.macs_before and report.parameters_after == report.parameters_before
    assert report.zeros == zeros(case.zeroed.program)
    assert report.passes[-1].sparsity[0] == {"layer": "query", "numbers": 256, "zeros": 128, "sqnr_db": None}
    assert "(100%)" in str(report)
    assert (
        "no speed-up here, masks kept: 50% of the weights are zero, but the eager backend multiplies them all; "
        "pattern='neurons' or 'heads' cuts"
    ) in report.summary()


def test_masks_are_no_parameters_and_bring_no_speed(case: Pruned) -> None:
    report = case.masked.report
    assert report.parameters_after == report.parameters_before == size(tiny.encoder())
    assert report.macs_after == report.macs_before
    assert report.masked and has_masks(case.masked.program)
    assert "multiplies them all; fold cuts heads and neurons that are masked" in report.summary()


def test_folding_masks_reports_what_it_cut(case: Pruned) -> None:
    report = case.masked.then("fold", backend="eager").report
    assert (report.macs_before, report.macs_after) == (encoder_macs(2, 6), encoder_macs(2, 6, heads=2, hidden=16))
    assert report.zeros == 0 and not report.masked and "(50%)" in report.summary()


def test_folding_single_weights_reports_what_it_did_not() -> None:
    report = pruned(prune(0.5, fold=False)).then("fold", backend="eager").report
    assert report.zeros == 0.5 and "no speed-up here" in report.summary()


@pytest.mark.parametrize(
    "later", ["fuse", "quantize(int8)", "quantize(int8, fold=False)", "quantize(int4, symmetric=True), fuse"]
)
def test_zeros_are_found_in_what_later_passes_make_of_the_weights(later: str) -> None:
    compiled = compile(
        tiny.encoder(), f"mask_weights(0.5, random), {later}", tiny.inputs(), backend="eager", verify=False
    )
    found = compiled.report.zeros
    assert found is not None and 0.5 <= found < 0.65  # rounding to few bits makes more


@pytest.mark.parametrize("options", ["", ", group_size=16", ", fold=False", ", weights=int4"])
def test_zeros_are_found_where_integers_have_a_zero_point(options: str) -> None:
    later = f"quantize(activations=None, symmetric=False{options})"
    report = compile(
        tiny.encoder(), f"mask_weights(0.5, random), {later}", tiny.inputs(), backend="eager", verify=False
    ).report
    assert report.zeros is not None and 0.5 <= report.zeros < 0.65


def test_zeros_that_stay_beside_what_is_cut() -> None:
    report = pruned(prune(0.5, pattern="neurons"), prune(0.5, layers=["query"])).report
    assert report.zeros == 128 / (4 * 256 + 2 * 256)
    assert "no further speed-up here, masks kept: 8% of the weights are zero" in report.summary()


def test_a_little_that_is_zero_is_no_lack_of_speed() -> None:
    model = tiny.encoder()
    with torch.no_grad():
        model.up.weight[0, :3] = 0
    report = compile(model, [prune(0.0)], tiny.inputs(), backend="eager").report
    assert report.zeros == 3 / (4 * 256 + 2 * 512) and "speed-up" not in report.summary()


@pytest.mark.slow
def test_the_onnx_backend_is_named() -> None:
    report = pruned(prune(pattern="2:4"), backend="onnx").report
    assert "no speed-up here, masks kept: 50% of the weights are zero, but the onnx backend" in report.summary()
    assert report.macs_after == report.macs_before


# --- outputs of another shape --------------------------------------------------------------------------------------


def llama() -> Any:
    """Four groups of two heads."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


SMALLER = {
    "gpt2": (tiny.gpt2, "past_key_values.key_cache.0, past_key_values.value_cache.0: [2, 2, 6, 8] -> [2, 1, 6, 8]"),
    "llama": (
        llama,
        "past_key_values.key_cache.0 to past_key_values.value_cache.1 (4): [2, 4, 6, 4] -> [2, 2, 6, 4]",
    ),
}


@pytest.mark.parametrize("backend", ["eager", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALLER)
def test_a_cache_of_fewer_heads_is_listed_and_left_out_of_the_error(name: str, backend: str) -> None:
    make, listed = SMALLER[name]
    compiled = compile(make(), [prune(0.5, pattern="heads")], tiny.text(), backend=backend)
    report = compiled.report
    assert f"\noutputs with fewer heads: {listed}\n" in report.summary()
    assert not any("past_key_values" in reason for reason in report.reasons)
    assert report.equal is False and report.sqnr_db is not None and 0 < report.sqnr_db < 60
    assert report.passes[-1].sqnr_db == pytest.approx(report.sqnr_db, abs=0.5)  # of the logits, as that of the whole
    verdict = compiled.verify(tiny.text(3, 7))  # names them, too
    assert sum("past_key_values" in reason for reason in verdict.reasons) == len(report.reshaped) and verdict.errors


class GivesHeads(nn.Module):
    """Gives its keys alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return k, y.argmax(-1)


def test_where_all_numbers_have_another_shape_no_error_is_measured() -> None:
    compiled = compile(GivesHeads().eval(), [prune(0.5, pattern="heads")], (normal(2, 5, 8),), backend="eager")
    report = compiled.report
    assert list(report.reshaped.values()) == [[[2, 2, 5, 4], [2, 1, 5, 4]]]
    assert (report.equal, report.sqnr_db, report.passes[-1].sqnr_db) == (False, None, None)
    assert "error against fp64: not measured (NOT equal to eager PyTorch)" in report.summary()
    json.dumps(report.as_dict(), allow_nan=False)


# --- as data, and as text --------------------------------------------------------------------------------------------


def test_the_data_and_back(case: Pruned) -> None:
    for compiled in (case.cut, case.zeroed, case.masked):
        data = json.loads(json.dumps(compiled.report.as_dict(), allow_nan=False))
        again = Report.from_dict(data)
        assert again.as_dict() == data
        assert (again.zeros, again.macs_after) == (compiled.report.zeros, compiled.report.macs_after)
        assert again.passes[-1].sparsity == compiled.report.passes[-1].sparsity
        assert "what pruning left" in str(again)


def test_data_of_before_there_was_pruning(case: Pruned) -> None:
    data = case.cut.report.as_dict()
    for name in ("macs", "parameters"):
        del data[f"{name}_before"], data[f"{name}_after"]
    del data["zeros"], data["masked"], data["reshaped"]
    for item in data["passes"]:
        del item["sparsity"]
    old = Report.from_dict(data)
    assert old.macs_before is None and old.passes[0].sparsity == [] and "multiplications" not in str(old)


def made(layers: list[dict[str, Any]], **others: Any) -> Report:
    item = PassReport("mask_weights(0.5)", 1, {"weight": 1}, [], 0.5, 12.3, sparsity=layers)
    return Report(model="BertModel", backend="onnx", passes=[item], **others)


LAYERS = [
    {"layer": "layer.0.query", "numbers": 589824, "zeros": 294912, "sqnr_db": 9.87},
    {"layer": "layer.0[up]", "numbers": 2359296, "zeros": 235929, "sqnr_db": None},
    {"layer": "layer.0.down", "numbers": 100, "zeros": 0, "sqnr_db": float("inf")},
]


def test_the_table_of_layers() -> None:
    assert render(made(LAYERS)).split("what pruning left")[1].split("size:")[0].splitlines()[1:] == [
        "┏━━━━━━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━┓",
        "┃ layer         ┃   numbers ┃ zero or cut ┃    error ┃",
        "┡━━━━━━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━┩",
        "│ layer.0.query │   589,824 │       50.0% │   9.9 dB │",
        "│ layer.0[up]   │ 2,359,296 │       10.0% │        - │",
        "│ layer.0.down  │       100 │        0.0% │ no error │",
        "├───────────────┼───────────┼─────────────┼──────────┤",
        "│ all           │ 2,949,220 │       18.0% │          │",
        "└───────────────┴───────────┴─────────────┴──────────┘",
    ]


def test_every_layer_of_a_long_model_has_its_row() -> None:
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(100)]
    text = render(made([{**LAYERS[0], "layer": name} for name in names]))
    assert all(f" {name} " in text for name in names)


def test_two_pruning_passes_have_a_table_each() -> None:
    report = made(LAYERS)
    report.passes.append(PassReport("mask_weights(pattern='2:4')", 1, {}, [], 0.1, None, sparsity=LAYERS[:1]))
    text = render(report)
    assert "what pruning left: mask_weights(0.5)" in text and "what pruning left: mask_weights(pattern='2:4')" in text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ((2_750_000_000, 22_700_000), (1_925_000_000, 17_100_000),
         "multiplications: 2.75 G -> 1.93 G (70%) at the example's sizes; parameters: 22.7 M -> 17.1 M"),
        ((999_499, 512), (999_501, 100),
         "multiplications: 999 k -> 1 M (100%) at the example's sizes; parameters: 512 -> 100"),
        ((0, 100), (0, 50), "parameters: 100 -> 50"),  # a model without a product
        ((1000, 100), (999, 100), None),  # what no one would notice
    ],
)  # fmt: skip
def test_the_line_of_multiplications(before: tuple[int, int], after: tuple[int, int], text: str | None) -> None:
    report = Report("M", "onnx", macs_before=before[0], macs_after=after[0])
    report.parameters_before, report.parameters_after = before[1], after[1]
    lines = report.summary().splitlines()
    assert lines[1:-2] == ([] if text is None else [text])


def test_outputs_that_changed_differently_are_listed_apart() -> None:
    shapes = {"a": [[2, 4, 8], [2, 3, 8]], "b": [[2, 4, 8], [2, 3, 8]], "c": [[2, 4, 8], [2, 1, 8]]}
    assert (
        "outputs with fewer heads: a, b: [2, 4, 8] -> [2, 3, 8]; c: [2, 4, 8] -> [2, 1, 8]"
        in made(LAYERS, reshaped=shapes).summary()
    )
    other = made(LAYERS, reshaped={"x": [[2, 8], [2, 4, 2]]}).summary()
    assert "outputs of another shape: x: [2, 8] -> [2, 4, 2]" in other
