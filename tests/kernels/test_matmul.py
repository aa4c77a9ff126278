"""Matmul kernels against torch, in Triton's interpreter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hooks
import numpy
import pytest
import torch
from build import normal
from torch import Tensor

import fxpress.ir.ops  # noqa: F401  registers fxpress::int8_linear
from fxpress.ir.equality import compare
from fxpress.kernels import matmul as kernels
from fxpress.kernels.launch import arch_of
from fxpress.kernels.matmul import batch_strides, linear_rows, matmul
from fxpress.kernels.matmul_configs import matmul_configs, tma_takes

SMALL = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "SPLIT": 1, "TMA": False,
    "PROGRAMS": 0, "num_warps": 4, "num_stages": 2,
}  # fmt: skip
SPLIT = {**SMALL, "SPLIT": 3}
TMA = {**SMALL, "TMA": True}
PERSISTENT = {**TMA, "PROGRAMS": 2}


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


@pytest.mark.parametrize("config", [None, SMALL, SPLIT, TMA], ids=["default", "small", "split", "tma"])
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_float8(rows: int, columns: int, depth: int, config: dict[str, int] | None) -> None:
    """Products are exact in float16, which an architecture without the format multiplies; sums are float32."""
    x, w = (
        (normal(*sizes, seed=sizes[0]) * 100).to(torch.float8_e4m3fn) for sizes in ((rows, depth), (columns, depth))
    )
    bias = normal(columns, seed=2)
    found = matmul(x, w, poisoned(rows, columns, dtype=torch.float32), bias, config=config)
    wide = [item.float() for item in (x, w)]
    verdict = compare([found], [reference(*wide, bias, torch.float32)], [reference(*wide, bias, torch.float64)])
    assert verdict.equal, verdict.reasons
    assert torch.equal(matmul(x, w, bias=bias, config=config), found)


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
@pytest.mark.parametrize("config", [TMA, PERSISTENT], ids=["a tile", "persistent"])
def test_blocks_of_descriptors(dtype: torch.dtype, rows: int, columns: int, depth: int, config: dict[str, int]) -> None:
    whole = torch.full((rows, 2 * depth), float("nan")).to(dtype)
    x = whole[:, 16 : depth + 16]
    x.copy_(integers(rows, depth))
    w, bias = integers(columns, depth, seed=1).to(dtype), integers(columns, seed=2)
    assert tma_takes(x, w)
    check(x, w, bias.to(torch.int32 if dtype == torch.int8 else dtype), config=config)


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
    ("x", "w", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"x \[2, 3\] and w \[2, 4\] must end in axes of one size"),
        (torch.ones(2, 3).double(), torch.ones(2, 3).double(), "found torch.float64"),
        (integers(2, 3), torch.ones(2, 3), "w must be int8 as x is, found torch.float32"),
        (
            torch.ones(2, 3).to(torch.float8_e4m3fn),
            torch.ones(2, 3),
            "w must be float8_e4m3fn as x is, found torch.float",
        ),
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


@pytest.mark.parametrize("config", [SMALL, SPLIT, TMA, PERSISTENT], ids=["small", "split", "tma", "persistent"])
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
    """All of them, or without those that load by descriptors, or without the last one."""
    x, w, ones = integers(9, 80), integers(33, 80, seed=1), torch.ones(33)
    made = (
        int8_linear.matmul_kernel, int8_linear.matmul_combine_kernel,
        int8_linear.matmul_descriptor_kernel, int8_linear.matmul_persistent_kernel,
    )  # fmt: skip
    for config in (SMALL, SPLIT, TMA, PERSISTENT):
        for count in (2, 3, 4):
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
