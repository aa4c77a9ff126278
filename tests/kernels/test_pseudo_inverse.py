"""Inverses of small matrices, in the interpreter, against fxpress::pseudo_inverse; and compiled ahead of time."""

from collections.abc import Callable

import aot
import launched
import pytest
import torch
from attention_cases import interpreted
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.equality import compare, widen
from fxpress.ir.ops import low_rank_attention as op
from fxpress.ir.ops.table import OPERATORS
from fxpress.kernels import pseudo_inverse as kernels


def equal(matrix: Tensor, iterations: int = 6) -> Tensor:
    reference = OPERATORS[op.pseudo_inverse].reference
    with interpreted(kernels, None):
        found = kernels.pseudo_inverse(matrix, iterations)
    comparison = compare([found], [reference(matrix, iterations)], [reference(widen(matrix), iterations)])
    assert comparison.equal, comparison.reasons
    return found


def probabilities(*sizes: int) -> Tensor:
    return normal(*sizes).softmax(-1)


@settings(max_examples=20)
@given(size=st.integers(1, 64), batch=st.sampled_from([(), (3,), (2, 2)]), iterations=st.integers(0, 7))
def test_it_is_the_operator(size: int, batch: tuple[int, ...], iterations: int) -> None:
    equal(probabilities(*batch, size, size), iterations)


def test_half_precision_is_computed_in_fp32() -> None:
    matrix = probabilities(2, 5, 5).half()
    assert torch.equal(kernels.pseudo_inverse(matrix), kernels.pseudo_inverse(matrix.float()).half())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, -x], -1)[..., 0],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, None].expand(-1, 2, -1, -1),
    ],
    ids=["columns", "every second", "expanded", "an axis of stride 0"],
)  # fmt: skip
def test_layouts(view: Callable[[Tensor], Tensor]) -> None:
    equal(view(probabilities(3, 7, 7)))


def test_an_inverse() -> None:
    matrix = 0.8 * torch.eye(9) + 0.2 * probabilities(9, 9)
    torch.testing.assert_close(equal(matrix) @ matrix, torch.eye(9), atol=1e-5, rtol=0)


def test_one_number_and_none() -> None:
    assert kernels.pseudo_inverse(torch.ones(1, 1)).tolist() == [[1.0]]
    assert kernels.pseudo_inverse(torch.ones(0, 3, 3)).shape == (0, 3, 3)


def test_matrices_that_are_too_large() -> None:
    with pytest.raises(ValueError, match="at most 64 rows are inverted by one program each, found 65"):
        kernels.pseudo_inverse(torch.eye(65))


@pytest.mark.slow
def test_it_is_compiled_without_spills_and_without_tf32() -> None:
    jobs = {
        f"{arch}": launched.jobs(kernels, arch, lambda: kernels.pseudo_inverse(torch.empty(24, 64, 64)))
        for arch in (80, 90, 100)
    }
    for arch, results in aot.compiled({arch: job["pseudo_inverse_kernel"] for arch, job in jobs.items()}).items():
        found = results[int(arch)]
        assert found.get("error") is None
        assert found["over"] is None
        assert not {"mma.sync", "wgmma", "tcgen05", "tf32"} & {*found["instructions"]}
        assert "ld.global.v4" in found["instructions"] or "cp.async.v4" in found["instructions"]
