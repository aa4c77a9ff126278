"""Rotary embedding in every spelling: found, equal, and refused with a reason where it is something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import before_after, check, normal, program, reasons
from torch import Tensor
from torch.export import Dim

from fxpress.ir.graph import Program
from fxpress.ir.ops.rotary import rotary
from fxpress.ir.spellings.rotary import states_pairs_twice
from fxpress.passes import Canonicalize

aten = torch.ops.aten
X = (2, 4, 5, 8)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotate_chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)


def halves(angles: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.cat((angles, angles), -1)
    return wide.cos().unsqueeze(1), wide.sin().unsqueeze(1)


def turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos().repeat_interleave(2, -1).unsqueeze(1), angles.sin().repeat_interleave(2, -1).unsqueeze(1)


def hugging_face(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = halves(angles)
    return (x * cos) + (rotate_half(x) * sin)


def chunked(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = halves(angles)
    return sin * rotate_chunks(x) + cos * x


def every_two(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = turns(angles)
    return (x * cos) + (rotate_every_two(x) * sin)


def roformer(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    cos = torch.stack([cos, cos], dim=-1).reshape(*cos.shape[:-1], -1)
    sin = torch.stack([sin, sin], dim=-1).reshape(*sin.shape[:-1], -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape_as(x)
    return x * cos + turned * sin


def partial(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    turned, rest = x[..., :4], x[..., 4:]
    return torch.cat((hugging_face(m, turned, angles[..., :2]), rest), -1)


def partial_every_two(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    turned, rest = x.split([6, 2], -1)
    return torch.cat([every_two(m, turned, angles[..., :3]), rest], -1)


def all_columns(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat((hugging_face(m, x[..., :8], angles), x[..., 8:]), -1)


def pairwise(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def pairwise_every_two(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def pairwise_unbind(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).reshape(x.shape)


def unflattened_halves(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = halves(angles)
    first, second = x.unflatten(-1, (2, 4)).unbind(-2)
    return x * cos + torch.cat((-second, first), -1) * sin


def complex_numbers(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turn = torch.polar(torch.ones_like(angles), angles) * 1.5
    return torch.view_as_real(pairs * turn[:, None]).flatten(3).type_as(x)


def complex_input(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(angles, angles + 1).unsqueeze(1)).flatten(3)


def complex_conjugate(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles).conj()[:, None]).flatten(3)


def part_of_a_complex_conjugate(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turn = torch.complex(angles, angles + 1).conj()[:, : x.shape[2]].unsqueeze(1)
    return torch.view_as_real(pairs * turn).flatten(3)


def length_first(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    """GPT-J turns [batch, length, heads, size] before it is transposed."""
    cos, sin = (item.transpose(1, 2) for item in turns(angles))
    x = x.transpose(1, 2)
    return (x * cos + rotate_every_two(x) * sin).transpose(1, 2)


SPELLINGS = {
    function.__name__: function
    for function in (
        hugging_face, chunked, every_two, roformer, partial, partial_every_two, all_columns, pairwise,
        pairwise_every_two, pairwise_unbind, unflattened_halves, complex_numbers, complex_input, length_first,
    )
}  # fmt: skip


def made(function: Callable[..., Any], batch: int = 2, dtype: torch.dtype = torch.float32) -> Program:
    """A program of x [batch, 4, length, 8] and angles [batch, length, 4]."""
    rows = {0: Dim.AUTO} if batch > 1 else {}
    return program(
        function,
        normal(*X, dtype=dtype),
        normal(batch, 5, 4, dtype=dtype, seed=1),
        dynamic=({0: Dim.AUTO, 2: Dim.AUTO}, {**rows, 1: Dim.AUTO}),
    )


@pytest.mark.parametrize("case", SPELLINGS)
def test_found(case: str, golden: Callable[[str], None]) -> None:
    before = made(SPELLINGS[case])
    after, result = check(before, Canonicalize())
    (found,) = after.calls(rotary)
    assert found.kwargs.get("interleaved", False) == (case in INTERLEAVED)
    assert not after.calls(aten.neg.default, aten.view_as_complex.default)
    golden(before_after(before, after, result))


@pytest.mark.parametrize("function", [complex_conjugate, part_of_a_complex_conjugate])
def test_a_conjugate_turns_the_other_way(function: Callable[..., Tensor]) -> None:
    after, _ = check(made(function), Canonicalize())
    assert len(after.calls(rotary)) == len(after.calls(aten.neg.default)) == 1
    assert not after.calls(aten._conj.default)


INTERLEAVED = ("every_two", "roformer", "partial_every_two", "pairwise_every_two", "pairwise_unbind", "complex_numbers",
               "complex_input", "length_first")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [hugging_face, every_two, partial, pairwise])
def test_half_precision_is_bit_for_bit_the_same(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    before = made(function, dtype=dtype)
    after, _ = check(before, Canonicalize())
    assert len(after.calls(rotary)) == 1
    given = [normal(2, 4, 9, 8, dtype=dtype), normal(2, 9, 4, dtype=dtype, seed=1)]
    assert torch.equal(after.run(given)[0], before.run(given)[0])


@pytest.mark.parametrize("function", [hugging_face, every_two, pairwise])
@pytest.mark.parametrize("wide", ["input", "angles"])
def test_what_is_wider_widens_the_rest(function: Callable[..., Tensor], wide: str) -> None:
    """OLMo 2 computes its angles in fp32, Cohere turns in fp32."""

    def forward(m: Any, x: Tensor, angles: Tensor) -> Tensor:
        return function(m, x.half(), angles) if wide == "angles" else function(m, x, angles.half())

    before = made(forward)
    after, _ = check(before, Canonicalize())
    assert len(after.calls(rotary)) == 1
    given = [normal(2, 4, 9, 8), normal(2, 9, 4, seed=1)]
    assert torch.equal(after.run(given)[0], before.run(given)[0])


@pytest.mark.parametrize("function", [hugging_face, every_two, pairwise])
def test_angles_for_the_whole_batch_broadcast(function: Callable[..., Tensor]) -> None:
    after, _ = check(made(function, batch=1), Canonicalize())
    assert len(after.calls(rotary)) == 1


def test_two_rotations_share_their_angles() -> None:
    def forward(m: Any, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return hugging_face(m, x, angles), hugging_face(m, x.exp(), angles)

    after, _ = check(made(forward), Canonicalize())
    first, second = after.calls(rotary)
    assert first.args[1:] == second.args[1:]


def test_pieces_read_elsewhere_stay() -> None:
    def forward(m: Any, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1), first.exp()

    after, _ = check(made(forward), Canonicalize())
    assert len(after.calls(rotary)) == len(after.calls(aten.slice.Tensor)) == 1


# --- refusals and others ---------------------------------------------------------------------------------------


def with_sum(turned: Callable[[Tensor], Tensor], other: Callable[[Tensor], Any] = lambda x: x) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = halves(angles)
        return other(x) * cos + turned(x) * sin

    return forward


def turn_read_twice(m: Any, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = halves(angles)
    turned = rotate_half(x)
    return x * cos + turned * sin, turned


def wide_cos(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = halves(angles)
    return x * cos.double() + rotate_half(x) * sin


def one_angle(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles[:, None, :, :1].cos(), angles[:, None, :, :1].sin()
    return x * cos + rotate_half(x) * sin


def other_rest(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat((hugging_face(m, x[..., :4], angles[..., :2]), x[..., :4]), -1)


def broadcasts(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = halves(angles)
    return x[:, :1] * cos.expand(-1, 4, -1, -1) + rotate_half(x[:, :1]) * sin


def number(m: Any, x: Tensor, angles: Tensor) -> Tensor:
    return x * 0.5 + rotate_half(x) * 0.3


REFUSALS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "other_tensor": (with_sum(rotate_half, torch.exp), "rotary", "is no product with x"),
    "read_twice": (turn_read_twice, "rotary", "cat_1 is returned by the model"),
    "dtypes": (wide_cos, "rotary", "the two products differ in dtype"),
    "narrow": (one_angle, "rotary", "cos and sin are not as wide as the input"),
    "broadcasts": (broadcasts, "rotary", "the input broadcasts"),
    "number": (number, "rotary", "cos or sin is a number"),
    "other_rest": (other_rest, "rotary_partial", "what is joined to the rotated columns is not the rest"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    function, rule, reason = REFUSALS[case]
    _, result = check(made(function), Canonicalize())
    assert result.rewrites[rule] == 0
    assert any(reason in found for found in reasons(result, rule)), result.refusals


OTHERS = {
    "no_minus": with_sum(lambda x: torch.cat((x[..., 4:], x[..., :4]), -1)),
    "minus_on_the_other": with_sum(lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1)),
    "uneven": with_sum(lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1)),
    "another_axis": with_sum(lambda x: torch.cat((-x[:, 2:], x[:, :2]), 1)),
    "mixed_pairs": with_sum(lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1)),
    "two_tensors": with_sum(lambda x: torch.cat((-x.exp()[..., 4:], x[..., :4]), -1)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_something_else_is_left_alone(case: str) -> None:
    after, _ = check(made(OTHERS[case]), Canonicalize())
    assert not after.calls(rotary)


@pytest.mark.parametrize("function", [hugging_face, every_two, roformer, pairwise, pairwise_every_two, complex_numbers])
def test_angles_are_known_to_be_stated_twice(function: Callable[..., Any]) -> None:
    after, _ = check(made(function), Canonicalize())
    (node,) = after.calls(rotary)
    interleaved = bool(node.kwargs.get("interleaved", False))
    assert all(states_pairs_twice(item, interleaved) for item in node.args[1:3])
    assert not any(states_pairs_twice(item, not interleaved) for item in node.args[1:3])


def test_different_angles_in_a_pair_are_not_stated_twice() -> None:
    def forward(m: Any, x: Tensor, angles: Tensor) -> Tensor:
        wide = torch.cat((angles, angles.exp()), -1).unsqueeze(1)
        return x * wide.cos() + rotate_half(x) * wide.sin()

    after, _ = check(made(forward), Canonicalize())
    (node,) = after.calls(rotary)
    assert not states_pairs_twice(node.args[1], False)
