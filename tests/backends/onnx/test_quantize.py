"""Quantized programs in ONNX Runtime: the integers themselves, layers in every form, and models of three families."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import tiny
import torch
import torch.nn.functional as F
from build import normal
from torch import Tensor, nn

import fxpress
from fxpress.ir.calibration.target import cosines
from fxpress.ir.equality import sqnr_db
from fxpress.ir.ops.quantize import (
    dequantize,
    dynamic_quantize,
    expand_int4,
    int4_embedding,
    int4_linear,
    int8_linear,
    quantize,
)
from fxpress.passes import Fuse, Quantize

Inputs = dict[str, Tensor]


def compiled(model: nn.Module, passes: list[Any], example: Any, **given: Any) -> fxpress.Compiled:
    return fxpress.compile(model.eval(), passes, example, backend="onnx", verify=False, threads=1, **given)


def close(found: Tensor, expected: Tensor, decibels: float = 45) -> None:
    """A number near a tie may be rounded to the other side, which later layers see: most agree to the last digits."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert sqnr_db(found, expected) > decibels


# --- integers --------------------------------------------------------------------------------------------------


class Integers(nn.Module):
    """The stored integers of an activation, with its zero point taken off, and its scale.

    What is stored itself is no output: the bytes of the kernels are those of the graph language plus 128.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("scale", torch.tensor(0.021))
        self.register_buffer("zero_point", torch.tensor(-13.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "static":
            stored, scale, zero_point = (
                quantize(x, self.scale, self.zero_point, stored=True),
                self.scale,
                self.zero_point,
            )
        else:
            x = x.abs() if self.kind == "unsigned" else x
            per = "tensor" if self.kind == "tensor" else "token"
            stored, scale, zero_point = dynamic_quantize(x, per, self.kind == "unsigned", stored=True)
        return dequantize(stored, torch.ones(()), zero_point).to(torch.int32), scale * 1


SIZES = ((4, 33, 96), (2, 7, 96), (1, 1, 96), (3, 1, 96))
KINDS = ("tensor", "token", "unsigned", "static")


@functools.cache
def integers(kind: str) -> tuple[nn.Module, fxpress.Compiled]:
    model = Integers(kind)
    return model, compiled(model, [], (normal(2, 5, 96),))


def differences(kind: str, x: Tensor) -> Tensor:
    """How many steps ONNX Runtime's integers are from the references'."""
    model, session = integers(kind)
    (expected, scale), (found, found_scale) = model(x), session(x)
    assert found.dtype is expected.dtype is torch.int32
    torch.testing.assert_close(found_scale, scale, rtol=1e-6, atol=0)
    return (found - expected).abs()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_those_of_the_reference(kind: str, size: tuple[int, ...]) -> None:
    steps = differences(kind, normal(*size, seed=3) * 2)
    assert steps.max() <= 1
    assert (steps != 0).float().mean() <= 0.001


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_ties(kind: str) -> None:
    """Numbers half way between integers, beside one that makes the step of a token 1."""
    x = torch.arange(96.0) - 40.5
    x[0] = 255 if kind == "unsigned" else 127
    assert differences(kind, x.expand(2, 3, 96) * (0.021 if kind == "static" else 1)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 1e30])
def test_integers_of_a_constant(kind: str, value: float) -> None:
    assert differences(kind, torch.full((2, 3, 96), value)).max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_integers_saturate(kind: str) -> None:
    x = normal(2, 3, 96)
    x[..., 0], x[..., 1] = 1e6, -1e6
    assert differences(kind, x).max() == 0


# --- layers ----------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two linears of one activation, and one behind a GELU; widths that are no multiples of anything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(37, 53), nn.Linear(37, 53, bias=False), nn.Linear(53, 37)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.gate(x) * self.up(x)))


WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "token": ({"granularity": "token"}, False),
    "tensor": ({"granularity": "tensor"}, False),
    "calibrated": ({}, True),
    "static": ({"mode": "static"}, True),
    "static_symmetric": ({"mode": "static", "symmetric": True}, True),
    "weights_only": ({"activations": None}, False),
    "weights_in_groups": ({"activations": None, "group_size": 16}, False),
    "int4": ({"weights": "int4"}, False),
    "int4_symmetric": ({"weights": "int4", "symmetric": True, "group_size": 16}, False),
    "int4_of_int8": ({"weights": "int4", "activations": "int8"}, False),
    "int4_of_int8_calibrated": ({"weights": "int4", "activations": "int8", "group_size": 16}, True),
    "int4_of_int8_whole_rows": ({"weights": "int4", "activations": "int8", "group_size": 64, "symmetric": True}, False),
    "not_folded": ({"fold": False}, False),
    "int4_not_folded": ({"weights": "int4", "fold": False}, False),
}


FLOATS = ("weights_only", "weights_in_groups", "not_folded", "int4_not_folded")
MULTIPLIED_BY = {
    **dict.fromkeys(FLOATS, torch.ops.aten.linear.default),
    **dict.fromkeys(("int4", "int4_symmetric"), int4_linear),
}  # every other way: by int8_linear


@pytest.mark.parametrize("way", WAYS)
def test_layers_agree_with_eager(way: str) -> None:
    options, calibrated = WAYS[way]
    batches = [(normal(3, 5, 37, seed=seed),) for seed in range(4)] if calibrated else []
    session = compiled(Layers(), [Quantize(**options)], (normal(2, 5, 37),), calibration=batches)
    assert len(session.program.calls(MULTIPLIED_BY.get(way, int8_linear))) == 3
    assert len(session.program.calls(expand_int4)) == (3 if way.startswith("int4_of_int8") else 0)
    for size in ((2, 5), (3, 11), (1, 1)):
        x = normal(*size, 37, seed=7)
        close(session(x), session.program(x))


@pytest.mark.parametrize(
    ("width", "symmetric", "chosen"),
    [(64, None, "GatherBlockQuantized"), (70, True, "GatherBlockQuantized"), (33, None, "Gather+Floor")],
)
def test_rows_of_4_bits_are_those_of_eager(width: int, symmetric: bool | None, chosen: str) -> None:
    model, ids = nn.Embedding(40, width), torch.arange(12).reshape(3, 4) * 3
    session = compiled(model, [Quantize(embeddings="int4", symmetric=symmetric)], (ids,))
    (choice,) = session.report.choices
    assert len(session.program.calls(int4_embedding)) == 1
    assert chosen in (choice["chosen"], *choice["milliseconds"])  # which of them is faster may vary
    for given in (ids, ids[:1, :1], ids.repeat(3, 1)):
        assert torch.equal(session(given), session.program(given))


def test_rows_of_4_bits_in_operators_of_the_standard(tmp_path: Path) -> None:
    model, ids = nn.Embedding(40, 64).eval(), torch.arange(12).reshape(3, 4)
    passes = [Quantize(embeddings="int4")]
    fxpress.export_onnx(model, tmp_path / "m.onnx", passes, (ids,), form="qdq", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    assert torch.equal(torch.from_numpy(found), fxpress.compile(model, passes, (ids,), backend="eager")(ids))


def test_zeros_give_the_biases() -> None:
    session = compiled(Layers(), [Quantize()], (normal(2, 5, 37),))
    x = torch.zeros(2, 3, 37)
    torch.testing.assert_close(session(x), session.program(x), rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_the_others_with_a_range_for_each_token() -> None:
    session = compiled(Layers(), [Quantize(granularity="token")], (normal(2, 5, 37),))
    x = normal(4, 6, 37, seed=7)
    alone = torch.cat([session(row[None]) for row in x])
    torch.testing.assert_close(session(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_padding_does_not_change_real_tokens() -> None:
    session = compiled(tiny.encoder(), [Fuse(), Quantize()], tiny.inputs())
    ids, mask = tiny.inputs(3, 9).values()
    first, second = (session(ids=torch.where(mask, ids, value), mask=mask)[mask] for value in (0, 49))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


# --- models ----------------------------------------------------------------------------------------------------


ORDERS = {"quantize_fuse": [Quantize(), Fuse()], "fuse_quantize": [Fuse(), Quantize()]}


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, num_hidden_layers=1, **sizes)).eval()


MODELS = {"bert": tiny.bert, "gpt2": tiny.gpt2, "llama": llama}


def hidden(found: Any) -> Tensor:
    """The first output, token vectors or logits."""
    values: list[Tensor] = list(found.values())
    return values[0]


EVERY = [("bert", order, calibrated) for order in ORDERS for calibrated in (False, True)] + [
    pytest.param(name, order, order == "quantize_fuse", marks=() if few else pytest.mark.exhaustive)
    for name, kept in zip(("gpt2", "llama"), ORDERS, strict=True)
    for order, few in ((order, order == kept) for order in ORDERS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order", "calibrated"), EVERY)
def test_models_stay_close_to_fp32(name: str, order: str, calibrated: bool) -> None:
    model = MODELS[name]()
    batches = [tiny.text(3, length) for length in (8, 12, 9, 15)] if calibrated else []
    session = compiled(model, ORDERS[order], tiny.text(2, 12), calibration=batches)
    for size in ((2, 12), (3, 17), (1, 9), (1, 1)):
        given = tiny.text(*size)
        with torch.no_grad():
            expected, eager = hidden(model(**given)), hidden(session.program(**given))
        found, real = hidden(session(**given)), given["attention_mask"].bool()
        assert cosines(found[real], expected[real]).mean() > 0.99
        close(found[real], eager[real], 30)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"weights": "int4"}, {"weights": "int4", "activations": "int8"}], ids=str)
def test_a_saved_model_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    session = compiled(tiny.encoder(), [Quantize(**options)], tiny.inputs())
    session.save(tmp_path / "saved")
    loaded = fxpress.load(tmp_path / "saved", threads=1)
    for size in ((2, 6), (3, 9), (1, 1)):
        given = tiny.inputs(*size)
        assert torch.equal(torch.as_tensor(loaded(**given)), session(**given))


SMALLER: dict[str, tuple[dict[str, Any], float]] = {
    "8 bits": ({}, 0.3),
    "4 bits": ({"weights": "int4"}, 0.2),
    "4 bits that become 8": ({"weights": "int4", "activations": "int8"}, 0.2),
}


@pytest.mark.parametrize("way", SMALLER)
def test_a_saved_model_has_fewer_bytes(way: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
    options, share = SMALLER[way]
    sizes = []
    for name, passes in (("floats", []), ("integers", [Quantize(**options)])):
        compiled(model, passes, (normal(2, 512),)).save(tmp_path / name)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / name).rglob("*") if file.is_file()))
    assert sizes[1] < share * sizes[0]


def test_weights_of_4_bits_become_integers_of_8_when_a_session_is_made(tmp_path: Path) -> None:
    """What ONNX Runtime makes of the model has the matmul of integers and nothing that unpacks its weight."""
    passes = [Quantize("int4", activations="int8")]
    fxpress.export_onnx(nn.Linear(64, 64).eval(), tmp_path / "m.onnx", passes, (normal(2, 64),), verify=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    before, after = (
        [node.op_type for node in onnx.load(tmp_path / name).graph.node] for name in ("m.onnx", "optimized.onnx")
    )
    assert "BitShift" in before and "BitShift" not in after and "MatMulIntegerToFloat" in after
