"""Integer-only: golden graphs, no float between quantize and dequantize, quality, calibration, refusals."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, normal, program, reasons
from integers import CALIBRATION, Encoder, NoFloatsInside, Packed, batch, canonical, encoder, integer
from tiny import bert, text
from torch import Tensor, nn

import fxpress
from fxpress.ir.errors import InputError
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.quantize import dequantize, quantize
from fxpress.ir.printer import print_program
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fuse, IntegerOnly

aten = torch.ops.aten
MODELS: dict[str, Callable[[], nn.Module]] = {
    "post_gelu": Encoder,
    "pre_relu": lambda: Encoder(first=True, activation=F.relu),
    "causal": lambda: Encoder(first=True, causal=True, layers=1),
    "packed": Packed,
}
SIZES = ((2, 7), (3, 11), (1, 1), (1, 5), (3, 1))


@pytest.mark.parametrize("name", ["post_gelu", "packed"])
def test_graph(name: str, golden: Callable[[str], None]) -> None:
    before = encoder() if name == "post_gelu" else canonical(Packed())
    after, result = integer(before)
    golden(before_after(before, after, result))


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_integers_from_one_quantize_to_one_dequantize(name: str) -> None:
    before = canonical(MODELS[name]())
    after, result = integer(before)
    assert dict(result.rewrites) == {"integer_only": 1} and result.refusals == []
    assert [len(after.calls(target)) for target in (quantize, dequantize)] == [1, 1]
    floats = [
        node.name
        for node in after.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor) and node.meta["val"].is_floating_point()
    ]
    assert len(floats) == 3, f"quantize, a cast and dequantize, found {floats}"
    runner = NoFloatsInside(after)
    assert len(runner.inside) > 20
    cosines = []
    for rows, length in SIZES:
        given = batch(rows, length, seed=rows)
        found, exact = runner.run(*given)[0], before.run(given)[0]
        assert torch.equal(found, after.run(given)[0])
        cosines.append(torch.cosine_similarity(found, exact, -1)[given[1]])
    assert torch.cat(cosines).mean() > 0.997


def test_bert_is_taken_from_its_embeddings_to_its_pooler() -> None:
    given = text(3, 9)
    compiled = fxpress.compile(
        bert(), passes="integer_only", example_inputs=text(), calibration=[text(4, 10), text(3, 7)], backend="eager"
    )
    runner = NoFloatsInside(compiled.program)
    tensors = compiled.program.signature.bind((), given)
    outside = {
        node.target
        for node in compiled.program.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()
        if node.op == "call_function" and node not in runner.inside
    }
    ends = {quantize, aten._to_copy.default, dequantize}
    assert outside - ends == {aten.embedding.default, aten.add.Tensor, aten.tanh.default}
    with torch.no_grad():
        exact = bert()(**given).last_hidden_state
    kept = given["attention_mask"].bool()
    assert torch.cosine_similarity(runner.run(*tensors)[0][kept], exact[kept], -1).mean() > 0.998
    (report,) = [item for item in compiled.report.passes if item.name == "integer_only"]
    assert [item["reason"] for item in report.refusals] == ["aten.tanh has no integer form"]


def docstrings(*modules: Any) -> list[str]:
    functions = [item for module in modules for item in vars(module).values() if inspect.isfunction(item)]
    return [inspect.getdoc(item) or "" for item in functions if inspect.getdoc(item)]


@pytest.mark.slow
def test_a_pretrained_sentence_encoder_keeps_its_meaning() -> None:
    from fxpress.compiler import hf
    from fxpress.compiler.demo import packaged_model

    model, tokenizer = hf.load_model(packaged_model()), hf.load_tokenizer(packaged_model())

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    known, unknown = docstrings(torch.nn.functional)[:24], docstrings(inspect, json, textwrap)[:12]
    calibration = [tokens(known[start : start + 8]) for start in range(0, 24, 8)]
    compiled = fxpress.compile(
        model, "integer_only", calibration[0], calibration=calibration, backend="eager", verify=False
    )
    given = tokens(unknown)
    with torch.no_grad():
        exact = model(**given).last_hidden_state
    kept = given["attention_mask"].bool()
    assert torch.cosine_similarity(compiled(**given).last_hidden_state[kept], exact[kept], -1).mean() > 0.99


# --- what is independent of what -------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_needs_no_data() -> None:
    after, _ = integer(encoder())
    shown = print_program(after)
    again, result = integer(after, [])
    assert result.changes == 0 and print_program(again) == shown


def test_a_program_without_attention_needs_no_data() -> None:
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU())
    before = canonical(model, normal(2, 5, 12))
    after, result = integer(before, [])
    assert result.changes == 0 and print_program(after) == print_program(before)


def test_padding_changes_no_integer() -> None:
    after, _ = integer(encoder())
    x, mask = batch(2, 7)
    wide = [F.pad(x, (0, 0, 0, 4), value=3.0), F.pad(mask, (0, 4))]
    assert torch.equal(after.run([x, mask])[0][mask], after.run(wide)[0][wide[1]])


def test_padded_tokens_are_no_calibration_data() -> None:
    before = encoder()
    spoilt = [[torch.where(mask[..., None], x, 1e4), mask] for x, mask in CALIBRATION]
    given = batch(3, 5, seed=9)
    first, second = (integer(before, data)[0].run(given)[0] for data in (CALIBRATION, spoilt))
    assert torch.equal(first, second)


def test_values_beyond_the_calibration_are_kept_in_range() -> None:
    after, _ = integer(canonical(Encoder(first=True, layers=1)))
    x, mask = batch()
    found = after.run([x * 1e4, mask])[0]
    assert found.isfinite().all() and found.abs().max() < 1e3


def test_a_rewrite_out_of_the_budget_is_not_made() -> None:
    before = encoder()
    after = before.copy()
    result = IntegerOnly().apply(after, Context(calibration=CALIBRATION, max_rewrites=0))
    assert result.changes == 0 and print_program(after) == print_program(before)


def test_added_weights_are_integers_in_the_program() -> None:
    class Added(Encoder):
        def __init__(self) -> None:
            super().__init__(first=True, layers=1)
            self.offset = nn.Parameter(normal(12, seed=3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, mask) + self.offset

    before = canonical(Added())
    after, result = integer(before)
    assert result.refusals == [] and len(after.calls(quantize)) == 1
    given = batch(3, 5)
    assert torch.cosine_similarity(after.run(given)[0].flatten(), before.run(given)[0].flatten(), 0) > 0.998


# --- calibration that cannot be used ---------------------------------------------------------------------------


def test_missing_calibration() -> None:
    with pytest.raises(InputError, match=r"give calibration=\[inputs, ...\]"):
        integer(encoder(), [])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_calibration_with_nan(value: float) -> None:
    x, mask = batch()
    x[0, 2, 3] = value
    with pytest.raises(InputError, match="leads to NaN or infinity at x"):
        integer(encoder(), [*CALIBRATION, [x, mask]])


def test_calibration_of_padding_alone() -> None:
    x, mask = batch()
    with pytest.raises(InputError, match="all tokens of the calibration data are masked"):
        integer(encoder(), [[x, torch.zeros_like(mask)]])


# --- refusals --------------------------------------------------------------------------------------------------

PARTS = {name: normal(12, 12, seed=seed) * 0.3 for seed, name in enumerate("qkvo")} | {"s": normal(3), "b": normal(12)}


def attended(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (F.linear(x, getattr(m, name)).unflatten(-1, (3, 4)).transpose(1, 2) for name in "qkv")
    if options.pop("grouped", False):
        k, v = k[:, :1], v[:, :1]
    if options.pop("rotated", False):
        q = q.cos()
    found: Tensor = attention(q, k, v, **options)
    return F.linear(found.transpose(1, 2).flatten(2), m.o)


def traced(function: Callable[..., Tensor], x: Tensor | None = None) -> Program:
    example = normal(2, 5, 12) if x is None else x
    weights = {name: tensor.to(example.dtype) for name, tensor in PARTS.items()}
    made = program(function, example, **weights)
    Canonicalize().apply(made, Context())
    return made


ATTENTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "bias": (lambda m, x: attended(m, x, bias=x[:, None, :, :5]), "a bias of floats is added to its scores"),
    "softcap": (lambda m, x: attended(m, x, softcap=30.0), "its scores have a soft cap"),
    "sinks": (lambda m, x: attended(m, x, sinks=m.s), "its softmax has sinks"),
    "scale": (lambda m, x: attended(m, x, scale=-1.0), "its scale is -1"),
    "nan": (
        lambda m, x: attended(m, x, key_mask=x[..., 0] > 0, empty="nan"),
        "rows without keys give NaN, for which there is no integer",
    ),
    "grouped": (lambda m, x: attended(m, x, grouped=True), "its key heads are grouped"),
    "query": (lambda m, x: attended(m, x, rotated=True), "its query is computed by aten.cos, which stays float"),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_refused(case: str) -> None:
    function, reason = ATTENTIONS[case]
    before = traced(function) if case != "bias" else traced(function, normal(2, 5, 12))
    after, result = integer(before, [])
    assert reasons(result) == [reason]
    assert print_program(after) == print_program(before)


def then(follow: Callable[[Any, Tensor], Tensor]) -> Program:
    """A program whose attention is taken, and what follows it is not."""
    return traced(lambda m, x: follow(m, attended(m, x)))


FOLLOWERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "unknown": (lambda m, y: y.tanh(), "aten.tanh has no integer form"),
    "product": (lambda m, y: y * m.b, "aten.mul.Tensor has no integer form"),
    "number": (lambda m, y: y + 1.0, "a number is added"),
    "alpha": (lambda m, y: torch.add(y, m.b, alpha=2), "alpha is 2, expected 1"),
    "integers_added": (lambda m, y: y + torch.arange(12), "what is added is no float32 tensor"),
    "axes": (lambda m, y: F.layer_norm(y.unflatten(-1, (3, 4)), (3, 4)), "the norm is over 2 axes"),
    "eps": (lambda m, y: F.layer_norm(y, (12,), eps=0.1), "its eps is 0.1, at most 0.001 fits"),
    "norm_weight": (lambda m, y: F.layer_norm(y, (12,), m.b.exp()), "its weight or bias is computed"),
    "linear_weight": (lambda m, y: F.linear(y, m.q.exp()), "its weight or bias is computed"),
}


@pytest.mark.parametrize("case", FOLLOWERS)
def test_operator_is_refused(case: str) -> None:
    function, reason = FOLLOWERS[case]
    data = [[normal(3, 7, 12, seed=seed)] for seed in range(3)]
    before = then(function)
    after, result = integer(before, data)
    assert result.changes == 1 and reasons(result) == [reason]
    given = data[0]
    assert torch.cosine_similarity(after.run(given)[0].flatten(), before.run(given)[0].flatten(), 0) > 0.99


def test_half_precision_is_refused() -> None:
    before = traced(attended, normal(2, 5, 12, dtype=torch.float16))
    _, result = integer(before, [])
    assert "it computes in float16; integer_only takes models in float32" in reasons(result)
    assert result.changes == 0


def test_fused_operators_are_refused() -> None:
    before = encoder().copy()
    Fuse().apply(before, Context())
    _, result = integer(before, [])
    assert result.changes == 0
    assert reasons(result) == ["fxpress.split_linear is the work of fuse; put integer_only before fuse"]


def test_boolean_masks_of_any_shape_are_taken() -> None:
    function = lambda m, x: attended(m, x, bias=x[:, None, :, :5] > 0, key_mask=x[..., 1] > -1, left=3)  # noqa: E731
    before = program(function, normal(2, 5, 12), dynamic=None, **PARTS)
    Canonicalize().apply(before, Context())
    data = [[normal(2, 5, 12, seed=seed)] for seed in range(64)]
    after, result = integer(before, data)
    assert result.changes == 1
    found, exact = after.run(data[0])[0], before.run(data[0])[0]
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integer_only.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "integer_only.md", "exec"), {})
    assert "integer_only" in capsys.readouterr().out


def test_it_is_printed_by_its_name_and_lossy() -> None:
    assert str(IntegerOnly()) == "integer_only" and not IntegerOnly.exact
