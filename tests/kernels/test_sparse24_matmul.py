"""Matmul with a 2:4 sparse weight, against the operator's reference, and compiled for GPUs that are not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aot
import hooks
import numpy
import pytest
import torch
from build import normal
from operator_cases import sparse24
from torch import Tensor

from fxpress.ir.equality import compare
from fxpress.ir.ops.sparse import pack_sparse24, sparse24_linear
from fxpress.kernels import sparse24_matmul as kernels
from fxpress.kernels.launch import arch_of
from fxpress.kernels.sparse24_matmul import FEW_ROWS, sparse24_configs, sparse24_matmul

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
DEEP = {**SMALL, "BLOCK_K": 128}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """The interpreter computes what is masked too: numpy would warn of overflow there."""
    with numpy.errstate(all="ignore"):
        yield


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, dense: Tensor | None = None, **options: Any) -> None:
    """Equal to a linear layer with the dense weight; all of `out` is written."""
    packed = pack_sparse24(weight)
    eager = sparse24_linear(x, *packed, bias)
    judge = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = torch.full_like(eager, float("nan"))
    assert sparse24_matmul(x, *packed, dense, out, bias, **options) is out
    verdict = compare([out], [eager], [judge])
    assert verdict.equal, verdict.reasons
    assert torch.equal(sparse24_matmul(x, *packed, dense, bias=bias, **options), out)


@pytest.mark.parametrize("config", [None, SMALL, DEEP], ids=["default", "small", "deep"])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 7, 36), (7, 33, 64), (33, 40, 100), (17, 1, 128), (65, 7, 4), (3, 4, 0)]
)
def test_equals_the_dense_layer(rows: int, columns: int, depth: int, config: dict[str, int] | None) -> None:
    bias = normal(columns).half() if rows != 7 else None
    check(normal(rows, depth).half(), sparse24(columns, depth), bias, config=config)


def test_every_pair_of_positions() -> None:
    pairs = [[1.0 if place in (a, b) else 0.0 for place in range(4)] for a in range(4) for b in range(a, 4)]
    weight = torch.tensor(pairs).repeat(1, 3) * torch.arange(1, 13)
    check(torch.eye(12).half(), weight.half(), config=SMALL)


def test_strides() -> None:
    weight = sparse24(9, 40)
    whole = torch.full((8, 60), float("nan")).half()
    whole[1:6, 3:43] = normal(5, 40).half()
    for x in (normal(2, 3, 5, 40), normal(40, 5).T, whole[1:6, 3:43], normal(1, 40).expand(5, 40), normal(40)):
        check(x.half(), weight, config=SMALL)


def test_many_rows_read_the_dense_weight() -> None:
    x, weight, bias = normal(FEW_ROWS + 1, 36).half(), sparse24(9, 36), normal(9).half()
    check(x, weight, bias, dense=weight)
    packed, other = pack_sparse24(weight), torch.ones_like(weight)  # another one: it is seen where it is read
    torch.testing.assert_close(sparse24_matmul(x, *packed, other), x.sum(-1, keepdim=True).expand(-1, 9))
    few = x[:FEW_ROWS]
    assert torch.equal(sparse24_matmul(few, *packed, other), sparse24_matmul(few, *packed))


def test_what_is_beyond_a_row_is_not_read() -> None:
    """NaN in x stays in its row, also where the last block of K is not whole."""
    x = normal(5, 36).half()
    x[2, 35] = float("nan")
    found = sparse24_matmul(x, *pack_sparse24(sparse24(9, 36)), config=SMALL)
    assert found.isnan().any(1).tolist() == [False, False, True, False, False]


def test_empty() -> None:
    for rows, columns in ((0, 3), (3, 0)):
        assert sparse24_matmul(torch.ones(rows, 8).half(), *pack_sparse24(sparse24(columns, 8))).shape == (
            rows,
            columns,
        )


def test_an_epilogue_of_the_callers(tmp_path: Path) -> None:
    epilogue = """
    value = tl.maximum(acc + batch + outer + inner, 0.0)
    tl.store(out + rows * N + cols, value.to(tl.float16), mask=inside)
    """
    module = hooks.generate(Path(str(kernels.__file__)), tmp_path / "sparse_relu.py", "out,\n", epilogue)
    x, packed = normal(5, 40).half(), pack_sparse24(sparse24(9, 40))
    out = torch.full((5, 9), float("nan")).half()
    assert module.sparse24_matmul(x, *packed, extra=(out,), config=SMALL) is None
    torch.testing.assert_close(out, sparse24_linear(x, *packed, None).relu())


@pytest.mark.parametrize(
    ("x", "values", "positions", "message"),
    [
        (torch.ones(2, 8), torch.ones(3, 4), torch.ones(3, 1), "found torch.float32 and torch.float32"),
        (torch.ones(2, 8).half(), torch.ones(3, 4), torch.ones(3, 1), "found torch.float16 and torch.float32"),
        (torch.ones(2, 8).half(), torch.ones(3, 8).half(), torch.ones(3, 1), r"values \[3, 8\] and positions"),
        (torch.ones(2, 8).half(), torch.ones(3, 4).half(), torch.ones(3, 1), r"positions torch.float32 \[3, 1\]"),
        (
            torch.ones(2, 12).half(),
            torch.ones(3, 6).half(),
            torch.ones(3, 1).byte(),
            r"\[3, 1\] do not fit x \[2, 12\]",
        ),
    ],
)
def test_refused(x: Tensor, values: Tensor, positions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse24_matmul(x, values, positions)


# --- compiled ------------------------------------------------------------------------------------------------------

SHAPES = {"decode": (1, 4096, 4096), "few": (32, 4096, 4096), "batch": (64, 4096, 4096)}


def job(shape: tuple[int, int, int], config: dict[str, int], arch: int, dtype: str = "bfloat16") -> dict[str, Any]:
    rows, columns, depth = shape
    given = {
        "x": dtype, "values": dtype, "positions": "uint8", "bias": dtype, "out": dtype,
        "stride_op": 0, "stride_oq": 0, "stride_om": columns, "stride_on": 1,
        "M": rows, "N": columns, "K": depth, "stride_xm": depth, "stride_xk": 1,
        "stride_vn": depth // 2, "stride_pn": depth // 8,
    }  # fmt: skip
    constants = {name: value for name, value in config.items() if name.startswith("BLOCK")}
    constants["EVEN_K"] = depth % config["BLOCK_K"] == 0
    return aot.job(
        "fxpress.kernels.sparse24_matmul", "sparse24_matmul_kernel", given, constants, [arch],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


JOBS = {
    f"{name} {arch}": job(shape, sparse24_configs(*shape, arch)[0], arch)
    for name, shape in SHAPES.items()
    for arch in (80, 90, 100)
}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_compiled(name: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{name} {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert "cp.async.v4" in found["instructions"]
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64, 65, 4096])
@pytest.mark.parametrize("columns", [1, 768, 4096])
def test_there_is_a_configuration(rows: int, columns: int) -> None:
    for arch in (80, 89, 90, 100, 120):
        found = sparse24_configs(rows, columns, 1024, arch)
        assert found and all(config["BLOCK_M"] < 2 * max(rows, 16) for config in found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_fits(arch: int) -> None:
    tasks = {}
    for shape in (*SHAPES.values(), (4096, 4096, 4096), (7, 1001, 1004)):
        for dtype in ("bfloat16", "float16"):
            for config in sparse24_configs(*shape, arch):
                tasks.setdefault(f"{dtype} {config} {shape[2] % 16}", job(shape, config, arch, dtype))
    found = aot.compiled(tasks)
    over = {name: results[arch].get("error") or results[arch].get("over") for name, results in found.items()}
    assert over == dict.fromkeys(found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (17, 768, 3072), (64, 1001, 1004)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_configuration_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, weight = normal(rows, depth, dtype=dtype).cuda(), sparse24(columns, depth).to(dtype).cuda()
    for config in sparse24_configs(*shape, arch_of(x.device)):
        check(x, weight, config=config)
