"""Machine code made ahead of time is what a launch on such a GPU finds: Triton compiles nothing then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from build import normal, program
from torch import Tensor, nn

from fxpress.backends.triton.machine_code import Code, build
from fxpress.backends.triton.runner import TritonRunner
from fxpress.ir.errors import LoweringError

# Launches as on a GPU of some architecture, and says what was compiled.
LAUNCH = """
import json, sys
from pathlib import Path
from unittest import mock
import torch
from triton.compiler import CompiledKernel
from fxpress.backends.triton import machine_code
from fxpress.backends.memory import Memory
from fxpress.backends.triton.build import once
from fxpress.backends.triton.runner import Loaded
from fxpress.backends.triton.tune import Tuner

task, folder = json.load(sys.stdin), Path(sys.argv[1])
known = {
    path.stem: machine_code.Code(path.with_suffix(".json").read_text(), path.read_bytes())
    for path in folder.glob("*.cubin")
}
compile, found = machine_code.triton_compile, []
for arch, sizes in task["launches"]:
    kept = Loaded(task["source"])
    module = kept.module
    machine_code.use(module, known)
    compiled = []
    def counted(source, **options):
        compiled.append(source.name)
        return compile(source, **options)
    if task["forms"] is not None:
        Tuner(once, Memory("none", folder / "memory"), "no GPU").attach(module, task["forms"])
    weights = {name: machine_code.empty(shape) for name, shape in task["weights"].items()}
    with mock.patch.object(machine_code, "triton_compile", counted):
        machine_code.launch_nothing(module, [torch.zeros(sizes)], weights, arch)
    kernels = [kernel for kernel in machine_code.kernels_of(module).values() if 0 in kernel.device_caches]
    loaded = [made for kernel in kernels for made in kernel.device_caches[0][0].values()]
    assert all(isinstance(made, CompiledKernel) and made.kernel[:4] == b"\\x7fELF" for made in loaded)
    assert all(made.metadata.target.arch == arch for made in loaded)
    found.append([sorted(compiled), len(loaded)])
json.dump(found, sys.stdout)
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(32, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def runner() -> TritonRunner:
    return TritonRunner(program(Block(), normal(4, 16, 32)))


@pytest.fixture(scope="module")
def made(runner: TritonRunner) -> dict[int, dict[str, Code]]:
    return runner.machine_code([[normal(4, 16, 32)]], [80, 90], tune=False)


def launched(
    runner: TritonRunner,
    code: Mapping[str, Code],
    folder: Path,
    launches: Sequence[tuple[int, Sequence[int]]],
    forms: Mapping[str, str] | None = None,
) -> list[tuple[list[str], int]]:
    """Of each launch the kernels that were compiled, and how many there are; in a process that does not interpret."""
    for key, item in code.items():
        (folder / f"{key}.cubin").write_bytes(item.binary)
        (folder / f"{key}.json").write_text(item.metadata)
    weights = {
        name: [str(item.dtype).removeprefix("torch."), list(item.shape), list(item.stride())]
        for name, item in runner.weights().items()
    }
    task = {"source": runner.source, "weights": weights, "launches": list(launches), "forms": forms}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    ran = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCH, str(folder)], input=json.dumps(task), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [(names, count) for names, count in json.loads(ran.stdout)]


@pytest.mark.slow
def test_a_launch_finds_the_machine_code(
    runner: TritonRunner, made: dict[int, dict[str, Code]], tmp_path: Path
) -> None:
    code = {**made[80], **made[90]}
    ampere, hopper, other, elsewhere = launched(
        runner, code, tmp_path, [(80, (4, 16, 32)), (90, (4, 16, 32)), (90, (1, 1, 32)), (100, (4, 16, 32))]
    )
    assert ampere == ([], len(made[80])) and hopper == ([], len(made[90]))
    assert len(other[0]) > 0, "sizes of another kind take kernels of their own, which are compiled as usual"
    assert len(elsewhere[0]) == elsewhere[1], "machine code is for one architecture"


@pytest.mark.exhaustive
def test_what_a_tuner_measures_is_found_too(
    runner: TritonRunner, made: dict[int, dict[str, Code]], tmp_path: Path
) -> None:
    found = runner.machine_code([[normal(4, 16, 32)]], [90, 100])
    for arch, code in found.items():
        assert len(code) > len(made[90]), "other configurations, and the epilogue behind a library's product"
        (tmp_path / str(arch)).mkdir()
        (launch,) = launched(runner, code, tmp_path / str(arch), [(arch, (4, 16, 32))], runner.generated.forms)
        assert launch == ([], len(code))


@pytest.mark.slow
def test_machine_code_says_nothing_of_where_it_was_made(made: dict[int, dict[str, Code]]) -> None:
    for code in made.values():
        for item in code.values():
            assert item.binary[:4] == b"\x7fELF"
            assert json.loads(item.metadata)["extern_libs"] == []


WRONG = """import triton

@triton.jit
def kernel(x):
    y = x.none

def forward(inputs, weights):
    kernel[(1,)](inputs[0])
"""


@pytest.mark.slow
def test_a_kernel_that_cannot_be_compiled_is_one_error() -> None:
    with pytest.raises(LoweringError, match=r"machine code for sm_90 cannot be made: .*none"):
        build(WRONG, [[normal(4)]], {}, [90])


@pytest.mark.slow
def test_a_product_that_cannot_be_compiled_is_an_error_too(runner: TritonRunner) -> None:
    """Though what a tuner measures is compiled before, together, where one that fails does not stop the others."""
    wrong = re.sub(r"gelu_(\d+) = .*", r"gelu_\1 = acc.none", runner.source)
    assert wrong != runner.source
    with pytest.raises(LoweringError, match=r"machine code for sm_90 cannot be made: .*none"):
        build(wrong, [[normal(4, 16, 32)]], runner.weights(), [90], runner.generated.forms)


def test_interpreted_kernels_take_none(runner: TritonRunner) -> None:
    """What is known is of no use to them, and changes nothing."""
    x = normal(2, 3, 32)
    again = TritonRunner.restored(runner.generated.program, {"key": Code("{}", b"")})
    (expected,), (found,) = runner.run([x]), again.run([x])
    assert torch.equal(expected, found)
    assert again.source == runner.source
