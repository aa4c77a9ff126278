"""The generated module: readable, whole, safe; and what is refused, with reasons."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from build import normal, program
from kernels_agree import agree
from safetensors.torch import save_file
from torch import Tensor, nn

import fxpress
from fxpress.backends.triton import module as modules
from fxpress.backends.triton.module import generate
from fxpress.ir.errors import FxpressError, InputError, LoweringError

SCRIPT = """
import importlib.util, sys, torch
from safetensors.torch import load_file
spec = importlib.util.spec_from_file_location("alone", "alone.py")
alone = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alone)
tensors = load_file("tensors.safetensors")
inputs = [tensors.pop(f"input {number}") for number in range(2)]
found = alone.forward(inputs, {name.removeprefix("weight "): value for name, value in tensors.items()})[0]
assert not any(name.partition(".")[0] == "fxpress" for name in sys.modules)
print(float(found.double().sum()))
"""


def test_the_module_runs_on_its_own(tmp_path: Path) -> None:
    given = tiny.inputs()
    compiled = fxpress.compile(tiny.encoder(), example_inputs=given, backend="triton")
    (tmp_path / "alone.py").write_text(compiled.source, encoding="utf-8")
    weights = {f"weight {name}": item for name, item in compiled.program.module.state_dict().items()}
    inputs = {f"input {number}": item for number, item in enumerate(given.values())}
    save_file({**weights, **inputs}, tmp_path / "tensors.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(float(compiled(**given).double().sum()), rel=1e-6, abs=1e-6)


def test_kernels_of_a_layer(golden: Callable[[str], None]) -> None:
    """What is generated for a residual, a norm and a gated activation: kernels and forward, without the library."""

    def function(self: Any, x: Tensor, y: Tensor) -> Tensor:
        total = torch.nn.functional.layer_norm(x + y, x.shape[-1:], self.weight)
        gate, up = total.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    traced = program(function, normal(2, 3, 8), normal(2, 3, 8, seed=1), weight=normal(8))
    source = generate(traced).source
    first = re.search(r"^@triton\.jit\ndef \w+_kernel\(", source, flags=re.MULTILINE)
    assert first is not None
    golden(source[first.start() :])


def test_names_that_users_choose_cannot_become_code() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", normal(4))
            self.register_buffer("matmul", normal(4, 4))

        def forward(self, aten: Tensor, triton: Tensor) -> Tensor:
            return (aten @ self.matmul + self.weights) * triton

    x, y = normal(3, 4), normal(3, 4, seed=1)
    runner = agree(program(Odd(), x, y), [x, y])
    ast.parse(runner.source)


def test_our_kernels_have_names_of_their_own() -> None:
    """The generated module holds functions of several files side by side."""
    names = [
        name
        for module in modules.LIBRARY
        for item in ast.parse(inspect.getsource(module)).body
        if isinstance(item, ast.FunctionDef)
        for name in [item.name]
    ]
    assert len(names) == len(set(names))


def test_what_cannot_be_lowered_is_named_before_any_work() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return torch.linalg.qr(torch.bernoulli(x.sigmoid()) + x).Q

    with pytest.raises(LoweringError, match=r"2 nodes cannot be lowered to Triton: .*bernoulli.*linalg_qr"):
        generate(program(function, normal(3, 3)))


def test_what_depends_on_layouts_is_refused() -> None:
    """Kernels write row by row, where PyTorch keeps the order of an input that lies otherwise."""
    with pytest.raises(LoweringError, match="depends on layouts"):
        generate(program(lambda self, x: (x * 2).as_strided((2, 3), (1, 2)), normal(3, 4)))


def test_sizes_that_depend_on_values_are_refused() -> None:
    with pytest.raises((LoweringError, FxpressError)):
        generate(program(lambda self, x: x[x > 0] * 2, normal(3, 3)))


def test_what_pytorch_runs_is_said() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return torch.sort(x * 2.0, -1).values + 1.0

    compiled = fxpress.compile(_module(function), example_inputs=(normal(3, 5),), backend="triton")
    (library,) = [item for item in compiled.report.launches if item["by"].startswith("PyTorch: ")]
    assert library["operators"].startswith("aten.sort") and library["launches"] == 1
    assert "aten.sort" in str(compiled.report)


def test_a_positional_convolution_is_left_to_pytorch() -> None:
    """That of Wav2Vec2, with its normed weight."""
    convolution = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding="same"), dim=2)
    runner = agree(program(convolution, normal(2, 4, 9)), [normal(2, 4, 9)], [normal(3, 4, 5)])
    assert {name for name, *_ in runner.generated.externs} == {"aten._weight_norm.default", "aten.conv1d.padding"}


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_resized_pictures_are_left_to_pytorch(mode: str) -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x * 2, scale_factor=2.0, mode=mode)

    x = normal(2, 3, 4, 4)
    runner = agree(program(function, x), [x], [x[:1]])
    assert len(runner.generated.externs) == 1


def _module(function: Any) -> nn.Module:
    made = type("Tiny", (nn.Module,), {"forward": function})()
    return made.eval()  # type: ignore[no-any-return]


def test_the_plan_can_be_drawn() -> None:
    compiled = fxpress.compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="triton", verify=False)
    lines = compiled.plan.splitlines()
    assert lines[0] == "digraph {" and lines[-1] == "}"
    assert sum("->" in line for line in lines) >= 7  # embedding, qkv, attention, two residuals, up, down
    assert any('label="linear add gelu"' in line for line in lines)


def test_only_generated_modules_have_a_source() -> None:
    compiled = fxpress.compile(tiny.encoder(), example_inputs=tiny.inputs(), backend="eager")
    with pytest.raises(InputError, match="only the triton backend generates a module, this is 'eager'"):
        _ = compiled.source


def test_a_model_on_the_cpu_needs_the_interpreter() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny, fxpress; "
        "fxpress.compile(tiny.encoder(), example_inputs=tiny.inputs(), backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    support = str(Path(__file__).parents[2] / "support")
    ran = subprocess.run([sys.executable, "-P", "-c", code, support], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "backend 'triton' needs a model on CUDA, found cpu" in ran.stderr.splitlines()[-1]


def test_a_changed_weight_is_seen() -> None:
    model = tiny.encoder()
    compiled = fxpress.compile(model, example_inputs=tiny.inputs(), backend="triton")
    with torch.no_grad():
        for weight in compiled.program.module.parameters():
            weight.mul_(1.5)
    torch.testing.assert_close(compiled(**tiny.inputs()), compiled.program(**tiny.inputs()), rtol=1e-4, atol=1e-5)
