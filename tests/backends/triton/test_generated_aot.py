"""Generated kernels compiled ahead of time, without a GPU: they compile, fit, do not spill, and use what they are
meant to: loads of 16 bytes, and the tensor cores of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import generated
import pytest
import torch
from build import normal, program
from kernels_agree import calling
from operator_cases import BY_NAME, CASES, alibi, k, q, v
from sampled import sampled
from torch import Tensor

from fxpress.compiler.families import families
from fxpress.compiler.pipeline import run_passes
from fxpress.compiler.trace import trace
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, Fuse

ARCHS = (80, 90, 100)
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def compile_operators(folder: Path, arch_of: Callable[[int], int]) -> list[str]:
    """What is wrong with the kernels of all operators, each case compiled for the architecture of its number."""
    jobs: dict[str, Any] = {}
    for number, (name, args, options) in enumerate(CASES):
        traced, tensors = calling(BY_NAME[name], *args, **options)
        jobs |= generated.jobs(f"{name}_{number}", traced, tensors, folder, arch_of(number))
    slopes = torch.nn.Parameter(-(2.0 ** -torch.arange(1.0, 5.0)))
    jobs |= generated.jobs("alibi", program(alibi, q, k, v, slopes=slopes), [q, k, v], folder, arch_of(0))
    return generated.check(aot.compiled(jobs))


@pytest.mark.slow
def test_every_operator_compiles(tmp_path: Path) -> None:
    """The cases take turns among the architectures: most kernels of an operator are those of another, too."""
    assert compile_operators(tmp_path, lambda number: ARCHS[number % len(ARCHS)]) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHS)
def test_every_operator_compiles_for_each_architecture(arch: int, tmp_path: Path) -> None:
    assert compile_operators(tmp_path, lambda number: arch) == []


def test_what_numpy_forgives_compiles_too(tmp_path: Path) -> None:
    """The interpreter takes the exponential of an integer, and loops whose values change their type."""
    x, y, aten = normal(8, 200), normal(200, seed=1), torch.ops.aten
    jobs: dict[str, Any] = {}
    for target, given in {
        aten.logsumexp.default: (torch.arange(400).view(2, 200), [-1]),
        aten.remainder.Tensor: (x, y),
        aten.fmod.Tensor: (y, x),
        aten.floor_divide.default: (x, y),
        aten.pow.Tensor_Tensor: (x, y),
    }.items():
        traced, tensors = calling(target, *given, dynamic="auto")
        jobs |= generated.jobs(str(target).replace(".", "_"), traced, tensors, tmp_path, 90)
    assert generated.check(aot.compiled(jobs)) == []


def half_models() -> dict[str, tuple[torch.nn.Module, dict[str, Tensor]]]:
    found = {}
    for family in families():
        if family.name in ("bert", "gpt2", "llama", "vit"):
            given = {
                name: item.bfloat16() if item.is_floating_point() else item
                for name, item in family.inputs(2, 12).items()
            }
            found[family.name] = (family.model().eval().bfloat16(), given)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", sampled(ARCHS, (90,)))
def test_models_compile_in_bfloat16(arch: int, tmp_path: Path) -> None:
    jobs: dict[str, Any] = {}
    for name, (model, given) in half_models().items():
        traced = trace(model, ((), given))
        run_passes(traced, [Canonicalize(), Fuse()], Context(list(given.values())))
        jobs |= generated.jobs(name, traced, list(given.values()), tmp_path, arch)
    assert generated.check(aot.compiled(jobs)) == []


class Block(torch.nn.Module):
    """Widths of a real model, so that tiles are those of one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = torch.nn.Linear(768, 3072), torch.nn.LayerNorm(3072)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.up(x))
        return self.norm(hidden)


@pytest.mark.parametrize("arch", ARCHS)
def test_hot_kernels_use_the_machine(arch: int, tmp_path: Path) -> None:
    x = normal(4, 512, 768, dtype=torch.bfloat16)
    jobs = generated.jobs("block", program(Block().bfloat16(), x), [x], tmp_path, arch)
    results = {name.split("/")[1]: found[arch] for name, found in aot.compiled(jobs).items()}
    product = next(found for name, found in results.items() if name.startswith("linear_add_gelu"))
    norm = results["layer_norm_kernel"]
    assert TENSOR_CORES[arch] in product["instructions"]
    assert "ld.global.v4" in norm["instructions"] and "st.global.v4" in norm["instructions"]
    assert product["over"] is norm["over"] is None  # shared memory, registers, spills
