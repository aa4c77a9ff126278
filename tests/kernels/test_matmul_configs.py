"""Which configurations of matmul there are, and that they fit GPUs that are not there."""

from typing import Any

import aot
import pytest
import torch

from fxpress.backends.triton.aot import LIMITS
from fxpress.kernels.matmul_configs import dot_precision, matmul_configs

SHAPES = [(1, 4096, 4096), (1, 512, 11008), (17, 768, 3072), (128, 768, 768), (512, 30522, 768), (8192, 8192, 8192)]
ODD = (1000, 1001, 1003)
KINDS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
    "int8": (torch.int8, "ieee"),
    "float8": (torch.float8_e4m3fn, "ieee"),
}  # by name, the dtype and what tl.dot may do to float32


def stored(kind: str, arch: int) -> torch.dtype:
    """The dtype of what a kernel reads: before sm_89 the bytes of float8 numbers."""
    return torch.uint8 if kind == "float8" and arch < 89 else KINDS[kind][0]


@pytest.mark.parametrize("arch", [75, 80, 90, 100, 103, 120])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1), ODD])
def test_configurations(shape: tuple[int, int, int], kind: str, arch: int) -> None:
    dtype, precision = stored(kind, arch), KINDS[kind][1]
    found = matmul_configs(*shape, dtype, arch, precision=precision)
    assert found
    assert all(config not in found[:index] for index, config in enumerate(found))
    assert found == matmul_configs(*shape, dtype, arch, precision=precision)
    limit = LIMITS[arch if arch in LIMITS else 80].shared
    for config in found:
        block = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize
        assert config["num_stages"] * block <= limit
        assert config["BLOCK_M"] >= 16 and config["BLOCK_N"] >= 16
        assert config["BLOCK_K"] * dtype.itemsize >= 32


def test_float8_is_bytes_where_there_is_no_such_format() -> None:
    given = [matmul_configs(*ODD, dtype, 80) for dtype in (torch.float8_e4m3fn, torch.uint8)]
    assert given[0] == given[1]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_first_guess_fits_the_shape(arch: int) -> None:
    def first(*shape: int) -> dict[str, int]:
        return matmul_configs(*shape, torch.bfloat16, arch)[0]

    large = first(8192, 8192, 8192)
    assert (large["BLOCK_M"], large["BLOCK_N"]) == (128, 256)
    assert large["SPLIT"] == 1
    few = first(1, 512, 11008)
    assert few["BLOCK_M"] == 16
    assert few["SPLIT"] > 1


@pytest.mark.parametrize(
    ("precision", "dtype", "weight", "capability", "expected"),
    [
        ("ieee", torch.float32, torch.int8, (10, 0), "tf32x3"),
        ("ieee", torch.float32, torch.uint8, (10, 3), "tf32x3"),
        ("ieee", torch.float32, torch.float32, (10, 0), "ieee"),
        ("ieee", torch.bfloat16, torch.int8, (10, 0), "ieee"),
        ("ieee", torch.float32, torch.int8, (9, 0), "ieee"),
        ("ieee", torch.float32, torch.int8, (12, 0), "ieee"),
        ("tf32", torch.float32, torch.int8, (10, 0), "tf32"),
    ],
)
def test_ieee_is_never_tf32(
    precision: str,
    dtype: torch.dtype,
    weight: torch.dtype,
    capability: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dot_precision(precision, dtype, weight, torch.device("cuda")) == expected
    assert dot_precision(precision, dtype, weight, torch.device("cpu")) == precision


# --- compiled ------------------------------------------------------------------------------------------------------

MODULE = "fxpress.kernels.matmul"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def on_tensor_cores(instructions: list[str], kind: str, arch: int) -> bool:
    """Whether the best instructions of an architecture are used; Triton has tcgen05 for integers from 3.9 on only."""
    best = TENSOR_CORES[arch] in instructions
    return best or ((kind, arch) == ("int8", 100) and "mma.sync" in instructions)


def arguments(dtype: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Of x [M, K] and w [N, K], contiguous."""
    rows, columns, depth = shape
    return {
        "x": dtype, "w": dtype, "M": rows, "N": columns, "K": depth, "Q": 1,
        "stride_xp": 0, "stride_xq": 0, "stride_xm": depth, "stride_xk": 1,
        "stride_wp": 0, "stride_wq": 0, "stride_wn": depth, "stride_wk": 1,
    }  # fmt: skip


def written(dtype: str, columns: int, bias: bool) -> dict[str, Any]:
    """The default epilogue's arguments."""
    out = {"int8": "int32", "uint8": "float32", "float8_e4m3fn": "float32"}.get(dtype, dtype)
    strides = {"stride_op": 0, "stride_oq": 0, "stride_om": columns, "stride_on": 1}
    return {"bias": out if bias else None, "out": out, **strides}


def job(kind: str, shape: tuple[int, int, int], config: dict[str, int], arch: int, bias: bool = True) -> dict[str, Any]:
    dtype, precision = stored(kind, arch), KINDS[kind][1]
    name = str(dtype).removeprefix("torch.")
    given = arguments(name, shape)
    constants = {key: value for key, value in config.items() if key.startswith(("BLOCK", "GROUP"))}
    constants |= {"PRECISION": precision, "EVEN_K": shape[2] % config["BLOCK_K"] == 0}
    kernel = "matmul_kernel"
    if config["TMA"]:
        kernel = "matmul_persistent_kernel" if config["PROGRAMS"] else "matmul_descriptor_kernel"
        del constants["EVEN_K"]
        given = {key: value for key, value in given.items() if key in "MNKQ"} | written(name, shape[1], bias)
        given |= {"x": [name, config["BLOCK_M"], config["BLOCK_K"]], "w": [name, config["BLOCK_N"], config["BLOCK_K"]]}
    elif config["SPLIT"] > 1:
        kernel = "matmul_split_kernel"
        constants["SPLIT"] = config["SPLIT"]
        given |= {"partials": "int32" if kind == "int8" else "float32", "stride_split": shape[0] * shape[1]}
    else:
        given |= written(name, shape[1], bias)
    module = f"{MODULE}_descriptor" if config["TMA"] else MODULE
    return aot.job(
        module, kernel, given, constants, [arch], num_warps=config["num_warps"], num_stages=config["num_stages"]
    )


def best(kind: str, shape: tuple[int, int, int], arch: int, tma: bool = False) -> dict[str, Any]:
    dtype, precision = stored(kind, arch), KINDS[kind][1]
    return job(kind, shape, matmul_configs(*shape, dtype, arch, precision=precision, tma=tma)[0], arch)


def persistent(kind: str) -> dict[str, Any]:
    """The first configuration of few programs for Hopper."""
    configs = matmul_configs(*LARGE, KINDS[kind][0], 90, precision=KINDS[kind][1], tma=True)
    return next(config for config in configs if config["PROGRAMS"])


TMA_KINDS = ("bfloat16", "tf32", "int8", "float8")
LARGE, DECODE, ONES = (4096, 4096, 4096), (1, 512, 11008), (1, 1, 1)
JOBS = {
    f"{kind} {name} {arch}": best(kind, shape, arch)
    for kind in KINDS
    for name, shape in (("large", LARGE), ("decode", DECODE))
    for arch in (80, 90, 100)
}
for arch in (80, 90, 100):
    JOBS |= {f"bfloat16 ones {arch}": best("bfloat16", ONES, arch)}
    JOBS |= {f"{kind} odd {arch}": best(kind, ODD, arch) for kind in ("bfloat16", "tf32")}
JOBS |= {f"{kind} tma {arch}": best(kind, LARGE, arch, tma=True) for kind in TMA_KINDS for arch in (90, 100)}
HOPPER = {kind: persistent(kind) for kind in TMA_KINDS}
JOBS |= {f"{kind} persistent": job(kind, LARGE, config, 90) for kind, config in HOPPER.items()}
JOBS["combine"] = aot.job(
    MODULE,
    "matmul_combine_kernel",
    {"partials": "float32", **written("bfloat16", 4096, True), "M": 1, "N": 4096, "Q": 1, "stride_split": 4096},
    {"SPLIT": 4, "BLOCK_M": 4, "BLOCK_N": 128},
)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", ["large", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str, name: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{kind} {name} {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    used = found["instructions"]
    assert "cp.async.v4" in used or "ld.global.v4" in used
    assert ("tf32" in used) == (kind == "tf32")
    if kind == "float32":
        assert not {"mma.sync", "wgmma", "tcgen05"} & set(used)
    elif name == "large":
        assert on_tensor_cores(used, kind, arch)
    else:
        assert {"mma.sync", "wgmma", "tcgen05"} & set(used)


@pytest.mark.parametrize("arch", [90, 100])
def test_float8_is_multiplied_as_such(arch: int) -> None:
    found = aot.compiled(JOBS)
    for name in ("float8 large", "float8 tma"):
        assert {"float8", TENSOR_CORES[arch]} <= set(found[f"{name} {arch}"][arch]["instructions"])


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("kind", TMA_KINDS)
def test_descriptors_are_loaded_by_tma(kind: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{kind} tma {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert "tma" in found["instructions"]
    assert on_tensor_cores(found["instructions"], kind, arch)


@pytest.mark.parametrize("kind", TMA_KINDS)
def test_few_programs_go_over_all_tiles_on_hopper(kind: str) -> None:
    found, config = aot.compiled(JOBS)[f"{kind} persistent"][90], HOPPER[kind]
    assert config["PROGRAMS"] == 132 and config["TMA"] and config["BLOCK_M"] * config["BLOCK_N"] >= 128 * 128
    assert "error" not in found, found
    assert found["over"] is None
    assert {"tma", "wgmma"} <= set(found["instructions"])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", ["bfloat16 odd", "tf32 odd", "bfloat16 ones"])
def test_odd_sizes_compile_too(name: str, arch: int) -> None:
    found = aot.compiled(JOBS)[f"{name} {arch}"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert {"mma.sync", "wgmma", "tcgen05"} & set(found["instructions"])


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_combining_kernel_compiles(arch: int) -> None:
    found = aot.compiled(JOBS)["combine"][arch]
    assert "error" not in found, found
    assert found["over"] is None
    assert "ld.global.v4" in found["instructions"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_fits(kind: str, arch: int) -> None:
    dtype, precision = stored(kind, arch), KINDS[kind][1]
    tasks = {}
    for shape in (*SHAPES, ODD):
        for config in matmul_configs(*shape, dtype, arch, precision=precision, tma=True):
            tasks.setdefault(f"{config} {shape[2] % 16 == 0}", job(kind, shape, config, arch))
    found = aot.compiled(tasks)
    over = {name: results[arch].get("error") or results[arch].get("over") for name, results in found.items()}
    assert over == dict.fromkeys(found)
    assert all(("tf32" in results[arch]["instructions"]) == (kind == "tf32") for results in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_transposed_weight_is_loaded_by_16_bytes_too(arch: int) -> None:
    tasks = {kind: best(kind, LARGE, arch) for kind in TMA_KINDS}
    for task in tasks.values():
        task["arguments"] |= {"stride_wn": 1, "stride_wk": LARGE[1]}
    for kind, found in aot.compiled(tasks).items():
        assert "error" not in found[arch], found
        assert found[arch]["over"] is None
        assert "cp.async.v4" in found[arch]["instructions"]
        assert on_tensor_cores(found[arch]["instructions"], kind, arch)
