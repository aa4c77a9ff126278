"""Matmul kernels against torch, in Triton's interpreter, and compiled for GPUs that are not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aot
import hooks
import numpy
import pytest
import torch
from build import normal
from torch import Tensor

import fxpress.ir.ops  # noqa: F401  registers fxpress::int8_linear
from fxpress.backends.triton.aot import LIMITS
from fxpress.ir.equality import compare
from fxpress.kernels import matmul as kernels
from fxpress.kernels.launch import arch_of
from fxpress.kernels.matmul import batch_strides, dot_precision, linear_rows, matmul, matmul_configs, tma_takes

SMALL = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "SPLIT": 1, "TMA": False,
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip
SPLIT = {**SMALL, "SPLIT": 3}
TMA = {**SMALL, "TMA": True}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """The interpreter computes what is masked too: numpy would warn of overflow there."""
    with numpy.errstate(all="ignore"):
        yield


def integers(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def poisoned(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.full(sizes, float("nan") if dtype.is_floating_point else 123456789, dtype=dtype)


def reference(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In a dtype; that of integers by way of doubles, which hold the sums."""
    wide = dtype if dtype.is_floating_point else torch.float64
    product = (x.to(wide) @ w.to(wide).transpose(-1, -2)).to(dtype)
    return product if bias is None else product + bias.to(dtype)


def check(x: Tensor, w: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`matmul` is equal to torch, writes all of `out` and nothing else."""
    eager = reference(x, w, bias, x.dtype if x.is_floating_point() else torch.int32)
    judge = reference(x, w, bias, torch.float64) if x.is_floating_point() else eager
    before = [tensor.clone() for tensor in (x, w)]
    out = poisoned(*eager.shape, dtype=eager.dtype).to(x.device)
    found = matmul(x, w, out, bias, **options)
    assert found is out
    verdict = compare([found], [eager], [judge])
    assert verdict.equal, verdict.reasons
    again = matmul(x, w, bias=bias, **options)
    assert again.dtype == found.dtype
    assert torch.equal(again, found) or found.isnan().any()
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, (x, w), strict=True))
    return found


SIZES = [(1, 7, 33), (7, 33, 65), (33, 65, 1), (65, 1, 7), (33, 65, 128), (64, 96, 64), (5, 3, 0)]


@pytest.mark.parametrize("config", [None, SMALL, SPLIT], ids=["default", "small", "split"])
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_floats(dtype: torch.dtype, rows: int, columns: int, depth: int, config: dict[str, int] | None) -> None:
    x, w = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype, seed=1)
    check(x, w, normal(columns, dtype=dtype, seed=2) if rows != 7 else None, config=config)


@pytest.mark.parametrize("config", [None, SMALL, SPLIT], ids=["default", "small", "split"])
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_integers_are_exact(rows: int, columns: int, depth: int, config: dict[str, int] | None) -> None:
    bias = torch.arange(columns, dtype=torch.int32) * 1000003
    found = check(integers(rows, depth), integers(columns, depth, seed=1), bias, config=config)
    assert found.dtype == torch.int32


def test_the_largest_integers() -> None:
    x = torch.full((3, 100), -128, dtype=torch.int8)
    assert matmul(x, x).unique().tolist() == [100 * 128 * 128]


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((2, 3, 5, 40), (2, 3, 7, 40)),
        ((2, 3, 5, 40), (7, 40)),
        ((5, 40), (3, 7, 40)),
        ((2, 1, 5, 40), (3, 7, 40)),
        ((1, 3, 5, 40), (2, 3, 7, 40)),
        ((2, 2, 3, 5, 40), (2, 2, 1, 7, 40)),
        ((2, 1, 3, 5, 40), (1, 2, 1, 7, 40)),
        ((1, 1, 1, 5, 40), (7, 40)),
    ],
)
def test_batches(x: tuple[int, ...], w: tuple[int, ...], config: dict[str, int]) -> None:
    check(normal(*x), normal(*w, seed=1), normal(7, seed=2), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(33, 65, 64), (1, 7, 48), (65, 3, 112)])
def test_blocks_of_descriptors(dtype: torch.dtype, rows: int, columns: int, depth: int) -> None:
    whole = torch.full((rows, 2 * depth), float("nan")).to(dtype)
    x = whole[:, 16 : depth + 16]
    x.copy_(integers(rows, depth))
    w, bias = integers(columns, depth, seed=1).to(dtype), integers(columns, seed=2)
    assert tma_takes(x, w)
    check(x, w, bias.to(torch.int32 if dtype == torch.int8 else dtype), config=TMA)


def test_what_descriptors_cannot_say_is_loaded_by_pointers() -> None:
    whole = normal(33, 64)
    for x in (
        whole[:, 1:49],
        whole[:, :47],
        normal(48, 33).T,
        whole[:, :48].expand(2, 33, 48),
        normal(1, 48).expand(9, 48),
    ):
        w = normal(9, x.shape[-1], seed=1)
        assert not tma_takes(x, w)
        check(x, w, config=TMA)
    assert not tma_takes(whole, integers(9, 64))


@pytest.mark.parametrize("sizes", [(0, 5, 8), (5, 0, 8), (5, 7, 0)], ids=["no rows", "no columns", "no depth"])
@pytest.mark.parametrize("batch", [(), (2,), (0, 2)], ids=str)
def test_empty(batch: tuple[int, ...], sizes: tuple[int, int, int]) -> None:
    rows, columns, depth = sizes
    check(torch.ones(*batch, rows, depth), torch.ones(columns, depth), torch.ones(columns))
    assert matmul(torch.ones(*batch, rows, 0), torch.ones(columns, 0)).eq(0).all()


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
class TestStrides:
    def test_transposed(self, config: dict[str, int]) -> None:
        check(normal(65, 33).T, normal(65, 40, seed=1).T, config=config)

    def test_heads(self, config: dict[str, int]) -> None:
        """Scores of attention, from [B, N, H D] without a copy."""
        query, key = (normal(2, 9, 3 * 8, seed=seed).view(2, 9, 3, 8).transpose(1, 2) for seed in range(2))
        check(query, key, config=config)

    def test_what_is_beside_a_slice_is_not_read(self, config: dict[str, int]) -> None:
        x, w = torch.full((40, 80), float("nan")), torch.full((50, 160), float("nan"))
        x[3:36, 5:70], w[:41, :130:2] = normal(33, 65), normal(41, 65, seed=1)
        check(x[3:36, 5:70], w[:41, :130:2], config=config)

    def test_expanded(self, config: dict[str, int]) -> None:
        check(normal(1, 40).expand(7, 40), normal(9, 1, seed=1).expand(9, 40), config=config)
        check(normal(2, 1, 5, 40).expand(2, 4, 5, 40), normal(1, 4, 7, 40).expand(2, 4, 7, 40), config=config)

    def test_where_to_write(self, config: dict[str, int]) -> None:
        x, w = normal(2, 3, 5, 40), normal(2, 3, 7, 40, seed=1)
        whole = poisoned(2, 5, 4, 20, dtype=torch.float32)
        out = whole.permute(0, 2, 1, 3)[:, :3, :, 1:15:2]
        assert matmul(x, w, out, config=config) is out
        torch.testing.assert_close(out, x @ w.transpose(-1, -2))
        assert whole.isnan().sum() == whole.numel() - out.numel()

    def test_where_no_two_strides_lead(self, config: dict[str, int]) -> None:
        x, w = (normal(3, 2, 2, 5, 40, seed=seed).transpose(0, 2) for seed in range(2))
        out = poisoned(3, 2, 2, 5, 5, dtype=torch.float32).transpose(0, 2)
        assert matmul(x, w, out, config=config) is out
        torch.testing.assert_close(out, x @ w.transpose(-1, -2))

    def test_nan_and_infinity_stay_in_their_rows_and_columns(self, config: dict[str, int]) -> None:
        x, w = normal(33, 40), normal(35, 40, seed=1)
        x[3, 5], x[7, 39], w[34, 0] = float("nan"), float("inf"), float("-inf")
        check(x, w, config=config)


def test_a_batch_is_walked_over_without_copies() -> None:
    x, w = normal(2, 3, 4, 5, 6), normal(2, 3, 1, 7, 6)
    inner, strides, same = batch_strides(torch.Size([2, 3, 4]), [x, w])
    assert inner == 4
    assert strides == [(120, 30, 6, 1), (42, 0, 6, 1)]
    assert same[0] is x and same[1] is w


def test_as_many_axes_as_it_takes_are_inner() -> None:
    x, w = normal(2, 3, 4, 5, 6), normal(2, 1, 1, 7, 6)
    inner, strides, same = batch_strides(torch.Size([2, 3, 4]), [x, w])
    assert inner == 12
    assert strides == [(360, 30, 6, 1), (42, 0, 6, 1)]
    assert same[0] is x and same[1] is w


def test_the_inner_axis_is_the_last_where_an_epilogue_reads_it() -> None:
    x, w = normal(2, 3, 4, 5, 6), normal(2, 1, 1, 7, 6)
    inner, strides, same = batch_strides(torch.Size([2, 3, 4]), [x, w], fixed=True)
    assert inner == 4
    assert strides[0] == (120, 30, 6, 1)
    assert same[0] is x and torch.equal(same[1], w.expand(2, 3, 4, 7, 6))


@pytest.mark.parametrize("sizes", [(6,), (5, 6), (2, 3, 4, 6), (0, 6), (3, 0)], ids=str)
def test_rows_of_a_linear_layer(sizes: tuple[int, ...]) -> None:
    x = normal(*sizes)
    rows = linear_rows(x)
    assert torch.equal(rows, x.reshape(1, 1, -1, sizes[-1]) if sizes[-1] else torch.empty(1, 1, sizes[0], 0))
    assert rows.data_ptr() == x.data_ptr()


def test_weights_of_integers_are_cast() -> None:
    x, w = normal(5, 40), integers(7, 40)
    verdict = compare([matmul(x, w, config=SMALL)], [x @ w.float().T], [x.double() @ w.double().T])
    assert verdict.equal, verdict.reasons


@pytest.mark.parametrize(
    ("precision", "dtype", "weight", "capability", "expected"),
    [
        ("ieee", torch.float32, torch.int8, (10, 0), "tf32x3"),
        ("ieee", torch.float32, torch.uint8, (10, 3), "tf32x3"),
        ("ieee", torch.float32, torch.float32, (10, 0), "ieee"),
        ("ieee", torch.bfloat16, torch.int8, (10, 0), "ieee"),
        ("ieee", torch.float32, torch.int8, (9, 0), "ieee"),
        ("ieee", torch.float32, torch.int8, (12, 0), "ieee"),
        ("tf32", torch.float32, torch.int8, (10, 0), "tf32"),
    ],
)
def test_ieee_is_never_tf32(
    precision: str,
    dtype: torch.dtype,
    weight: torch.dtype,
    capability: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dot_precision(precision, dtype, weight, torch.device("cuda")) == expected
    assert dot_precision(precision, dtype, weight, torch.device("cpu")) == precision


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"x \[2, 3\] and w \[2, 4\] must end in axes of one size"),
        (torch.ones(2, 3).double(), torch.ones(2, 3).double(), "found torch.float64"),
        (integers(2, 3), torch.ones(2, 3), "w must be int8 as x is, found torch.float32"),
    ],
)
def test_refused(x: Tensor, w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(x, w)


# --- epilogues of the caller's -------------------------------------------------------------------------------------

INT8_LINEAR = """
scale = tl.load(scales + batch * M + rows, mask=rows < M, other=0.0)
shifts = tl.load(zero_points + batch * M + rows, mask=rows < M, other=0)
channel = tl.load(weight_scale + cols, mask=cols < N, other=0.0)
centred = acc - shifts * tl.load(weight_sums + cols, mask=cols < N, other=0)
value = centred.to(tl.float32) * (scale.to(tl.float32) * channel.to(tl.float32))
value += tl.load(bias + cols, mask=cols < N, other=0.0)
tl.store(out + (batch * M + rows) * N + cols, value.to(out.dtype.element_ty), mask=inside)
"""


@pytest.fixture(scope="module")
def int8_linear(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("generated") / "int8_linear.py"
    names = ("scales", "zero_points", "weight_scale", "weight_sums", "bias", "out")
    return hooks.generate(Path(str(kernels.__file__)), target, "\n".join(f"{name}," for name in names), INT8_LINEAR)


@pytest.mark.parametrize("config", [SMALL, SPLIT, TMA], ids=["small", "split", "tma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_int8_linear_layer(int8_linear: Any, dtype: torch.dtype, config: dict[str, int]) -> None:
    x, w = integers(2, 9, 80), integers(33, 80, seed=1)
    scale = normal(2, 9, 1).abs().to(dtype) / 100
    zero_point = torch.randint(-128, 128, (2, 9, 1), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    weight_scale, bias = normal(33, 1, dtype=dtype, seed=4).abs(), normal(33, dtype=dtype, seed=5)
    expected = torch.ops.fxpress.int8_linear(x, scale, zero_point.to(dtype), w, weight_scale, bias)
    out = poisoned(2, 9, 33, dtype=dtype)
    extra = (scale, zero_point, weight_scale, w.sum(-1, dtype=torch.int32), bias, out)
    rows = int8_linear.linear_rows(x)
    assert int8_linear.tma_takes(rows, w)
    assert int8_linear.matmul(rows, w, extra=extra, config=config) is None
    exact = (x.double() - zero_point) @ w.double().T * (scale.double() * weight_scale.double().T) + bias.double()
    verdict = compare([out], [expected], [exact])
    assert verdict.equal, verdict.reasons


def test_generated_kernels_are_given_to_the_launcher(int8_linear: Any) -> None:
    """All three, or without the one that loads by descriptors."""
    x, w, ones = integers(9, 80), integers(33, 80, seed=1), torch.ones(33)
    made = (int8_linear.matmul_kernel, int8_linear.matmul_combine_kernel, int8_linear.matmul_descriptor_kernel)
    for config in (SMALL, SPLIT, TMA):
        for count in (2, 3):
            out = poisoned(9, 33, dtype=torch.float32)
            extra = (ones, torch.zeros(9, dtype=torch.int32), ones, torch.zeros(33, dtype=torch.int32), ones, out)
            matmul(x, w, extra=extra, config=config, kernels=made[:count])
            assert torch.equal(out, reference(x, w, None, torch.int32).float() + 1)


RESIDUAL = """
value = acc + tl.load(residual + outer * 100 + inner * 10 + rows * 0 + cols * 0)
tl.store(out + (batch * M + rows) * N + cols, value, mask=inside)
"""


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["small", "split"])
def test_an_epilogue_knows_its_place_in_the_batch(tmp_path: Path, config: dict[str, int]) -> None:
    module = hooks.generate(Path(str(kernels.__file__)), tmp_path / "place.py", "residual,\nout,\n", RESIDUAL)
    x, w, residual = normal(2, 2, 3, 5, 40), normal(2, 1, 1, 7, 40, seed=1), normal(400, seed=2)
    out = poisoned(2, 2, 3, 5, 7, dtype=torch.float32)
    module.matmul(x, w, extra=(residual, out), config=config)
    added = residual[torch.arange(4)[:, None] * 100 + torch.arange(3) * 10].view(2, 2, 3, 1, 1)
    torch.testing.assert_close(out, x @ w.transpose(-1, -2) + added)


# --- configurations ------------------------------------------------------------------------------------------------

SHAPES = [(1, 4096, 4096), (1, 512, 11008), (17, 768, 3072), (128, 768, 768), (512, 30522, 768), (8192, 8192, 8192)]
ODD = (1000, 1001, 1003)
KINDS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
    "int8": (torch.int8, "ieee"),
}  # by name, the dtype and what tl.dot may do to float32


@pytest.mark.parametrize("arch", [75, 80, 90, 100, 103, 120])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1), ODD])
def test_configurations(shape: tuple[int, int, int], kind: str, arch: int) -> None:
    dtype, precision = KINDS[kind]
    found = matmul_configs(*shape, dtype, arch, precision=precision)
    assert found
    assert all(config not in found[:index] for index, config in enumerate(found))
    assert found == matmul_configs(*shape, dtype, arch, precision=precision)
    limit = LIMITS[arch if arch in LIMITS else 80].shared
    for config in found:
        block = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize
        assert config["num_stages"] * block <= limit
        assert config["BLOCK_M"] >= 16 and config["BLOCK_N"] >= 16
        assert config["BLOCK_K"] * dtype.itemsize >= 32


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_first_guess_fits_the_shape(arch: int) -> None:
    def first(*shape: int) -> dict[str, int]:
        return matmul_configs(*shape, torch.bfloat16, arch)[0]

    large = first(8192, 8192, 8192)
    assert (large["BLOCK_M"], large["BLOCK_N"]) == (128, 256)
    assert large["SPLIT"] == 1
    few = first(1, 512, 11008)
    assert few["BLOCK_M"] == 16
    assert few["SPLIT"] > 1


# --- compiled ------------------------------------------------------------------------------------------------------

MODULE = "fxpress.kernels.matmul"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def on_tensor_cores(instructions: list[str], kind: str, arch: int) -> bool:
    """Whether the best instructions of an architecture are used; Triton has tcgen05 for integers from 3.9 on only."""
    best = TENSOR_CORES[arch] in instructions
    return best or ((kind, arch) == ("int8", 100) and "mma.sync" in instructions)


def arguments(dtype: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Of x [M, K] and w [N, K], contiguous."""
    rows, columns, depth = shape
    return {
        "x": dtype, "w": dtype, "M": rows, "N": columns, "K": depth, "Q": 1,
        "stride_xp": 0, "stride_xq": 0, "stride_xm": depth, "stride_xk": 1,
        "stride_wp": 0, "stride_wq": 0, "stride_wn": depth, "stride_wk": 1,
    }  # fmt: skip


def written(dtype: str, columns: int, bias: bool) -> dict[str, Any]:
    """The default epilogue's arguments."""
    out = "int32" if dtype == "int8" else dtype
    strides = {"stride_op": 0, "stride_oq": 0, "stride_om": columns, "stride_on": 1}
    return {"bias": out if bias else None, "out": out, **strides}


def job(kind: str, shape: tuple[int, int, int], config: dict[str, int], arch: int, bias: bool = True) -> dict[str, Any]:
    dtype, precision = KINDS[kind]
    name = str(dtype).removeprefix("torch.")
    given = arguments(name, shape)
    constants = {key: value for key, value in config.items() if key.startswith(("BLOCK", "GROUP"))}
    constants |= {"PRECISION": precision, "EVEN_K": shape[2] % config["BLOCK_K"] == 0}
    kernel = "matmul_kernel"
    if config["TMA"]:
        kernel = "matmul_descriptor_kernel"
        del constants["EVEN_K"]
        given = {key: value for key, value in given.items() if key in "MNKQ"} | written(name, shape[1], bias)
        given |= {"x": [name, config["BLOCK_M"], config["BLOCK_K"]], "w": [name, config["BLOCK_N"], config["BLOCK_K"]]}
    elif config["SPLIT"] > 1:
        kernel = "matmul_split_kernel"
        constants["SPLIT"] = config["SPLIT"]
        given |= {"partials": "int32" if kind == "int8" else "float32", "stride_split": shape[0] * shape[1]}
    else:
        given |= written(name, shape[1], bias)
    return aot.job(
        MODULE, kernel, given, constants, [arch], num_warps=config["num_warps"], num_stages=config["num_stages"]
    )


def best(kind: str, shape: tuple[int, int, int], arch: int, tma: bool = False) -> dict[str, Any]:
    dtype, precision = KINDS[kind]
    return job(kind, shape, matmul_configs(*shape, dtype, arch, precision=precision, tma=tma)[0], arch)


TMA_KINDS = ("bfloat16", "tf32", "int8")
LARGE, DECODE, ONES = (4096, 4096, 4096), (1, 512, 11008), (1, 1, 1)
JOBS = {
    f"{kind} {name} {arch}": best(kind, shape, arch)
    for kind in KINDS
    for name, shape in (("large", LARGE), ("decode", DECODE))
    for arch in (80, 90, 100)
}
for arch in (80, 90, 100):
    JOBS |= {f"bfloat16 ones {arch}": best("bfloat16", ONES, arch)}
    JOBS |= {f"{kind} odd {arch}": best(kind, ODD, arch) for kind in ("bfloat16", "tf32")}
JOBS |= {f"{kind} tma {arch}": best(kind, LARGE, arch, tma=True) for kind in TMA_KINDS for arch in (90, 100)}
JOBS["combine"] = aot.job(
    MODULE,
    "matmul_combine_kernel",
    {"partials": "float32", **written("bfloat16", 4096, True), "M": 1, "N": 4096, "Q": 1, "stride_split": 4096},
    {"SPLIT": 4, "BLOCK_M": 4, "BLOCK_N": 128},
)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", ["large", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str, name: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{kind} {name} {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    used = found["instructions"]
    assert "cp.async.v4" in used or "ld.global.v4" in used
    assert ("tf32" in used) == (kind == "tf32")
    if kind == "float32":
        assert not {"mma.sync", "wgmma", "tcgen05"} & set(used)
    elif name == "large":
        assert on_tensor_cores(used, kind, arch)
    else:
        assert {"mma.sync", "wgmma", "tcgen05"} & set(used)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("kind", TMA_KINDS)
def test_descriptors_are_loaded_by_tma(kind: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{kind} tma {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert "tma" in found["instructions"]
    assert on_tensor_cores(found["instructions"], kind, arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", ["bfloat16 odd", "tf32 odd", "bfloat16 ones"])
def test_odd_sizes_compile_too(name: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{name} {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_combining_kernel_compiles(arch: int) -> None:
    found = aot.compiled(JOBS)["combine"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert "ld.global.v4" in found["instructions"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_fits(kind: str, arch: int) -> None:
    dtype, precision = KINDS[kind]
    tasks = {}
    for shape in (*SHAPES, ODD):
        for config in matmul_configs(*shape, dtype, arch, precision=precision, tma=True):
            tasks.setdefault(f"{config} {shape[2] % 16 == 0}", job(kind, shape, config, arch))
    found = aot.compiled(tasks)
    over = {name: results[arch].get("error") or results[arch].get("over") for name, results in found.items()}
    assert over == dict.fromkeys(found)
    assert all(("tf32" in results[arch]["instructions"]) == (kind == "tf32") for results in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_transposed_weight_is_loaded_by_16_bytes_too(arch: int) -> None:
    tasks = {kind: best(kind, LARGE, arch) for kind in TMA_KINDS}
    for task in tasks.values():
        task["arguments"] |= {"stride_wn": 1, "stride_wk": LARGE[1]}
    for kind, found in aot.compiled(tasks).items():
        assert "error" not in found[arch], found
        assert found[arch]["over"] is None
        assert "cp.async.v4" in found[arch]["instructions"]
        assert on_tensor_cores(found[arch]["instructions"], kind, arch)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (17, 768, 3072), (1000, 1001, 1003), (512, 512, 512)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "ieee"),
        (torch.float16, "ieee"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32x3"),
        (torch.int8, "ieee"),
    ],
    ids=str,
)
def test_every_configuration_on_a_gpu(dtype: torch.dtype, precision: str, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    if dtype == torch.int8:
        x, w, bias = integers(rows, depth), integers(columns, depth, seed=1), torch.arange(columns, dtype=torch.int32)
    else:
        x, w = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype, seed=1)
        bias = normal(columns, dtype=dtype, seed=2)
    x, w, bias = x.cuda(), w.cuda(), bias.cuda()
    for config in matmul_configs(*shape, dtype, arch_of(x.device), precision=precision, tma=tma_takes(x, w)):
        check(x, w, bias, config=config, precision=precision)
