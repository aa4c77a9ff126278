"""Contexts within forward: grad modes and autocast are part of a model, and no part of its graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxpress import compile
from fxpress.compiler.trace import trace
from fxpress.ir.errors import FxpressError
from fxpress.ir.graph import Program


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@torch.no_grad()
def assert_plain(model: nn.Module, x: Tensor, *others: Tensor) -> None:
    """The graph holds no context, and gives the model's results, at other sizes, too."""
    program = trace(model, ((), {"x": x}))
    assert not any("wrap_with" in target for target in targets(program)), targets(program)
    for other in (x, *others):
        torch.testing.assert_close(program.run((other,))[0], model(other))


class Partly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        with torch.enable_grad():
            return y + 1


class Rotary(nn.Module):
    """Angles in float32 whatever surrounds them, as x-transformers, vit-pytorch and transformers write them."""

    def __init__(self, device: str, *, enabled: bool = False) -> None:
        super().__init__()
        self.device, self.enabled = device, enabled
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.enabled):
            angles = torch.arange(x.shape[1]).float()[:, None] * self.linear(x)
            with torch.no_grad():
                scale = x.new_ones(x.shape[1], 1)
                scale[:1] = 2.0
        return angles.cos() * x * scale


def test_grad_modes_leave_nothing() -> None:
    assert_plain(Partly().eval(), torch.rand(2, 3), torch.rand(4, 3))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_that_is_off_leaves_nothing(device: str) -> None:
    assert_plain(Rotary(device).eval(), torch.rand(2, 5, 8), torch.rand(3, 7, 8))


def test_autocast_of_another_device_leaves_nothing(recwarn: pytest.WarningsRecorder) -> None:
    assert_plain(Rotary("cuda", enabled=True).eval(), torch.rand(2, 5, 8), torch.rand(3, 7, 8))


def test_autocast_that_is_on_is_no_plain_graph() -> None:
    """PyTorch chooses the dtype of each operator within it: not so in an ONNX file, and said so."""
    with pytest.raises(FxpressError, match="autocast"):
        compile(Rotary("cpu", enabled=True).eval(), example_inputs=(torch.rand(2, 5, 8),), backend="onnx")
