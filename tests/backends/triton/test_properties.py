"""Random graphs of elementwise operators, views and reductions: generated kernels give what eager PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import normal, program
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from kernels_agree import agree
from torch import Tensor

ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: torch.exp(-x.abs()),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.5),
    "neg": torch.neg,
    "half": lambda x: x.half().float(),
    "whole": lambda x: x.to(torch.int32).to(torch.float32),
    "clamp": lambda x: x.clamp(-1.0, 1.0),
    "scale": lambda x: x * 0.5 + 1.0,
    "softmax": lambda x: torch.softmax(x, -1),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "normed": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "shifted": lambda x: x - x.amax(-1, keepdim=True),
    "across": lambda x: x - x.sum(0, keepdim=True) * 0.1,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "doubled": lambda x: torch.cat([x, -x], -1)[..., : x.shape[-1]],
    "rolled": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
    "reshaped": lambda x: x.flatten(1).view(x.shape),
    "first": lambda x: x[:, :1] + x,
    "masked": lambda x: x.masked_fill(torch.arange(x.shape[-1]) > 2, 0.25),
    "flipped": lambda x: x.flip(1),
}
TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (y.abs() + 1.0),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > y, x, y * 0.5),
    "outer": lambda x, y: x + y.mean(1, keepdim=True),
    "row": lambda x, y: x * y[0],
}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[tuple[str, int, int]], list[int], tuple[int, int, int]]:
    """Steps (operator, places of its arguments among what was made), the places of the results, and sizes."""
    steps: list[tuple[str, int, int]] = []
    for made in range(2, 2 + draw(st.integers(2, 7))):
        name = draw(st.sampled_from([*ONE, *TWO]))
        steps.append((name, draw(st.integers(max(0, made - 3), made - 1)), draw(st.integers(0, made - 1))))
    results = draw(st.lists(st.integers(2, 1 + len(steps)), min_size=1, max_size=3, unique=True))
    sizes = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 9)))
    return steps, results, sizes


def run(steps: list[tuple[str, int, int]], results: list[int], x: Tensor, y: Tensor) -> list[Tensor]:
    made = [x, y]
    for name, first, second in steps:
        made.append(ONE[name](made[first]) if name in ONE else TWO[name](made[first], made[second]))
    return [made[place] for place in results]


# In parts, so that test processes share them: 300 graphs in all.
@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_random_graphs(part: int) -> None:
    @seed(part)
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(graphs(), st.booleans())
    def holds(graph: tuple[list[tuple[str, int, int]], list[int], tuple[int, int, int]], dynamic: bool) -> None:
        steps, results, sizes = graph

        def function(self: Any, x: Tensor, y: Tensor) -> list[Tensor]:
            return run(steps, results, x, y)

        x, y = normal(*sizes, seed=part), normal(*sizes, seed=part + 10)
        traced = program(function, x, y, dynamic="auto" if dynamic else None)
        agree(traced, [x, y.transpose(0, 2).contiguous().transpose(0, 2)])

    holds()
