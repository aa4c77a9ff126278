"""Results that take turns in memory: none is overwritten while something reads it, or a view of it."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import sympy
import torch
from build import normal, program
from hypothesis import given
from hypothesis import strategies as st
from kernels_agree import agree
from torch import Tensor

import fxpress
from fxpress.backends.triton.lifetimes import Buffer, alive, released, shared, take_turns
from fxpress.backends.triton.module import generate

d0, d1 = sympy.symbols("d0 d1", integer=True, nonnegative=True)
SIZES = [sympy.Integer(64), 4 * d0, 64 * d0, d0 * d1, 8 * d0 * d1, 4 * d1 + 4]


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    """Buffers that are allocated in different lines; some are never read."""
    count = draw(st.integers(1, 14))
    firsts = draw(st.permutations(range(0, 3 * count, 2)))[:count]
    found = []
    for number, first in enumerate(firsts):
        size = draw(st.sampled_from(SIZES))
        last = first + draw(st.integers(0, 9))
        found.append(Buffer(f"x{number}", size, int(size.subs({d0: 3, d1: 5})), first, last))
    return found


@given(buffers())
def test_no_two_that_are_alive_at_once_share_memory(made: list[Buffer]) -> None:
    found = shared(made)
    assert sorted(item.name for memory in found for item in memory.buffers) == sorted(item.name for item in made)
    for memory in found:
        for one, other in combinations(memory.buffers, 2):
            assert one.last < other.first or other.last < one.first
    planned = sum(memory.bytes for memory in found)
    assert alive(made) <= planned <= sum(item.bytes for item in made)


@given(buffers(), st.integers(0, 9), st.integers(0, 9))
def test_memory_is_as_large_as_each_of_them_at_any_sizes(made: list[Buffer], first: int, second: int) -> None:
    for memory in shared(made):
        head, *places = memory.lines("memory_0")[memory.buffers[0].first].split("\n")
        size = re.fullmatch(r"memory_0 = torch\.empty\((.*), dtype=torch\.uint8, device=.*\)", head)
        assert size is not None and len(places) == 1
        bytes_there = eval(size[1], {"max": max, "d0": first, "d1": second})
        assert bytes_there == max(item.size.subs({d0: first, d1: second}) for item in memory.buffers)


LINES = """a = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(x, a)
view = aten.slice.Tensor(a, 0, 1, 2)
b = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(x, b)
c = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(b, c)
d = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(view, c, d)
e = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(d, e)
return [e]""".splitlines()
PLANNED = """a = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(x, a)
view = aten.slice.Tensor(a, 0, 1, 2)
del a
memory_0 = torch.empty(16*d0, dtype=torch.uint8, device=cpu)
b = placed(memory_0, (d0, 4), torch.float32)
kernel(x, b)
c = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(b, c)
del b
d = placed(memory_0, (d0, 4), torch.float32)
del memory_0
kernel(view, c, d)
del c, view
e = torch.empty((d0, 4), dtype=torch.float32, device=cpu)
kernel(d, e)
del d
return [e]""".splitlines()


def test_a_view_keeps_its_buffer_and_results_have_memory_of_their_own() -> None:
    made = [
        Buffer(name, 16 * d0, 48, LINES.index(next(line for line in LINES if line.startswith(f"{name} = "))),
               shape="(d0, 4)", device="cpu")
        for name in "abcde"
    ]  # fmt: skip
    assert [item.alone() for item in made] == [line for line in LINES if "torch.empty" in line]
    parts = {**{name: [name] for name in "abcde"}, "view": ["a"]}
    lines, memory = take_turns(LINES, made, parts)
    assert released(lines, {*"abcde", "view"}) == PLANNED
    assert memory == {"results": 5, "bytes": 240, "pieces": 4, "planned": 192, "alive": 144}


def chain(self: Any, x: Tensor) -> Tensor:
    """Results of several sizes, each of which a library call or another frame needs in memory; views of them."""
    a = torch.sort(x * 2.0, -1).values
    b = torch.sort((a + x).repeat(1, 2), -1).values
    half = torch.roll(b * 3.0, 1, -1)[:, : x.shape[1]]
    c = torch.sort(half - a, -1).values
    d = torch.sort(c.tanh() + half, -1).values
    return d @ d.transpose(0, 1) + torch.sort(d * c, 0).values.sum()


def test_results_stay_what_they_are() -> None:
    traced = program(chain, normal(4, 6))
    runner = agree(traced, [normal(4, 6)], [normal(7, 3, seed=1)], [normal(1, 1, seed=2)])
    memory = runner.memory
    assert memory["pieces"] < memory["results"] and memory["planned"] < memory["bytes"], memory


def test_many_layers_need_the_memory_of_one() -> None:
    def layers(self: Any, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.nn.functional.layer_norm(x @ self.w, x.shape[-1:])
        return x

    few = generate(program(lambda self, x: layers(self, x), normal(3, 8, 8), w=normal(8, 8))).memory
    assert few["results"] == 12 and few["planned"] <= 4 * few["bytes"] / few["results"]


def test_a_tensor_may_be_called_as_memory_is(tmp_path: Any) -> None:
    def function(self: Any, memory_0: Tensor, placed: Tensor, max: Tensor) -> Tensor:
        return torch.sort(torch.sort(memory_0 * placed, -1).values + max, -1).values * placed

    given_ = [normal(3, 4, seed=number) for number in range(3)]
    agree(program(function, *given_), given_)


def test_the_report_says_how_much_memory_there_is() -> None:
    made = type("Chain", (torch.nn.Module,), {"forward": chain})().eval()
    compiled = fxpress.compile(made, example_inputs=(normal(4, 6),), backend="triton", verify=False)
    memory = compiled.report.memory
    assert memory == compiled.report.as_dict()["memory"] and memory["alive"] <= memory["planned"] < memory["bytes"]
    assert f"results of kernels: {memory['results']} of 0.0 MB in {memory['pieces']} pieces" in str(compiled.report)
    other = fxpress.compile(made, example_inputs=(normal(4, 6),), backend="eager", verify=False)
    assert other.report.memory == {} and "results of kernels" not in str(other.report)


@pytest.mark.parametrize("line", ["return [a]", "kernel(a)  # f32[b]"])
def test_comments_and_the_last_line_release_nothing(line: str) -> None:
    assert released([line], {"b"}) == [line]
