"""compile(dtype=...): a copy of the model in half precision, and what that lost."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import fxpress
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import InputError


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_copy_runs_in_half_precision(backend: str) -> None:
    model, given = tiny.encoder(), tiny.inputs()
    compiled = fxpress.compile(model, example_inputs=given, backend=backend, dtype="float16")
    assert compiled.report.equal  # to eager PyTorch in float16
    assert compiled(**given).dtype is torch.float16
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert compiled.report.precision["dtype"] == "float16"
    assert 40 < compiled.report.precision["sqnr_db"] < 90
    assert "float16 against the model in its own precision" in str(compiled.report)


def test_float_inputs_are_cast() -> None:
    model = torch.nn.Linear(8, 4).eval()
    x = torch.randn(3, 8)
    compiled = fxpress.compile(model, example_inputs=(x,), backend="eager", dtype="bfloat16")
    assert compiled(x).dtype is torch.bfloat16
    assert torch.equal(compiled(x), compiled(x.bfloat16()))
    assert compiled.verify((x,)).equal
    later = fxpress.compile(model, backend="eager", dtype="bfloat16")
    assert torch.equal(later(x), compiled(x))


def test_more_passes_keep_the_precision() -> None:
    x = torch.randn(3, 8)
    half = fxpress.compile(torch.nn.Linear(8, 4).eval(), [], (x,), backend="eager", dtype="bfloat16")
    coarse = half.then("quantize(int8, mode=static)", backend="eager", calibration=[(x,)])
    assert coarse.report.passes[-1].changes and coarse(x).dtype is torch.bfloat16
    assert coarse.verify((x,)).errors


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


@pytest.mark.slow
def test_far_tokens_lose_no_more_than_near_ones() -> None:
    """Rotary frequencies, which the model reads in float32, are not rounded."""
    torch.manual_seed(0)
    model, given = llama(), {"input_ids": torch.randint(3, 90, (1, 900))}
    compiled = fxpress.compile(model, example_inputs={"input_ids": given["input_ids"][:, :12]}, backend="eager",
                               dtype="bfloat16")  # fmt: skip
    assert {str(buffer.dtype) for buffer in compiled.program.module.buffers()} == {"torch.float32"}
    assert compiled.report.equal and compiled.verify(given).equal
    with torch.no_grad():
        found, truth = compiled(**given).last_hidden_state.double(), model(**given).last_hidden_state.double()
    near, far = (sqnr_db(found[:, part], truth[:, part]) for part in (slice(0, 100), slice(800, 900)))
    assert far > near - 3


def test_buffers_that_the_model_reads_as_they_are_are_narrowed() -> None:
    class Places(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(16, 8), persistent=False)
            self.register_buffer("both", torch.randn(8), persistent=False)
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x + self.table[: x.shape[1]]) * self.both.float().sum().to(x.dtype) + self.both

    compiled = fxpress.compile(
        Places().eval(), [], (torch.randn(2, 5, 8),), dynamic_shapes=None, backend="eager", dtype="bfloat16"
    )
    assert {buffer.dtype for buffer in compiled.program.module.buffers()} == {torch.bfloat16}
    assert compiled.report.equal


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "bfloat", "backend": "eager"}, r"unknown dtype 'bfloat': did you mean 'bfloat16'"),
        ({"dtype": "float16"}, "needs backend='openvino', 'triton' or 'eager'"),
        ({"dtype": "float16", "backend": "onnx"}, "needs backend='openvino', 'triton' or 'eager'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        fxpress.compile(torch.nn.Linear(2, 2).eval(), example_inputs=(torch.randn(1, 2),), **options)
