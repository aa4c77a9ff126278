"""The kernel of block_attention compiled ahead of time, as it is launched: tensor cores, shared memory, registers."""

from typing import Any

import aot
import launched
import pytest
import torch

from fxpress.kernels import block_attention as kernels

TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def block_attention(
    dims: int = 64, dtype: torch.dtype = torch.bfloat16, heads: int = 1, mask: bool = False, **options: Any
) -> None:
    """2 samples, 8 heads on 4 groups, 1024 tokens."""
    query, key, value = (launched.heads(number, 1024, dims, dtype) for number in (8, 4, 4))
    table = torch.empty(2, heads, 1024 // options.get("rows", 64), 8, dtype=torch.int64)
    key_mask = torch.empty(2, 1024, dtype=torch.bool) if mask else None
    full = torch.empty(2, 2, dtype=torch.int64) if heads == 1 else None
    kernels.block_attention(query, key, value, table, full, key_mask, **options)


HOT: dict[str, dict[str, Any]] = {
    "table for each head": {"heads": 8, "mask": True, "causal": True},
    "shared table, 128": {"dims": 128, "mask": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "a row for each query": {"rows": 1, "block": 16, "heads": 8, "causal": True},
    "fp32": {"dtype": torch.float32, "mask": True},
}


def result(case: str, arch: int) -> dict[str, Any]:
    jobs = {
        f"{name}; {target}": launched.jobs(kernels, target, lambda options=options: block_attention(**options))[
            "block_attention_kernel"
        ]
        for name, options in {**HOT, **OTHERS}.items()
        for target in TENSOR_CORES
        if name != "fp32" or target == 100
    }
    return aot.compiled(jobs)[f"{case}; {arch}"][arch]


@pytest.mark.slow
@pytest.mark.parametrize("case", HOT)
@pytest.mark.parametrize("arch", TENSOR_CORES)
def test_tensor_cores_and_no_spills(case: str, arch: int) -> None:
    found = result(case, arch)
    assert found.get("error") is None
    assert {TENSOR_CORES[arch], "cp.async.v4"} <= {*found["instructions"]}
    assert found["over"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "arch"), [(case, arch) for case in OTHERS for arch in TENSOR_CORES if case != "fp32" or arch == 100]
)
def test_other_sizes_fit(case: str, arch: int) -> None:
    found = result(case, arch)
    assert found.get("error") is None
    assert found["over"] is None
    if case == "fp32":  # exact
        assert not {*TENSOR_CORES.values(), "tf32"} & {*found["instructions"]}
