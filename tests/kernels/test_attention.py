"""The attention kernel in the interpreter against fxpress::attention: masks, biases, sizes, layouts."""

import importlib.util
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import LOWEST, check, inputs, interpreted, padded
from build import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.ops import attention as op
from fxpress.kernels import attention as kernels


def equal(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return check(op.attention, kernels, query, key, value, **options)


def biases(kind: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """A bias of a kind that models have, half of it forbidding."""
    random = torch.Generator().manual_seed(seed)
    allowed = torch.rand(shape, generator=random) > 0.5
    noise = torch.randn(shape, generator=random)
    forms = {
        "none": None,
        "boolean": allowed,
        "added": noise,
        "-inf": torch.where(allowed, noise, -math.inf),
        "lowest": torch.where(allowed, 0.0, LOWEST),
    }
    return forms[kind]


@settings(max_examples=50)
@given(data=st.data())
def test_it_is_the_operator(data: st.DataObject) -> None:
    draw = data.draw
    batch, groups, repeat = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 3), (2, 2, 1)]))
    num_queries, num_keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dims = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    query, key, value = inputs(num_queries, num_keys, (groups * repeat, groups), dims, batch, dtype)
    if draw(st.booleans()):  # heads third in memory, as a model's projections leave them
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    mask = padded(batch, num_keys, draw(st.integers(0, 9)), draw(st.integers(0, 40)))
    kind = draw(st.sampled_from(["none", "none", "boolean", "added", "-inf", "lowest"]))
    sizes = (batch, groups * repeat, num_queries, num_keys)
    shape = tuple(size if draw(st.booleans()) else 1 for size in sizes)
    offsets = st.none() | st.integers(-8, 24)
    equal(
        query,
        key,
        value,
        splits=draw(st.sampled_from([1, 1, 2, 4])),
        bias=biases(kind, shape[draw(st.integers(0, 3)) :], seed=draw(st.integers(0, 9))),
        key_mask=mask if draw(st.booleans()) else None,
        left=draw(offsets),
        right=draw(offsets),
        scale=draw(st.sampled_from([None, 0.3, 1.0, -0.5, 0.0])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        sinks=normal(groups * repeat, dtype=dtype) if draw(st.booleans()) else None,
        empty=draw(st.sampled_from(op.EMPTY)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("left", "right"), [(None, None), (None, 0), (20, 0), (40, 40), (None, -3), (-2, 9), (-90, None)]
)
def test_bands(left: int | None, right: int | None, dtype: torch.dtype) -> None:
    equal(*inputs(67, 67, batch=1, dtype=dtype), left=left, right=right)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 45), (45, 1), (17, 45), (45, 17)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_queries_and_keys_of_different_number(num_queries: int, num_keys: int, heads: tuple[int, int]) -> None:
    query, key, value = inputs(num_queries, num_keys, heads)
    equal(query, key, value, right=num_keys - num_queries, key_mask=padded(2, num_keys, 0, 5))


def test_blocks_of_the_real_size() -> None:
    equal(*inputs(70, 90, (2, 1), (40, 24), batch=1), blocks=None, right=20, key_mask=padded(1, 90, 3, 10))
    equal(*inputs(3, 90, (2, 1), (40, 24), batch=1), blocks=None, right=87, splits=2)


@pytest.mark.parametrize("empty", op.EMPTY)
@pytest.mark.parametrize("num_queries", [5, 20])
@pytest.mark.parametrize(
    "options",
    [
        {"key_mask": padded(2, 37, 0, 37)},
        {"key_mask": padded(2, 37, 30, 0), "right": 17},
        {"key_mask": padded(2, 37, 0, 30), "left": 4, "right": 20},
        {"left": 2, "right": -19},
        {"bias": torch.full((37,), -math.inf)},
        {"bias": torch.full((37,), LOWEST)},
        {"bias": torch.full((1, 37), LOWEST), "key_mask": padded(2, 37, 12, 0), "right": 19},
        {"bias": torch.zeros(37, dtype=torch.bool)},
        {"key_mask": padded(2, 37, 0, 37), "sinks": torch.tensor([0.5, -math.inf])},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_rows_that_see_no_key(options: dict[str, Any], num_queries: int, empty: str) -> None:
    equal(*inputs(num_queries, 37, dims=(4, 4)), empty=empty, splits=2, **options)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_not_finite_spreads_as_in_the_reference(which: int, number: float, splits: int) -> None:
    tensors = inputs(7 if splits > 1 else 20, 37, batch=1)
    tensors[which][0, 0, 5, 3] = number
    equal(*tensors, splits=splits)
    equal(*tensors, splits=splits, softcap=3.0, right=12)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_sinks_that_are_not_finite(number: float) -> None:
    equal(*inputs(20, 37), sinks=torch.tensor([1.0, number]), right=0)


def test_large_scores() -> None:
    query, key, value = inputs(20, 37)
    equal(query * 1e3, key, value)
    equal(query * 1e3, key, value, softcap=20.0)
    equal(query, key, value, bias=torch.linspace(-1e5, 1e5, 37))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, -x], -1)[..., 0],
        lambda x: x.flatten().repeat(2)[1 : 1 + x.numel()].view(x.shape),
        lambda x: x[:1, :1].expand(x.shape),
        lambda x: torch.cat([x, x], 2)[:, :, ::2],
    ],
    ids=["heads third", "columns", "every second", "unaligned", "expanded", "every second row"],
)  # fmt: skip
def test_layouts(view: Any) -> None:
    query, key, value = inputs(20, 37)
    mask = normal(37, 2) > -0.5
    bias = normal(37, 2, 20, 2)
    equal(view(query), view(key), view(value), key_mask=mask.T, bias=bias.permute(3, 1, 2, 0), right=10)


def test_blocks_outside_of_the_band_are_not_read() -> None:
    query, key, value = inputs(64, 64)
    for tensor in (key, value):
        tensor[:, :, 32:48] = torch.nan
    with interpreted(kernels):
        found = kernels.attention(query, key, value, left=0, right=15)
    assert not found[:, :, :16].isnan().any()  # these rows see keys below 31
    assert found[:, :, 17:48].isnan().all()
    assert not found[:, :, 48:].isnan().any()


def test_blocks_of_padding_are_not_read() -> None:
    query, key, value = inputs(20, 100)
    mask = padded(2, 100, 20, 30)
    expected = equal(query, key, value, key_mask=mask)
    value[0, :, :16] = value[0, :, 80:] = torch.nan
    with interpreted(kernels):
        found = kernels.attention(query, key, value, key_mask=mask)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_queries", [3, 17])
def test_offsets_that_need_64_bits(tmp_path: Path, num_queries: int) -> None:
    stride = 2**27 + 3
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=18 * stride, dtype=torch.float16)
    key, value = (memory[start:].as_strided((1, 1, 18, 4), (1, 1, stride, 1)) for start in (0, 4))
    query = memory[8:].as_strided((1, 1, num_queries, 4), (1, 1, stride, 1))
    for seed, tensor in enumerate((query, key, value)):
        tensor.copy_(normal(*tensor.shape, seed=seed))
    equal(query, key, value, right=18 - num_queries)


def test_no_keys_and_no_queries() -> None:
    query, key, value = inputs(5, 7)
    with interpreted(kernels):
        assert torch.equal(kernels.attention(query, key[:, :, :0], value[:, :, :0]), torch.zeros(2, 2, 5, 20))
        assert kernels.attention(query[:, :, :0], key, value).shape == (2, 2, 0, 20)


HOOK = """\
{indent}decay = tl.load(slopes + head)
{indent}scores += decay * tl.abs(i - j)
{indent}scores = tl.where((i + j + batch) % 7 != 3, scores, -float("inf"))
"""


@pytest.mark.parametrize("num_queries", [5, 20])
def test_a_generated_hook_in_a_module_of_its_own(tmp_path: Path, num_queries: int) -> None:
    source = inspect.getsource(kernels)
    before, found, rest = source.partition("    # hook: parameters\n")
    assert found
    _, found, rest = rest.partition("    # end\n")
    assert found
    source = f"{before}    slopes,\n{rest}"
    before, found, rest = source.partition("# hook: scores (batch, head, i, j, inside, scores)\n")
    assert found
    indent = before.rpartition("\n")[2]
    _, found, rest = rest.partition(f"{indent}# end\n")
    assert found
    path = tmp_path / "generated.py"
    path.write_text(before + "\n" + HOOK.format(indent=indent) + rest)
    spec = importlib.util.spec_from_file_location("fxpress.kernels.generated", path)  # its imports are relative
    assert spec is not None and spec.loader is not None
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)

    query, key, value = inputs(num_queries, 37, (4, 2))
    slopes = torch.tensor([-0.1, 0.2, 0.0, -0.3])
    b, i, j = torch.arange(2)[:, None, None, None], torch.arange(num_queries)[:, None], torch.arange(37)
    bias = (slopes[:, None, None] * (i - j).abs()).masked_fill((i + j + b) % 7 == 3, -math.inf)
    with interpreted(generated):
        got = generated.attention(query, key, value, right=30, extra=(slopes,))
    expected = equal(query, key, value, right=30, bias=bias)
    torch.testing.assert_close(got, expected)


def test_splits_are_for_few_programs_and_many_keys() -> None:
    assert kernels.attention_splits(1000, 100_000, 90) == 1
    assert kernels.attention_splits(8, 300, 90) == 1
    assert kernels.attention_splits(8, 4096, 90) == 16
    assert kernels.attention_splits(1, 1_000_000, 80) == 64
