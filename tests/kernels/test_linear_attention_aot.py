"""The kernels of linear_attention compiled ahead of time: tensor cores, shared memory, registers."""

from typing import Any

import aot
import launched
import pytest
import torch

from fxpress.kernels import linear_attention as kernels

TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def linear_attention(dims: int = 64, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    """2 samples, 8 heads on 4 groups, 1024 tokens, 128 features."""
    query, key, value = (launched.heads(number, 1024, dims, dtype) for number in (8, 4, 4))
    query_features, key_features = (launched.heads(number, 1024, 128, dtype) for number in (8, 4))
    key_mask = torch.empty(2, 1024, dtype=torch.bool)
    kernels.linear_attention(query, key, value, query_features, key_features, None, key_mask, **options)


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": 20},
    "window, 128": {"window": 20, "dims": 128, "causal": True},
    "fp32": {"window": 20, "dtype": torch.float32},
}


def results(arch: int) -> dict[str, dict[str, Any]]:
    jobs: dict[str, Any] = {}
    for case, options in CASES.items():
        for target in TENSOR_CORES if case != "fp32" else (100,):
            made = launched.jobs(kernels, target, lambda options=options: linear_attention(**options))
            for kernel, job in made.items():
                if kernel == "linear_attention_kernel" or (kernel == "feature_state_kernel" and case == "causal"):
                    jobs[f"{kernel}, {case}; {target}"] = job
    found = aot.compiled(jobs)
    return {name.partition(";")[0]: item[arch] for name, item in found.items() if arch in item}


@pytest.mark.slow
@pytest.mark.parametrize("arch", TENSOR_CORES)
def test_tensor_cores_and_no_spills(arch: int) -> None:
    for name, found in results(arch).items():
        assert found.get("error") is None, name
        assert found["over"] is None, name
        if "fp32" in name:  # exact
            assert not {*TENSOR_CORES.values(), "tf32"} & {*found["instructions"]}, name
        else:
            assert TENSOR_CORES[arch] in found["instructions"], name
