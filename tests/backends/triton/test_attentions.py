"""Attentions in the place of exact attention: which kernels they are made of, and that no scores are written."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from build import normal, program
from kernels_agree import agree, calling
from operator_cases import BY_NAME
from torch import Tensor

from fxpress.backends.triton.lowerings.attentions import WRITTEN
from fxpress.backends.triton.runner import TritonRunner
from fxpress.ir.ops.table import OPERATORS

LENGTH = 19
query, key, value = (normal(2, LENGTH, 2, 8, seed=seed).transpose(1, 2) for seed in range(3))
mask = torch.ones(2, LENGTH, dtype=torch.bool)
mask[1, 15:] = False
rotations = normal(2, 8, 2, 8, seed=9)

CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, int]]] = {
    "nystrom": ("nystrom_attention", (query, key, value, mask, 8), {"attention": 2, "pseudo_inverse": 1}),
    "linformer": ("linformer_attention", (query, key, value, mask, None, 8), {"attention": 1}),
    "lsh": ("lsh_attention", (query, key, value, rotations, mask, 4), {"gathered_attention": 1}),
    "lsh_shared": ("lsh_attention", (query, query, value, rotations, mask, 4, True), {"gathered_attention": 1}),
    "lsh_causal": (
        "lsh_attention", (query, key[:, :1], value[:, :1], rotations, None, 4, False, True), {"gathered_attention": 1},
    ),
}  # fmt: skip


def own_kernels(runner: TritonRunner) -> Counter[str]:
    """How often each function of kernels/ is launched."""
    found: Counter[str] = Counter()
    for item in runner.generated.launches:
        if item["by"].endswith(" of kernels/"):
            found[item["by"].removesuffix(" of kernels/")] += item["launches"]
    return found


@pytest.mark.parametrize("name", CALLS)
def test_they_are_made_of_kernels(name: str) -> None:
    operator, args, kernels = CALLS[name]
    runner = agree(*calling(BY_NAME[operator], *args))
    assert own_kernels(runner) == kernels


def test_doubles_are_attended_to_by_the_reference() -> None:
    """For no kernel here multiplies them."""

    def function(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return BY_NAME["attention"](query=query, key=key, value=value, right=0)  # type: ignore[operator]

    floats = [query, key, value]
    doubles = [item.double() for item in floats]
    assert own_kernels(agree(program(function, *floats), floats)) == {"attention": 1}
    assert not own_kernels(agree(program(function, *doubles), doubles))


def test_more_landmarks_than_one_program_inverts_are_products() -> None:
    runner = TritonRunner(calling(BY_NAME["nystrom_attention"], query, key, value, None, 65)[0])
    assert own_kernels(runner) == {"attention": 2}


@pytest.mark.parametrize("operator", ["nystrom_attention", "linformer_attention"])
def test_no_scores_are_written(operator: str) -> None:
    """Of 19 tokens and 5 summaries of them, the scores of two heads would be 2 x 19 x 5 numbers."""
    options = {"landmarks": 5} if operator == "nystrom_attention" else {"rank": 5}
    runner = TritonRunner(calling(BY_NAME[operator], query, key, value, **options)[0])
    values = [node.meta.get("val") for node in runner.generated.program.graph.nodes]
    sizes = {tuple(item.shape) for item in values if isinstance(item, Tensor)}
    assert (2, 2, LENGTH, 8) in sizes
    assert not {(2, 2, LENGTH, 5), (2, 2, 5, LENGTH), (2, 2, LENGTH, LENGTH)} & sizes


@pytest.mark.parametrize("target", WRITTEN, ids=lambda target: str(target).split(".")[1])
def test_what_is_traced_is_what_the_reference_computes(target: Any) -> None:
    args = next(args for name, args, _ in CALLS.values() if BY_NAME[name] is target)
    torch.testing.assert_close(WRITTEN[target](*args), OPERATORS[target].reference(*args), atol=2e-5, rtol=2e-5)


def test_other_lengths_than_the_example() -> None:
    def function(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return BY_NAME["nystrom_attention"](query, key, value, mask, 8)  # type: ignore[operator]

    example = (query, key, value, mask)
    shorter = [item[..., :11, :].contiguous() if item.dim() == 4 else item[:, :11] for item in example]
    dynamic = {name: {0: torch.export.Dim.AUTO, (1 if name == "mask" else 2): torch.export.Dim.AUTO}
               for name in ("query", "key", "value", "mask")}  # fmt: skip
    agree(program(function, *example, dynamic=dynamic), example, shorter)
