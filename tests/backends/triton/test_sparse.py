"""2:4 sparse weights on a GPU: compressed where that pays, and a reason where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from build import normal, program
from kernels_agree import agree
from operator_cases import sparse24
from torch import Tensor, nn

import fxpress
from fxpress.backends.triton import sparse
from fxpress.backends.triton.prepare import prepare
from fxpress.backends.triton.sparse import compress
from fxpress.compiler.driver import Compiled
from fxpress.ir.ops.sparse import sparse24_linear
from fxpress.ir.verify import verify
from fxpress.passes import Fuse, MaskWeights

X = normal(4, 640).half()


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int = 640, inner: int = 1024) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def masked() -> Compiled:
    """Of four rows."""
    torch.manual_seed(0)
    passes = [MaskWeights(0.5, pattern="2:4"), Fuse()]
    return fxpress.compile(Mlp().eval().half(), passes, (X,), backend="triton", dynamic_shapes=None)


@pytest.mark.slow
def test_a_masked_model_reads_its_weights_compressed(masked: Compiled) -> None:
    report = masked.report
    assert [item["operator"] for item in report.choices] == [
        "linear [4, 640] x [1024, 640]", "linear [4, 1024] x [640, 1024]",
    ]  # fmt: skip
    assert {item["chosen"] for item in report.choices} == {"sparse24_linear: 56% of the weight's bytes"}
    assert {item["operators"] for item in report.launches} == {"sparse24_linear add gelu", "sparse24_linear add add"}
    assert "2:4 sparse: 2 of 2 linear layers with so many zeros read them compressed" in str(report)
    assert "no speed-up" not in str(report)
    assert report.bytes_after < 0.57 * report.bytes_before
    torch.testing.assert_close(masked(X), masked.program(X), rtol=2e-3, atol=4e-3)


@pytest.mark.slow
def test_a_saved_model_holds_its_weights_compressed(masked: Compiled, tmp_path: Path) -> None:
    masked.save(tmp_path / "mlp", archs=[])
    loaded = fxpress.load(tmp_path / "mlp")
    assert loaded.source == masked.source
    assert torch.equal(loaded(X), masked(X))
    dense = 2 * 2 * 640 * 1024  # bytes
    assert sum(file.stat().st_size for file in (tmp_path / "mlp").glob("*.safetensors")) < 0.57 * dense


def test_where_rows_may_be_many_the_dense_weight_stays_beside() -> None:
    """One launch chooses by the rows that it is given; both have the epilogue."""
    model = Mlp(24, 32).half()
    model.up.weight.data, model.down.weight.data = sparse24(32, 24), sparse24(24, 32)
    ready = prepare(program(model, normal(4, 24).half()))
    found = {item["chosen"] for item in compress(ready, least=0)}
    assert found == {"sparse24_linear: 56% of the weight's bytes up to 64 rows, beyond the dense weight"}
    runner = agree(ready, [normal(3, 24).half()], [normal(65, 24).half()])
    assert {item["operators"] for item in runner.launches} == {"sparse24_linear add gelu", "sparse24_linear add add"}


@pytest.mark.slow
def test_on_the_cpu_nothing_changes() -> None:
    torch.manual_seed(0)
    compiled = fxpress.compile(Mlp(64, 128).eval(), [MaskWeights(0.5, pattern="2:4")], (normal(4, 64),), backend="onnx")
    assert "no speed-up here, masks kept: 50% of the weights are zero" in str(compiled.report)
    assert not compiled.program.calls(sparse24_linear)


# --- what is refused -----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A linear layer with a weight of the test's."""

    def __init__(self, weight: Tensor, again: bool = False) -> None:
        super().__init__()
        self.weight, self.again = nn.Parameter(weight), again

    def forward(self, x: Tensor) -> Any:
        found = nn.functional.linear(x, self.weight)
        return (found, self.weight.sum()) if self.again else found


def chosen(layer: nn.Module, x: Tensor, least: int = 0, dynamic: Any = None) -> list[str]:
    """What is said of the weights of a layer; the program stays well-formed and gives the same."""
    traced = program(layer, x, dynamic=dynamic)
    ready = prepare(traced)
    found = compress(ready, least)
    verify(ready)
    assert all(torch.equal(a, b) for a, b in zip(ready.run([x]), traced.run([x]), strict=True))
    assert len(ready.calls(sparse24_linear)) == sum(item["nodes"] for item in found if "sparse24" in item["chosen"])
    return [item["chosen"] for item in found]


def test_a_program_with_nothing_sparse_says_nothing() -> None:
    assert chosen(Layer(normal(8, 16).half()), normal(3, 16).half()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_compressed(dtype: torch.dtype) -> None:
    weight = sparse24(8, 16).to(dtype)
    assert chosen(Layer(weight), normal(3, 16).to(dtype)) == ["sparse24_linear: 56% of the weight's bytes"]


def test_zeros_anywhere() -> None:
    weight = torch.cat([normal(8, 8), torch.zeros(8, 8)], 1).half()
    assert chosen(Layer(weight), normal(3, 16).half()) == ["dense: not 2:4, 4 of 4 neighbours are not zero"]


def test_rows_that_are_no_fours() -> None:
    weight = sparse24(6, 8)[:, :6].contiguous()
    weight[:, :4:2] = 0
    weight[:, 1:4:2] = 1
    weight[:, 4:] = 0
    found = chosen(Layer(weight), normal(3, 6).half())
    assert found == ["dense: not 2:4, its rows have 6 numbers, no multiple of 4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_tensor_cores(dtype: torch.dtype) -> None:
    (found,) = chosen(Layer(sparse24(8, 16).to(dtype)), normal(3, 16).to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert (
        found == f"dense: products of {name} have no tensor cores in full precision, arithmetic is what takes the time"
    )


def test_a_weight_that_others_read() -> None:
    found = chosen(Layer(sparse24(8, 16), again=True), normal(3, 16).half())
    assert found == ["dense: others read the weight, too, and it would be there twice"]


def test_a_small_weight() -> None:
    (found,) = chosen(Layer(sparse24(8, 16)), normal(3, 16).half(), least=sparse.LEAST)
    assert found == "dense: 0.00 MB less to read, what pays begins at 0.52 MB"


@pytest.mark.parametrize("shape", [(65,), (2, 33), (1, 5, 13)], ids=str)
def test_many_rows(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel()
    found = chosen(Layer(sparse24(8, 16)), normal(*shape, 16).half())
    assert found == [f"dense: {rows} rows at the example's sizes, beyond 64 arithmetic is what takes the time"]


@pytest.mark.parametrize(
    ("most", "beside"), [(32, False), (33, True), (None, True)], ids=["64 at most", "66 at most", "any number"]
)
def test_the_rows_that_the_program_is_valid_for(most: int | None, beside: bool) -> None:
    dynamic = ({0: torch.export.Dim("batch", min=2, max=most)},)
    (found,) = chosen(Layer(sparse24(8, 16)), normal(4, 2, 16).half(), dynamic=dynamic)
    assert found.endswith("up to 64 rows, beyond the dense weight") == beside


def test_integers() -> None:
    torch.manual_seed(0)
    passes = "mask_weights(pattern='2:4'), quantize(int8), fuse"
    compiled = fxpress.compile(Mlp(64, 128).eval(), passes, (normal(4, 64),), backend="triton")
    assert {item["chosen"] for item in compiled.report.choices} == {
        "dense: its weight is quantized, of so few bytes that to expand them takes as long as to read them"
    }


def test_equal_layers_share_their_kernels() -> None:
    model = nn.Sequential(*(Layer(sparse24(24, 24, seed=seed)) for seed in range(3)))
    traced = program(model, normal(5, 24).half(), dynamic=None)
    assert agree(traced, [normal(5, 24).half()]).generated.choices[0]["nodes"] == 3
