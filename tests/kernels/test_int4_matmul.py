"""Matmul with a weight of 4 or 8 bits, against the operator's reference, and compiled for GPUs that are not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aot
import hooks
import numpy
import pytest
import torch
from build import normal
from torch import Tensor

from fxpress.ir.equality import compare
from fxpress.ir.ops.quantize import dequantize, int4_linear, pack_int4
from fxpress.kernels import int4_matmul as kernels
from fxpress.kernels.int4_matmul import int4_configs, int4_matmul
from fxpress.kernels.launch import arch_of

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
DEEP = {**SMALL, "BLOCK_K": 128}
PARTS = {**SMALL, "SPLIT": 2}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """The interpreter computes what is masked too: numpy would warn of overflow there."""
    with numpy.errstate(all="ignore"):
        yield


def integers(*sizes: int, bits: int, seed: int = 0) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def check(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int, **options: Any
) -> None:
    """Equal to a linear layer with the weight that the integers stand for, in x's dtype."""
    dense = dequantize(weight, scale, zero_point).to(x.dtype)
    eager = torch.nn.functional.linear(x, dense, bias)
    judge = torch.nn.functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    stored = pack_int4(weight) if bits == 4 else weight
    if bits == 4:
        assert torch.equal(int4_linear(x, stored, scale, zero_point, bias), eager)
    out = torch.full_like(eager, float("nan"))
    assert int4_matmul(x, stored, scale, zero_point, out, bias, **options) is out
    verdict = compare([out], [eager], [judge])
    assert verdict.equal, verdict.reasons
    assert torch.equal(int4_matmul(x, stored, scale, zero_point, bias=bias, **options), out)


@pytest.mark.parametrize("config", [None, SMALL, DEEP, PARTS], ids=["default", "small", "deep", "parts"])
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "groups"),
    [(1, 7, 33, 1), (7, 33, 65, 5), (33, 40, 96, 3), (5, 33, 9, 9), (17, 1, 128, 2), (65, 7, 1, 1), (3, 4, 0, 1)],
)
def test_four_bits(
    rows: int, columns: int, depth: int, groups: int, zero_point: bool, config: dict[str, int] | None
) -> None:
    shift = integers(columns, groups, bits=4, seed=3) if zero_point else None
    scale, bias = normal(columns, groups, seed=1).abs(), None if zero_point else normal(columns, seed=2)
    check(normal(rows, depth), integers(columns, depth, bits=4), scale, shift, bias, 4, config=config)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, torch.float16), (torch.float16, torch.float32)])
def test_the_weight_is_rounded_as_the_reference_does(
    dtype: torch.dtype, scales: torch.dtype, bits: int, groups: int
) -> None:
    scale = normal(33, groups, dtype=scales, seed=1).abs() / 10
    shift = integers(33, groups, bits=bits, seed=3)
    x, bias = normal(9, 96, dtype=dtype), normal(33, dtype=dtype, seed=2)
    check(x, integers(33, 96, bits=bits), scale, shift, bias, bits, config=SMALL)


@pytest.mark.parametrize("groups", [1, 5, 65])
@pytest.mark.parametrize("config", [None, SMALL, PARTS], ids=["default", "small", "parts"])
def test_eight_bits(groups: int, config: dict[str, int] | None) -> None:
    scale = normal(33, groups, seed=1).abs()
    check(normal(7, 65), integers(33, 65, bits=8), scale, None, normal(33, seed=2), 8, config=config)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "depth", "groups"), [(33, 65, 5), (1, 128, 2), (40, 300, 3), (7, 1, 1), (9, 9, 9)])
def test_an_expanded_weight_is_what_the_reference_multiplies(
    columns: int, depth: int, groups: int, bits: int, zero_point: bool
) -> None:
    weight, scale = integers(columns, depth, bits=bits), normal(columns, groups, seed=1).abs()
    shift = integers(columns, groups, bits=bits, seed=3) if zero_point else None
    stored = pack_int4(weight) if bits == 4 else weight
    found = kernels.int4_expanded(stored, scale, shift, depth, torch.float16)
    assert torch.equal(found, dequantize(weight, scale, shift).half())


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_multiply_an_expanded_weight(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MANY_ROWS", 8)
    x, weight, scale = normal(3, 3, 65), integers(33, 65, bits=bits), normal(33, 5, seed=1).abs()
    with mock.patch.object(kernels, "int4_expanded", side_effect=kernels.int4_expanded) as expanded:
        check(x, weight, scale, integers(33, 5, bits=bits, seed=3), normal(33, seed=2), bits)
        assert expanded.call_count == 2
        check(x[0], weight, scale, None, None, bits)
        check(x, weight, scale, None, None, bits, config=SMALL)
    assert expanded.call_count == 2


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_expansion_compiles(arch: int) -> None:
    arguments = {
        "w": "uint8", "scale": "bfloat16", "zero_point": None, "out": "bfloat16", "N": 4096, "K": 4096,
        "stride_wn": 2048, "stride_sn": 128, "stride_sg": 1, "stride_zn": 0, "stride_zg": 0,
    }  # fmt: skip
    constants = {"GROUP": 32, "PACKED": True, "BLOCK_N": 16, "BLOCK_K": 128}
    task = aot.job("fxpress.kernels.int4_matmul", "int4_expand_kernel", arguments, constants, archs=[arch])
    (found,) = aot.compiled({"expansion": task})["expansion"].values()
    assert found.get("error") is None and found["over"] is None and found["spills"] == 0
    assert "st.global.v4" in found["instructions"]


def test_strides() -> None:
    weight, scale = integers(9, 40, bits=4), normal(2, 9, seed=1).abs().T
    shift = integers(2, 9, bits=4, seed=3).T
    whole = torch.full((8, 60), float("nan"))
    whole[1:6, 3:43] = normal(5, 40)
    for x in (normal(2, 3, 5, 40), normal(40, 5).T, whole[1:6, 3:43], normal(1, 40).expand(5, 40), normal(40)):
        check(x, weight, scale, shift, None, 4, config=SMALL)
    check(normal(5, 40), integers(40, 9, bits=8).T, scale, shift, None, 8, config=SMALL)


def test_empty() -> None:
    for rows, columns in ((0, 3), (3, 0)):
        found = int4_matmul(torch.ones(rows, 8), pack_int4(integers(columns, 8, bits=4)), torch.ones(columns, 1))
        assert found.shape == (rows, columns)


def test_an_epilogue_of_the_callers(tmp_path: Path) -> None:
    epilogue = """
    value = tl.maximum(acc + batch + outer + inner, 0.0)
    tl.store(out + rows * N + cols, value, mask=inside)
    """
    module = hooks.generate(Path(str(kernels.__file__)), tmp_path / "relu.py", "out,\n", epilogue)
    x, weight, scale = normal(5, 40), integers(9, 40, bits=4), normal(9, 2, seed=1).abs()
    out = torch.full((5, 9), float("nan"))
    assert module.int4_matmul(x, pack_int4(weight), scale, extra=(out,), config=SMALL) is None
    torch.testing.assert_close(out, int4_linear(x, pack_int4(weight), scale, None, None).relu())


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.ones(2, 8).double(), torch.zeros(3, 4, dtype=torch.uint8), "found torch.float64"),
        (torch.ones(2, 8), torch.zeros(3, 4), r"w must be uint8 \(two integers a byte\) or int8, found torch.float32"),
        (torch.ones(2, 8), torch.zeros(3, 8, dtype=torch.uint8), r"w torch.uint8 \[3, 8\] does not fit x \[2, 8\]"),
        (torch.ones(2, 8), torch.zeros(3, 4, dtype=torch.int8), r"w torch.int8 \[3, 4\] does not fit x \[2, 8\]"),
    ],
)
def test_refused(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int4_matmul(x, w, torch.ones(3, 1))


SHAPES = {"decode": (1, 4096, 4096), "batch": (64, 4096, 4096), "large": (4096, 4096, 4096)}


def job(dtype: str, shape: tuple[int, int, int], config: dict[str, int], arch: int, packed: bool) -> dict[str, Any]:
    rows, columns, depth = shape
    constants = {name: value for name, value in config.items() if name.startswith("BLOCK")}
    given = {
        "x": dtype, "w": "uint8" if packed else "int8", "scale": dtype, "zero_point": "int8" if packed else None,
        "bias": dtype, "out": dtype, "stride_op": 0, "stride_oq": 0, "stride_om": columns, "stride_on": 1,
        "M": rows, "N": columns, "K": depth, "stride_xm": depth, "stride_xk": 1,
        "stride_wn": depth // 2 if packed else depth, "stride_sn": 32, "stride_sg": 1, "stride_zn": 32, "stride_zg": 1,
    }  # fmt: skip
    precision = "tf32x3" if (dtype, arch) == ("float32", 100) else "ieee"
    constants |= {"GROUP": depth // 32, "PACKED": packed, "PRECISION": precision, "EVEN_K": True}
    kernel = "int4_matmul_kernel"
    if config["SPLIT"] > 1:
        epilogue = ("bias", "out", "stride_op", "stride_oq", "stride_om", "stride_on")
        given = {name: value for name, value in given.items() if name not in epilogue} | {"partials": "float32"}
        kernel, constants["SPLIT"] = "int4_split_kernel", config["SPLIT"]
    return aot.job(
        "fxpress.kernels.int4_matmul", kernel, given, constants, [arch],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


JOBS = {
    f"{name} {arch} {packed}": job("bfloat16", shape, int4_configs(*shape, torch.bfloat16, arch)[0], arch, packed)
    for name, shape in SHAPES.items()
    for arch in (80, 90, 100)
    for packed in (True, False)
}


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_compiled(name: str, arch: int, packed: bool) -> None:
    found = aot.compiled(JOBS)[f"{name} {arch} {packed}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert {"cp.async.v4", "ld.global.v4"} & set(found["instructions"])
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_fits(arch: int) -> None:
    tasks = {}
    for shape in SHAPES.values():
        for dtype in (torch.bfloat16, torch.float32):
            for config in int4_configs(*shape, dtype, arch):
                name = str(dtype).removeprefix("torch.")
                tasks.setdefault(f"{name} {config}", job(name, shape, config, arch, packed=True))
    found = aot.compiled(tasks)
    over = {name: results[arch].get("error") or results[arch].get("over") for name, results in found.items()}
    assert over == dict.fromkeys(found)
    assert all(arch == 100 or "tf32" not in results[arch]["instructions"] for results in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (64, 768, 3072), (1000, 1001, 1003)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_configuration_on_a_gpu(dtype: torch.dtype, bits: int, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, weight = normal(rows, depth, dtype=dtype).cuda(), integers(columns, depth, bits=bits).cuda()
    groups = -(-depth // 128)
    scale = normal(columns, groups, dtype=dtype, seed=1).abs().cuda()
    shift = integers(columns, groups, bits=bits, seed=3).cuda()
    for config in int4_configs(*shape, dtype, arch_of(x.device)):
        check(x, weight, scale, shift, None, bits, config=config)
