"""Products whose weight is compressed: what follows them is their epilogue, as it is that of a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aot
import generated
import pytest
import torch
from build import normal, program
from kernels_agree import agree
from torch import Tensor, nn

from fxpress.backends.triton.module import generate
from fxpress.ir.errors import LoweringError
from fxpress.ir.ops.quantize import int4_linear, pack_int4


class Int4(nn.Module):
    """GELU of a linear layer, and a residual."""

    def __init__(self, width: int = 32, groups: int = 2, zero_point: bool = False) -> None:
        super().__init__()
        integers = (normal(width, width) * 3).round().clamp(-8, 7).to(torch.int8)
        self.register_buffer("weight", pack_int4(integers))
        self.register_buffer("scale", normal(width, groups, seed=1).abs() / 8)
        self.register_buffer("zero_point", integers[:, :groups].contiguous() if zero_point else None)
        self.bias = nn.Parameter(normal(width, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        found = int4_linear(x, self.weight, self.scale, self.zero_point, self.bias)
        return nn.functional.gelu(found) + x


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_four_bits_take_an_epilogue(half: bool, zero_point: bool) -> None:
    model, x = Int4(zero_point=zero_point), normal(2, 3, 32)
    model, x = (model.half(), x.half()) if half else (model, x)
    runner = agree(program(model, x), [x], [x[:1].repeat(5, 1, 1)])
    assert [item["operators"] for item in runner.launches] == ["int4_linear add gelu add"]


def test_a_single_row() -> None:
    agree(program(Int4(), normal(32)), [normal(32)])


def test_inputs_that_no_kernel_takes_are_named() -> None:
    with pytest.raises(LoweringError, match=r"int4_linear.*: int4_linear_1 multiplies f64"):
        generate(program(Int4().double(), normal(3, 32).double()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_epilogue_compiles(arch: int, tmp_path: Path) -> None:
    x = normal(64, 1024, dtype=torch.bfloat16)
    jobs: dict[str, Any] = generated.jobs("int4", program(Int4(1024, 8).bfloat16(), x), [x], tmp_path, arch)
    (found,) = (results[arch] for results in aot.compiled(jobs).values())
    assert found.get("error") is None and found["over"] is None
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])
