"""Every operator of the graph language as Triton kernels beside its reference, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import program
from kernels_agree import agree, calling
from operator_cases import BY_NAME, CASES, alibi, k, q, v
from torch import Tensor

from fxpress.backends.triton.module import generate
from fxpress.ir.errors import LoweringError
from fxpress.ir.ops.table import OPERATORS

FLOATS = [case for case in CASES if any(isinstance(item, Tensor) and item.is_floating_point() for item in case[1])]


def narrowed(item: Any, dtype: torch.dtype) -> Any:
    is_wide = isinstance(item, Tensor) and item.is_floating_point() and item.itemsize > 1
    return item.to(dtype) if is_wide else item


def named(cases: list[Any]) -> list[str]:
    return [f"{number}-{case[0]}" for number, case in enumerate(cases)]


@pytest.mark.parametrize(("name", "args", "options"), CASES, ids=named(CASES))
def test_equals_its_reference(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    agree(*calling(BY_NAME[name], *args, **options))


# float16 orders and rounds what these choose by otherwise than an fp32 computation of the same.
CHOOSES = ("dynamic_blocks", "lsh_attention", "dynamic_quantize", "quantize", "float8_quantize", "int8_attention")


HALVED = [case for case in FLOATS if case[0] not in CHOOSES]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],  # in the interpreter bfloat16 is wrong
    ids=str,
)
@pytest.mark.parametrize(("name", "args", "options"), HALVED, ids=named(HALVED))
def test_equals_its_reference_in_half_precision(
    name: str, args: tuple[Any, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    halves = {key: narrowed(item, dtype) for key, item in options.items()}
    agree(*calling(BY_NAME[name], *(narrowed(item, dtype) for item in args), **halves))


def test_every_operator_is_tried() -> None:
    # How many tokens `real_tokens` gives depends on values; such sizes are refused, see below.
    assert {entry.name for entry in OPERATORS.values()} == {case[0] for case in CASES} | {"real_tokens"}


def test_a_size_that_depends_on_values_is_refused() -> None:
    traced = program(lambda self, key_mask: BY_NAME["real_tokens"](key_mask), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(
        LoweringError, match=r"fxpress.real_tokens: i64\[u0\]: a size depends on values .*'onnx' takes it"
    ):
        generate(traced)


def prefix(self: Any, query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> Tensor:
    """Causal, but for a prefix of each sample's own length, that all see."""
    rows, columns = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    seen = (columns <= rows) | (columns < length[:, None, None, None])
    return BY_NAME["attention"](query, key, value, seen)  # type: ignore[operator]


def test_a_bias_that_is_computed_is_computed_within_attention() -> None:
    slopes = torch.nn.Parameter(-(2.0 ** -torch.arange(1.0, 5.0)))
    runner = agree(program(alibi, q, k, v, slopes=slopes), [q, k, v], [q[:, :, :1], k, v])
    assert runner.generated.groups == () and "attention_bias_kernel" in runner.source
    length = torch.tensor([3, 7])
    runner = agree(program(prefix, q, k, v, length), [q, k, v, length], [q[:1], k[:1], v[:1], length[1:]])
    assert runner.generated.groups == () and "attention_bias_kernel" in runner.source


def test_a_bias_with_other_readers_is_computed_once() -> None:
    def function(self: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        bias = torch.arange(key.shape[2]) * 0.25
        return [BY_NAME["attention"](query, key, value, bias), bias]  # type: ignore[operator]

    runner = agree(program(function, q, k, v), [q, k, v])
    assert "attention_bias_kernel" not in runner.source


def test_a_mask_read_from_a_table_is_read_within_attention() -> None:
    def blocks(self: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        rows, columns = torch.arange(query.shape[2]) // 4, torch.arange(key.shape[2]) // 4
        return BY_NAME["attention"](query, key, value, seen[:, :, rows][..., columns])  # type: ignore[operator]

    seen = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    runner = agree(program(blocks, q, k, v, seen), [q, k, v, seen])
    assert runner.generated.groups == () and "attention_bias_kernel" in runner.source
