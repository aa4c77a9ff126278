"""When CUDA graphs are captured, replayed and dropped; capturing itself needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.backends.triton.graphs import WORTH, Graphs


class Spy:
    """A forward and a capture that note what happens."""

    def __init__(self, failing: bool = False) -> None:
        self.noted: list[str] = []
        self.failing = failing

    def forward(self, tensors: Sequence[Tensor]) -> list[Any]:
        self.noted.append("run")
        return [tensors[0] * 2, 7]

    def capture(self, forward: Any, tensors: Sequence[Tensor]) -> Any:
        if self.failing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.noted.append("capture")

        def replay(given: Sequence[Tensor]) -> list[Any]:
            self.noted.append("replay")
            return [given[0] * 2, 7]

        return replay


def of(size: int) -> list[Tensor]:
    return [torch.full((size,), float(size))]


def test_the_second_call_is_captured_and_later_ones_replayed() -> None:
    spy = Spy()
    graphs = Graphs(spy.forward, 1, spy.capture)
    for _ in range(3):
        assert torch.equal(graphs(of(4))[0], torch.full((4,), 8.0))
    assert spy.noted == ["run", "capture", "replay", "replay"]


def test_shapes_strides_and_dtypes_have_graphs_of_their_own() -> None:
    spy = Spy()
    graphs = Graphs(spy.forward, 1, spy.capture)
    whole = torch.zeros(4, 4)
    for tensor in (whole, whole.t(), whole[:, :2], whole.half(), whole[0]):
        graphs([tensor])
    assert spy.noted == ["run"] * 5


def test_there_are_at_most_so_many() -> None:
    spy = Spy()
    graphs = Graphs(spy.forward, 1, spy.capture, limit=2)
    for size in (1, 1, 2, 3, 1):
        graphs(of(size))
    assert spy.noted == ["run", "capture", "replay", "run", "run", "run"]


@pytest.mark.parametrize(("launches", "noted"), [(1, ["run"] * 3), (2, ["run", "capture", "replay", "replay"])])
def test_what_takes_longer_to_copy_than_to_launch_is_not_captured(launches: int, noted: list[str]) -> None:
    spy = Spy()
    graphs = Graphs(spy.forward, launches, spy.capture)
    for _ in range(3):
        graphs(of(WORTH // 8 + 1))  # of 4 bytes, and as many go out
    assert spy.noted == noted


def test_what_cannot_be_captured_runs_as_before_and_is_said_once() -> None:
    spy = Spy(failing=True)
    graphs = Graphs(spy.forward, 1, spy.capture)
    graphs(of(3))
    with pytest.warns(UserWarning, match=r"no CUDA graph for \[\[3\]\]: operation not permitted"):
        graphs(of(3))
    assert torch.equal(graphs(of(3))[0], torch.full((3,), 6.0))
    assert spy.noted == ["run"] * 3


@pytest.mark.gpu
def test_a_replay_gives_what_the_forward_does() -> None:
    graphs = Graphs(lambda tensors: [torch.relu(tensors[0]) + 1], 2)
    for seed in range(4):
        x = torch.randn(8, generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(graphs([x])[0], torch.relu(x) + 1)
