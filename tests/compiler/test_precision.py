"""compile(dtype=...): a copy of the model in half precision, and what that lost."""

from __future__ import annotations

import pytest
import tiny
import torch

import fxpress
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
