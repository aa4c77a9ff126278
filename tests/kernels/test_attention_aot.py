"""The attention kernels compiled ahead of time, as they are launched: tensor cores, shared memory, registers."""

import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import aot
import pytest
import torch
from sampled import sampled
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpress.backends.triton.aot import LIMITS
from fxpress.kernels import attention as kernels
from fxpress.kernels import attention_backward as backward

ARCHS = (80, 90, 100)
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


class Recorder:
    """Stands for a kernel, and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.names = kernel.arg_names
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **named: self.arguments.update(zip(self.names, arguments, strict=False), **named)


def job(
    arch: int,
    kernel: str = "attention_kernel",
    dims: int = 64,
    rows: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    mask: bool = False,
    bias: torch.dtype | None = None,
    launch: Callable[..., Any] = kernels.attention,
    **options: Any,
) -> dict[str, Any]:
    """What a launch on an architecture compiles: 2 samples, 8 heads on 4 groups, 1024 keys, heads third in memory."""
    module = backward if kernel.startswith("gradient") else kernels
    recorders = {
        (owner, name): Recorder(getattr(owner, name))
        for owner in (kernels, backward)
        for name in vars(owner)
        if name.endswith("_kernel")
    }
    with FakeTensorMode(), patch("torch.cuda.get_device_capability", lambda device: divmod(arch, 10)):
        for (owner, name), recorder in recorders.items():
            patch.object(owner, name, recorder).start()
        try:
            query = torch.empty(2, rows, 8, dims, dtype=dtype, device="cuda").transpose(1, 2)
            key, value = (torch.empty(2, 1024, 4, dims, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(2))
            if mask:
                options["key_mask"] = torch.empty(2, 1024, dtype=torch.bool, device="cuda")
            if bias is not None:
                options["bias"] = torch.empty(2, 1, rows, 1024, dtype=bias, device="cuda")
            if module is backward:
                statistics = torch.empty(2, 2, 8, rows, device="cuda")
                backward.attention_gradients(query, query, statistics, query, key, value, **options)
            else:
                launch(query, key, value, **options)
        finally:
            patch.stopall()
    arguments = recorders[module, kernel].arguments
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    constants = {name: arguments.pop(name) for name in list(arguments) if name.isupper()}
    arguments = {
        name: str(argument.dtype).removeprefix("torch.") if isinstance(argument, torch.Tensor) else argument
        for name, argument in arguments.items()
    }
    return aot.job(module.__name__, kernel, arguments, constants, [arch], **options)


CASES: dict[str, dict[str, Any]] = {
    f"{name}, {dims}": {"dims": dims, **options}
    for dims, (name, options) in itertools.product(
        (64, 128),
        {
            "causal": {"right": 0},
            "key mask": {"mask": True},
            "bias": {"mask": True, "bias": torch.bfloat16},
            "wide bias": {"mask": True, "bias": torch.float32},
            "boolean bias": {"mask": True, "bias": torch.bool},
            "mean": {"mask": True, "empty": "mean", "right": 0},
            "softcap": {"left": 255, "right": 0, "softcap": 30.0, "dtype": torch.float16},
            "window": {"launch": kernels.window_attention, "mask": True, "left": 64, "right": 64, "globals": 2},
        }.items(),
    )
}
OTHERS: dict[str, dict[str, Any]] = {
    "32": {"dims": 32, "right": 0},
    "80": {"dims": 80, "right": 0},
    "256": {"dims": 256, "right": 0},
    "fp32": {"dtype": torch.float32, "mask": True},
    "fp32, 128": {"dtype": torch.float32, "mask": True, "dims": 128},
    "one query": {"rows": 1},
    "one query, 128": {"rows": 1, "dims": 128, "mask": True},
    "parts": {"rows": 1, "kernel": "combine_kernel"},
    "32 queries": {"rows": 32, "dims": 128, "mask": True, "bias": torch.bfloat16},
    "512": {"dims": 512},
}
GRADIENTS = {
    f"{kernel}, {name}, {dims}": {
        "kernel": kernel, "dims": dims, "rows": 512, **options
    }
    for kernel, dims, (name, options) in itertools.product(
        ("gradient_query_kernel", "gradient_key_value_kernel"),
        (64, 128),
        {
            "causal": {"right": 0},
            "masked": {"mask": True, "softcap": 30.0},
            "bias": {"mask": True, "bias": torch.bfloat16},
            "fp32": {"mask": True, "dtype": torch.float32},
        }.items(),
    )
}  # fmt: skip


SMALL = {
    name: {**CASES, **OTHERS}[name] for name in ("causal, 128", "key mask, 64", "wide bias, 128", "32 queries", "256")
}


FEW = (
    "causal, 64", "causal, 128", "key mask, 128", "window, 64", "one query", "parts",
    "gradient_query_kernel, causal, 64", "gradient_key_value_kernel, causal, 64",
)  # fmt: skip  # compiled in each run of the tests; the others with --exhaustive


def tried(table: dict[str, dict[str, Any]]) -> list[Any]:
    """The cases of a table, most of them for --exhaustive alone."""
    return sampled(table, table.keys() & {*FEW})


def result(table: dict[str, dict[str, Any]], case: str, arch: int) -> dict[str, Any]:
    """What came of one case; the few of its table, or the others, are compiled together."""
    archs = (89, 120) if table is SMALL else ARCHS
    together = {name: options for name, options in table.items() if (name in FEW) == (case in FEW)}
    jobs = {f"{name}; {arch}": job(arch, **options) for name, options in together.items() for arch in archs}
    return aot.compiled(jobs)[f"{case}; {arch}"][arch]


def test_causal_attention_runs_on_tensor_cores() -> None:
    found = aot.compiled({"causal": job(90, right=0)})["causal"][90]
    assert {"wgmma", "cp.async.v4"} <= {*found["instructions"]}
    assert found["over"] is None


@pytest.mark.slow
@pytest.mark.parametrize("case", tried(CASES))
@pytest.mark.parametrize("arch", ARCHS)
def test_tensor_cores_and_no_spills(case: str, arch: int) -> None:
    found = result(CASES, case, arch)
    assert found.get("error") is None
    assert {TENSOR_CORES[arch], "cp.async.v4"} <= {*found["instructions"]}
    assert found["over"] is None


@pytest.mark.slow
@pytest.mark.parametrize("case", tried(OTHERS))
@pytest.mark.parametrize("arch", ARCHS)
def test_other_sizes_fit(case: str, arch: int) -> None:
    found = result(OTHERS, case, arch)
    assert found.get("error") is None
    assert found["over"] is None
    if "fp32" in case:  # exact
        assert not {*TENSOR_CORES.values()} & {*found["instructions"]}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("arch", [89, 120])
def test_graphics_cards_have_less_shared_memory(case: str, arch: int) -> None:
    found = result(SMALL, case, arch)
    assert found.get("error") is None
    assert "mma.sync" in found["instructions"]
    assert found["shared"] <= LIMITS[arch].shared


@pytest.mark.slow
@pytest.mark.parametrize("case", tried(GRADIENTS))
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients(case: str, arch: int) -> None:
    found = result(GRADIENTS, case, arch)
    assert found.get("error") is None
    assert "fp32" in case or {*TENSOR_CORES.values()} & {*found["instructions"]}
    assert found["over"] is None
