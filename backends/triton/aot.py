"""Ahead-of-time compilation of kernels: to PTX and machine code for a GPU that need not be there.

Triton's interpreter and its compiler exclude each other in a process: here TRITON_INTERPRET must not be set when the
kernel is decorated. Triton itself checks a kernel's shared memory when it is loaded on a device, and spilled registers
never; `check_limits` does both from what the compiler says.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

from ...ir.errors import LoweringError

TOLERATED_SPILLS = 32  # bytes: ptxas spills a few of many free registers to let one more block run
ALIGNMENT = 16  # bytes of a vector load, and what a divisible integer is divisible by


@dataclass(frozen=True)
class Pointer:
    """A pointer to elements of one dtype, `aligned` where its address is a multiple of 16."""

    dtype: torch.dtype
    aligned: bool = True


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor made by the host (triton.tools.tensor_descriptor): what TMA loads a block of."""

    dtype: torch.dtype
    block: tuple[int, ...]


Argument = Pointer | Descriptor | torch.dtype | Tensor | bool | int | float | None  # a dtype: an aligned pointer to it


@dataclass(frozen=True)
class Limits:
    """What one block of threads may use on an architecture."""

    shared: int  # bytes of shared memory that a block may opt in to
    registers: int = 255  # of a thread
    tensor_memory: int = 0  # columns


LIMITS = {
    80: Limits(163 * 1024),
    86: Limits(99 * 1024),
    89: Limits(99 * 1024),
    90: Limits(227 * 1024),
    100: Limits(227 * 1024, tensor_memory=512),
    103: Limits(227 * 1024, tensor_memory=512),
    120: Limits(99 * 1024),
}  # by compute capability, as in the CUDA C++ Programming Guide's table of technical specifications


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture, and what a launch of it uses.

    Attributes:
        name: of the entry point.
        shared: bytes of shared memory of a block.
        registers: of a thread.
        spills: bytes of local memory of a thread, where the compiler puts what the registers do not hold.
        tensor_memory: columns of tensor memory of a block (sm_100).
    """

    name: str
    ptx: str
    cubin: bytes
    shared: int
    registers: int
    spills: int
    tensor_memory: int = 0


POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def specialize(argument: Argument) -> tuple[str, bool]:
    """The type in a kernel's signature and whether it counts as divisible by 16, as Triton decides at a launch.

    None and the integer 1 are constants to the compiler, of type "constexpr".
    """
    if argument is None:
        return "constexpr", False
    if isinstance(argument, Tensor):
        argument = Pointer(argument.dtype, argument.data_ptr() % ALIGNMENT == 0)
    if isinstance(argument, torch.dtype):
        argument = Pointer(argument)
    if isinstance(argument, Pointer | Descriptor):
        if argument.dtype not in POINTERS:
            raise LoweringError(f"a kernel takes no pointer to {argument.dtype}")
        pointer = POINTERS[argument.dtype]
        if isinstance(argument, Pointer):
            return pointer, argument.aligned
        return f"tensordesc<{pointer[1:]}{list(argument.block)}>", False
    if isinstance(argument, bool):
        return "u1", False
    if isinstance(argument, float):
        return "fp32", False
    if argument == 1:
        return "constexpr", False
    return "i32" if -(2**31) <= argument < 2**31 else "i64", argument % ALIGNMENT == 0


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Argument],
    constants: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile a kernel as a launch with these arguments would on a device of compute capability `arch` (90: sm_90).

    `arguments` are those of run time and `constants` the constexprs; between them they name every parameter that has
    no default.
    """
    if not isinstance(kernel, JITFunction):
        name = getattr(kernel, "__name__", repr(kernel))
        raise LoweringError(f"{name} cannot be compiled: it is interpreted in this process (TRITON_INTERPRET is set)")
    known = [parameter.name for parameter in kernel.params]
    unknown = [name for name in (*arguments, *constants) if name not in known]
    if unknown:
        raise LoweringError(f"{kernel.__name__} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in kernel.params:
        place = (parameter.num,)
        if parameter.name in arguments and not parameter.is_constexpr:
            argument = arguments[parameter.name]
            kind, divisible = specialize(argument)
            if parameter.do_not_specialize and argument is not None:
                kind, divisible = ("i32" if kind == "constexpr" else kind), False
            if divisible and not parameter.do_not_specialize_on_alignment:
                attributes[place] = [["tt.divisibility", ALIGNMENT]]
            if kind == "constexpr":
                values[place] = argument
            signature[parameter.name] = kind
        elif parameter.is_constexpr and (parameter.name in constants or parameter.has_default):
            signature[parameter.name] = "constexpr"
            values[place] = constants.get(parameter.name, parameter.default)
        else:
            kind = "constant" if parameter.is_constexpr else "argument"
            raise LoweringError(f"{kernel.__name__} cannot be compiled: its {kind} {parameter.name} is not given")
    # Fusion of a multiplication and an addition is Triton's default at a launch, but only up to 3.9.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, values, attributes)
    made = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = resources(made.asm["cubin"])
    return Compiled(
        name=made.metadata.name,
        ptx=made.asm["ptx"],
        cubin=made.asm["cubin"],
        shared=made.metadata.shared,
        registers=registers,
        spills=spills,
        tensor_memory=getattr(made.metadata, "tmem_size", None) or 0,
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread of the one kernel in machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise LoweringError(f"cuobjdump says nothing of a kernel's registers: {text.strip()!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def check_limits(compiled: Compiled, arch: int) -> None:
    """Raise LoweringError where a compiled kernel uses more than an architecture has, or spills registers."""
    if arch not in LIMITS:
        raise LoweringError(f"nothing is known of sm_{arch}; the limits of {', '.join(map(str, LIMITS))} are")
    limits = LIMITS[arch]
    over = [
        f"{found} {what} of {most}"
        for what, found, most in (
            ("bytes of shared memory", compiled.shared, limits.shared),
            ("registers", compiled.registers, limits.registers),
            ("columns of tensor memory", compiled.tensor_memory, limits.tensor_memory),
            ("bytes of spilled registers", compiled.spills, TOLERATED_SPILLS),
        )
        if found > most
    ]
    if over:
        raise LoweringError(f"{compiled.name} does not fit sm_{arch}: {', '.join(over)}")
