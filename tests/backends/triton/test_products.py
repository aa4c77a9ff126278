"""Products whose weight is compressed: what follows them is their epilogue, as it is that of a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import aot
import generated
import pytest
import torch
from build import normal, program
from kernels_agree import agree, made_of, ran
from torch import Tensor, nn

import fxpress
from fxpress.backends.triton.module import generate
from fxpress.ir.errors import LoweringError
from fxpress.ir.ops.float8 import FLOAT8, float8_linear, float8_scale
from fxpress.ir.ops.quantize import int4_linear, pack_int4
from fxpress.kernels.matmul_configs import matmul_configs


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


def test_many_rows_multiply_an_expanded_weight() -> None:
    """With the same epilogue, as a product of their own."""
    model, x = Int4(zero_point=True), normal(2, 9, 32)
    runner = agree(program(model, x), [x])
    expected = ran(runner, [x])[0]
    known = vars(runner._loaded.module)
    known["MANY_ROWS"] = 16
    with mock.patch.dict(known, int4_expanded=mock.Mock(side_effect=known["int4_expanded"])):
        torch.testing.assert_close(ran(runner, [x])[0], expected)
        known["int4_expanded"].assert_called_once()


def test_parts_of_sums_take_the_epilogue_where_they_are_combined() -> None:
    model, x = Int4(), normal(2, 9, 32)
    runner = agree(program(model, x), [x])
    expected = ran(runner, [x])[0]
    known = vars(runner._loaded.module)
    parts = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "SPLIT": 2, "num_warps": 4, "num_stages": 2}
    launched = mock.MagicMock()
    launched.__getitem__.side_effect = known["int4_split_kernel"].__getitem__
    known |= {"int4_configs": lambda *_: [parts], "int4_split_kernel": launched}
    torch.testing.assert_close(ran(runner, [x])[0], expected)
    launched.__getitem__.assert_called_once_with((2 * 1, 2))


def test_a_single_row() -> None:
    agree(program(Int4(), normal(32)), [normal(32)])


def test_inputs_that_no_kernel_takes_are_named() -> None:
    with pytest.raises(LoweringError, match=r"int4_linear.*: int4_linear_1 multiplies f64"):
        generate(program(Int4().double(), normal(3, 32).double()))


@pytest.mark.parametrize(("rows", "launches"), [(3, ["int8_weight_linear add gelu"]), (65, None)], ids=["few", "many"])
def test_weights_of_8_bits_are_read_as_integers_where_rows_are_few(rows: int, launches: list[str] | None) -> None:
    """Of many rows the product takes longer than to write the weight as floats, once for all of them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16), nn.GELU()).eval(), normal(rows, 32)
    passes = "quantize(int8, activations=None)"
    compiled = fxpress.compile(model, passes, (x,), backend="triton", dynamic_shapes=None)
    launched = [item["operators"] for item in compiled.report.launches]
    assert launched == launches if launches else "dequantize" in launched
    torch.testing.assert_close(compiled(x), compiled.program(x))


def test_sums_of_integer_weights_are_no_launches() -> None:
    """What a zero point adds to each channel is a constant: a run does not read the weight twice."""
    torch.manual_seed(0)
    model, x = nn.Linear(32, 16).eval(), normal(3, 32)
    compiled = fxpress.compile(model, "quantize(int8)", (x,), backend="triton")
    launched = [item["operators"] for item in compiled.report.launches]
    assert any("integer_linear" in operators for operators in launched)
    assert not any(operators.startswith(("sum", "_to_copy sum")) for operators in launched)
    torch.testing.assert_close(compiled(x), compiled.program(x))


class Float8(nn.Module):
    """Two linear layers on one input, a GELU and a residual."""

    def __init__(self, quantize_input: bool, width: int = 32, bias: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.quantize_input, weight = quantize_input, normal(width, width)
        scale = float8_scale(weight)
        self.register_buffer("weight", (weight / scale).to(FLOAT8))
        self.register_buffer("scale", scale.squeeze(-1))
        self.bias = nn.Parameter(normal(width, dtype=bias, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        one = float8_linear(x, self.weight, self.scale, self.bias, self.quantize_input)
        other = float8_linear(x, self.weight.flip(0), self.scale, None, self.quantize_input)
        return nn.functional.gelu(one) + other + x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_float8_take_an_epilogue(dtype: torch.dtype) -> None:
    model, x = Float8(False), normal(2, 3, 32, dtype=dtype)
    runner = agree(program(model, x), [x], [x[:1].repeat(5, 1, 1)])
    products = [item["operators"] for item in runner.launches if "float8_linear" in item["operators"]]
    assert sum("gelu" in operators for operators in products) == 1 and len(products) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inputs_of_float8_are_stored_once_for_all_that_multiply_them(dtype: torch.dtype) -> None:
    model, x = Float8(True), normal(2, 3, 32, dtype=dtype)
    runner = agree(program(model, x), [x], [x[:1].repeat(5, 1, 1) * 100])
    launched = [item["operators"] for item in runner.launches]
    assert sum("float8_quantize" in operators for operators in launched) == 1
    assert sum("float8_products mul" in operators for operators in launched) == 2


def test_float8_of_doubles_is_computed_as_its_reference() -> None:
    x = normal(3, 32, dtype=torch.float64)
    for quantize_input in (False, True):
        agree(program(Float8(quantize_input), x), [x])


def test_casts_to_float8_and_back() -> None:
    """Of every number of the format and of what lies between and beyond them, stored and loaded by kernels."""

    def function(self: Any, x: Tensor, stored: Tensor) -> list[Tensor]:
        return [(x * 1.0).to(FLOAT8), (x * 2.0).to(FLOAT8).to(torch.float32), stored.to(torch.float16) * 2]

    numbers = torch.arange(256).to(torch.uint8).view(FLOAT8)
    finite = numbers.float()[numbers.float().isfinite()]
    x = torch.cat([finite, finite * 1.03125, finite * 0.97, torch.tensor([500.0, -1e9, 1e-9, torch.inf])])
    runner = made_of(program(function, x, numbers))
    stored, rounded, loaded = ran(runner, [x, numbers])
    assert runner.generated.externs == ()
    expected = x.to(FLOAT8)
    is_number = ~expected.float().isnan()  # before PyTorch 2.13 not all are; the sign of those that are not is any
    assert torch.equal(stored.float().isnan(), ~is_number)
    assert torch.equal(stored.view(torch.uint8)[is_number], expected.view(torch.uint8)[is_number])
    assert torch.equal(rounded.nan_to_num(1.0), (x * 2).to(FLOAT8).float().nan_to_num(1.0))
    assert torch.equal(loaded.nan_to_num(1.0), (numbers.half() * 2).nan_to_num(1.0))
    assert ran(runner, [torch.full_like(x, torch.nan), numbers])[0].float().isnan().all()


class Shifted(nn.Module):
    """A linear layer whose epilogue reads a table by position, so that it needs the sizes of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.table = nn.Parameter(normal(512, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.linear(x) + self.table[: x.shape[1]])


def test_an_epilogue_within_a_loop_over_tiles() -> None:
    """The kernel of few programs, in which sizes are widened once, before the loop."""
    x = normal(2, 9, 32)
    runner = made_of(program(Shifted(32), x))
    expected = ran(runner, [x])[0]
    config = {
        "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 2, "SPLIT": 1, "TMA": True, "PROGRAMS": 2,
        "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    vars(runner._loaded.module)["first_config"] = lambda *_: config
    launched: list[int] = []
    kernel = next(item for name, item in vars(runner._loaded.module).items() if name.endswith("_persistent"))
    with mock.patch.object(type(kernel), "__getitem__", _counting(type(kernel).__getitem__, kernel, launched)):
        torch.testing.assert_close(ran(runner, [x])[0], expected)
    assert launched == [2]


def _counting(get: Any, kernel: Any, launched: list[int]) -> Any:
    """`kernel[grid]`, with the grids of one kernel noted."""

    def item(self: Any, grid: tuple[int, ...]) -> Any:
        if self is kernel:
            launched.append(grid[0])
        return get(self, grid)

    return item


@pytest.mark.slow
def test_an_epilogue_within_a_loop_compiles_for_hopper(tmp_path: Path) -> None:
    x = normal(4, 512, 1024, dtype=torch.bfloat16)
    config = next(
        config
        for config in matmul_configs(2048, 1024, 1024, torch.bfloat16, 90, tma=True, sums=64)
        if config["PROGRAMS"]
    )
    jobs = generated.jobs("shifted", program(Shifted(1024).bfloat16(), x), [x], tmp_path, 90, config)
    (found,) = (results[90] for name, results in aot.compiled(jobs).items() if name.endswith("_persistent"))
    assert found.get("error") is None and found["over"] is None
    assert {"wgmma", "tma"} <= set(found["instructions"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_products_of_float8_compile(arch: int, tmp_path: Path) -> None:
    x, jobs = normal(512, 1024, dtype=torch.bfloat16), {}
    for quantize_input in (False, True):
        model = Float8(quantize_input, 1024)
        jobs |= generated.jobs(f"float8_{quantize_input}", program(model, x), [x], tmp_path, arch)
    results = aot.compiled(jobs)
    assert generated.check(results) == []
    native = [name for name, found in results.items() if "float8" in found[arch]["instructions"]]
    assert all("products" in name for name in native) and len(native) == (0 if arch == 80 else 2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_epilogue_compiles(arch: int, tmp_path: Path) -> None:
    x = normal(64, 1024, dtype=torch.bfloat16)
    jobs: dict[str, Any] = generated.jobs("int4", program(Int4(1024, 8).bfloat16(), x), [x], tmp_path, arch)
    (found,) = (results[arch] for results in aot.compiled(jobs).values())
    assert found.get("error") is None and found["over"] is None
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])
