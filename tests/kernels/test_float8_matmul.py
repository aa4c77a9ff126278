"""Matmul with a weight of float8_e4m3, against the operator's reference, and compiled for GPUs that are not there."""

from collections.abc import Iterator
from typing import Any

import aot
import numpy
import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.equality import compare
from fxpress.ir.ops.float8 import FLOAT8, float8_linear
from fxpress.kernels.float8_matmul import float8_configs, float8_matmul
from fxpress.kernels.launch import arch_of

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """The interpreter computes what is masked too: numpy would warn of overflow there."""
    with numpy.errstate(all="ignore"):
        yield


def float8(*sizes: int, seed: int = 0) -> Tensor:
    return (normal(*sizes, seed=seed) * 100).clamp(-448, 448).to(FLOAT8)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> None:
    """Equal to the reference; all of `out` is written."""
    scale = normal(weight.shape[0], seed=1).abs() / 100
    scale = scale.to(x.device)
    eager = float8_linear(x, weight, scale, bias)
    judge = float8_linear(x.double(), weight, scale.double(), None if bias is None else bias.double())
    out = torch.full_like(eager, float("nan"))
    assert float8_matmul(x, weight, scale, out, bias, **options) is out
    verdict = compare([out], [eager], [judge])
    assert verdict.equal, verdict.reasons
    assert torch.equal(float8_matmul(x, weight, scale, bias=bias, **options), out)


@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 7, 33), (7, 33, 65), (33, 40, 96), (17, 1, 128), (65, 7, 1), (3, 4, 0)]
)
def test_equals_the_reference(
    rows: int, columns: int, depth: int, dtype: torch.dtype, config: dict[str, int] | None
) -> None:
    bias = normal(columns, seed=2) if rows != 7 else None
    check(normal(rows, depth, dtype=dtype), float8(columns, depth), bias, config=config)


def test_every_number_of_the_format() -> None:
    weight = torch.arange(256).to(torch.uint8).view(FLOAT8)[:, None]
    found = float8_matmul(torch.ones(1, 1), weight, torch.ones(256), config=SMALL)[0]
    assert torch.equal(found.nan_to_num(1e9), weight[:, 0].float().nan_to_num(1e9))


def test_strides() -> None:
    whole = torch.full((8, 60), float("nan"))
    whole[1:6, 3:43] = normal(5, 40)
    for x in (normal(2, 3, 5, 40), normal(40, 5).T, whole[1:6, 3:43], normal(1, 40).expand(5, 40), normal(40)):
        check(x, float8(9, 40), config=SMALL)
    check(normal(5, 40), float8(40, 9).T, config=SMALL)


def test_empty() -> None:
    for rows, columns in ((0, 3), (3, 0)):
        assert float8_matmul(torch.ones(rows, 8), float8(columns, 8), torch.ones(columns)).shape == (rows, columns)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.ones(2, 8).double(), float8(3, 8), "found torch.float64"),
        (torch.ones(2, 8), torch.ones(3, 8), r"w must be float8_e4m3fn \[3, 8\] for x \[2, 8\], found torch.float32"),
        (torch.ones(2, 8), float8(3, 4), r"found torch.float8_e4m3fn \[3, 4\]"),
    ],
)
def test_refused(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        float8_matmul(x, w, torch.ones(3))


# --- compiled ------------------------------------------------------------------------------------------------------

SHAPES = {"decode": (1, 4096, 4096), "batch": (64, 4096, 4096), "large": (4096, 4096, 4096)}


def job(dtype: str, shape: tuple[int, int, int], config: dict[str, int], arch: int) -> dict[str, Any]:
    rows, columns, depth = shape
    given = {
        "x": dtype, "w": "float8_e4m3fn" if arch >= 89 else "uint8", "scale": "float32", "bias": dtype, "out": dtype,
        "stride_op": 0, "stride_oq": 0, "stride_om": columns, "stride_on": 1, "M": rows, "N": columns, "K": depth,
        "stride_xm": depth, "stride_xk": 1, "stride_wn": depth,
    }  # fmt: skip
    constants = {name: value for name, value in config.items() if name.startswith("BLOCK")}
    precision = "tf32x3" if (dtype, arch) == ("float32", 100) else "ieee"
    constants |= {"PRECISION": precision, "EVEN_K": depth % config["BLOCK_K"] == 0}
    return aot.job(
        "fxpress.kernels.float8_matmul", "float8_matmul_kernel", given, constants, [arch],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


JOBS = {
    f"{name} {arch}": job("bfloat16", shape, float8_configs(*shape, torch.bfloat16, arch)[0], arch)
    for name, shape in SHAPES.items()
    for arch in (80, 90, 100)
}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_compiled(name: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{name} {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert {"cp.async.v4", "ld.global.v4"} & set(found["instructions"])
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_fits(arch: int) -> None:
    tasks = {}
    for shape in (*SHAPES.values(), (7, 1001, 1003)):
        for dtype in (torch.bfloat16, torch.float32):
            for config in float8_configs(*shape, dtype, arch):
                name = str(dtype).removeprefix("torch.")
                tasks.setdefault(f"{name} {config} {shape[2] % 16}", job(name, shape, config, arch))
    found = aot.compiled(tasks)
    over = {name: results[arch].get("error") or results[arch].get("over") for name, results in found.items()}
    assert over == dict.fromkeys(found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (64, 768, 3072), (1000, 1001, 1003)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_configuration_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, weight = normal(rows, depth, dtype=dtype).cuda(), float8(columns, depth).cuda()
    for config in float8_configs(*shape, dtype, arch_of(x.device)):
        check(x, weight, config=config)
