"""Kernels are compiled for GPUs that are not there, as a launch would compile them, and what they use is known."""

from pathlib import Path
from typing import Any

import aot
import pytest
import torch
from triton.runtime.jit import JITFunction

from fxpress.backends.triton.aot import LIMITS, Compiled, Descriptor, Pointer, check_limits, compile_kernel, specialize
from fxpress.ir.errors import LoweringError

KERNELS = str(Path(aot.__file__).with_name("example_kernels.py"))
COPY = {"x": "float32", "out": "float32", "size": 1024, "stride": 1}
PRODUCT = {"x": "bfloat16", "y": "bfloat16", "out": "float32", "K": 4096}
JOBS = {
    "copy": aot.job(KERNELS, "copy_kernel", COPY, {"BLOCK": 1024}),
    "strided": aot.job(KERNELS, "copy_kernel", {**COPY, "stride": 2}, {"BLOCK": 1024}, archs=[90]),
    "unaligned": aot.job(KERNELS, "copy_kernel", {**COPY, "x": "float32?"}, {"BLOCK": 1024}, archs=[90]),
    "odd": aot.job(KERNELS, "copy_kernel", {**COPY, "size": 1023}, {"BLOCK": 1024}, archs=[90]),
    "registers": aot.job(
        KERNELS, "centre_kernel", {"x": "float32", "out": "float32"}, {"BLOCK": 16384}, archs=[90], num_warps=1
    ),
    "product": aot.job(KERNELS, "product_kernel", PRODUCT, {"BLOCK": 128, "DEPTH": 64}),
    "shared": aot.job(KERNELS, "product_kernel", PRODUCT, {"BLOCK": 128, "DEPTH": 64}, num_stages=8),
    "descriptor": aot.job(
        KERNELS, "block_kernel", {"x": ["float16", 16, 64], "out": "float16"}, {"BLOCK": 64, "ROWS": 16}, [90, 100]
    ),
    "wrong": aot.job(KERNELS, "copy_kernel", COPY, {"BLOCK": 1000}, archs=[90]),
}


def result(job: str, arch: int = 90) -> dict[str, Any]:
    return aot.compiled(JOBS)[job][arch]


@pytest.mark.parametrize(
    ("argument", "kind", "divisible"),
    [
        (torch.float16, "*fp16", True),
        (Pointer(torch.int8, aligned=False), "*i8", False),
        (Descriptor(torch.bfloat16, (128, 64)), "tensordesc<bf16[128, 64]>", False),
        (torch.zeros(64), "*fp32", True),
        (torch.zeros(64)[1:], "*fp32", False),
        (48, "i32", True),
        (47, "i32", False),
        (0, "i32", True),
        (1, "constexpr", False),
        (-16, "i32", True),
        (2**31 - 1, "i32", False),
        (2**31, "i64", True),
        (True, "u1", False),
        (1.0, "fp32", False),
        (None, "constexpr", False),
    ],
)
def test_arguments_have_the_types_that_a_launch_gives_them(argument: Any, kind: str, divisible: bool) -> None:
    assert specialize(argument) == (kind, divisible)


def test_a_dtype_that_kernels_do_not_know() -> None:
    with pytest.raises(LoweringError, match=r"no pointer to torch\.complex64"):
        specialize(torch.complex64)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_aligned_neighbours_are_moved_by_16_bytes(arch: int) -> None:
    found = result("copy", arch)
    assert found["instructions"] == ["ld.global.v4", "st.global.v4"]
    assert found["over"] is None
    assert found["spills"] == found["shared"] == 0
    assert found["registers"] > 0
    assert found["name"] == "copy_kernel"


@pytest.mark.parametrize(
    ("job", "lost"), [("strided", "ld.global.v4"), ("unaligned", "ld.global.v4"), ("odd", "st.global.v4")]
)
def test_others_are_not(job: str, lost: str) -> None:
    assert lost not in result(job)["instructions"]


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_tensor_cores(arch: int, instruction: str) -> None:
    found = result("product", arch)
    assert instruction in found["instructions"]
    assert "cp.async.v4" in found["instructions"]
    assert found["over"] is None
    assert found["shared"] >= 2 * 2 * 128 * 64 * 2  # two stages of two blocks
    assert (found["tensor_memory"] > 0) == (arch == 100)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_too_much_shared_memory_is_seen(arch: int) -> None:
    found = result("shared", arch)
    assert found["shared"] > LIMITS[arch].shared
    assert f"{found['shared']} bytes of shared memory of {LIMITS[arch].shared}" in found["over"]


def test_spills_are_seen() -> None:
    found = result("registers")
    assert found["spills"] > 0
    assert f"{found['spills']} bytes of spilled registers of 32" in found["over"]


@pytest.mark.parametrize("arch", [90, 100])
def test_blocks_of_descriptors_are_loaded_by_tma(arch: int) -> None:
    found = result("descriptor", arch)
    assert "tma" in found["instructions"]
    assert found["over"] is None


def test_one_kernel_that_does_not_compile_spoils_no_other() -> None:
    assert "power of 2" in result("wrong")["error"]


def test_limits_are_said_with_numbers() -> None:
    fits = Compiled("k", ptx="", cubin=b"", shared=166912, registers=255, spills=0)
    check_limits(fits, 80)
    with pytest.raises(LoweringError, match="k does not fit sm_86: 166912 bytes of shared memory of 101376"):
        check_limits(fits, 86)
    with pytest.raises(LoweringError, match=r"nothing is known of sm_12; the limits of 80, .* are"):
        check_limits(fits, 12)
    with pytest.raises(LoweringError, match="600 columns of tensor memory of 512, 40 bytes of spilled registers of 32"):
        check_limits(Compiled("k", "", b"", shared=0, registers=32, spills=40, tensor_memory=600), 100)


def copy(x, out, size, stride, BLOCK):  # type: ignore[no-untyped-def]
    """Never compiled: what is wrong with its arguments is seen before."""


@pytest.mark.parametrize(
    ("arguments", "constants", "message"),
    [
        ({"x": torch.float32}, {"other": 1}, "copy has no parameter other; it has x, out, size, stride, BLOCK"),
        ({"x": torch.float32, "out": torch.float32, "size": 3}, {}, "its argument stride is not given"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], constants: dict[str, Any], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        compile_kernel(JITFunction(copy), arguments, constants, 90)


def test_an_interpreted_kernel_is_refused() -> None:
    with pytest.raises(LoweringError, match="copy cannot be compiled: it is interpreted in this process"):
        compile_kernel(copy, {}, {}, 90)
