"""The ways to run a product or an attention of a generated module: its own kernels, and PyTorch's libraries.

What is listed gives the same numbers, but for the order of sums and, in half precision, one more rounding of a product
that eager PyTorch makes too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

CONFIGS = 8  # configurations of a generated kernel that are measured, at most
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
EIGHT = torch.float8_e4m3fn


@dataclass(frozen=True)
class Way:
    """One way to run a call: `run` takes the arguments that the generated module gives."""

    name: str
    run: Callable[..., Any]


def full_precision() -> bool:
    """Whether PyTorch's float32 products have all bits of their factors, as those of generated kernels do."""
    try:
        return torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # settings of PyTorch's older and newer kind beside one another: it does not say
        return False


# --- products -------------------------------------------------------------------------------------------------------


def product_ways(
    module: ModuleType,
    matmul: Callable[..., Any],
    form: str | None,
    x: Tensor,
    w: Tensor,
    extra: tuple[Any, ...],
    kernels: tuple[Any, ...],
    sums: int = 128,
) -> list[Way]:
    """The ways to run `matmul(x, w, extra, kernels)`; the first one is what the module does by itself.

    Args:
        matmul: the module's own function.
        form: of the epilogue: "plain": the product is the result; "bias": a vector is added; None: anything else.
    """
    (rows, inner), columns = x.shape[-2:], w.shape[-2]
    precision = module.dot_precision("ieee", x.dtype, w.dtype, x.device)
    tma = len(kernels) > 2 and module.tma_takes(x, w)
    configs = module.matmul_configs(
        rows, columns, inner, x.dtype, module.arch_of(x.device), _count(x, w), precision, tma, sums
    )
    found = [Way(_config_name(config), _configured(matmul, config)) for config in pruned(configs)]
    library = _library(x, w)
    if library is None:
        return found
    if form is not None and x.dtype in FLOATS:
        return [*found, Way(library, _direct if form == "plain" else _with_bias)]
    return [*found, Way(f"{library}, epilogue", _with_epilogue(module))]


def pruned(configs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is measured of configurations that a model of costs has put in order: the best tile in all its variants
    (how it is loaded, and by how many programs), others in the first one."""
    found: list[Mapping[str, Any]] = []
    tiles: list[tuple[Any, ...]] = []
    for config in configs:
        tile = tuple(config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "num_warps"))
        if tile not in tiles or tile == tiles[0]:
            found.append(config)
        tiles.append(tile)
    return found[:CONFIGS]


def _count(x: Tensor, w: Tensor) -> int:
    """How many products a batched product is."""
    return (x.shape[:-2] if w.dim() == 2 else torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])).numel()


def configured_ways(
    module: ModuleType, configs: str, function: Callable[..., Any], x: Tensor, w: Tensor, dense: Tensor | None = None
) -> list[Way]:
    """The ways to run a product of x [..., K] with a weight [N, ...] of its own format: the kernel's configurations.

    Args:
        configs: the name of the module's function that lists them.
        function: the module's own, for which the product is.
        dense: the weight in full, if many rows are multiplied by that, which is another product.
    """
    rows = x.shape[:-1].numel()
    if dense is not None and rows > module.FEW_ROWS:
        return [Way("torch.matmul or generated", function)]
    own = [Way("expanded, then torch.matmul or generated", function)] if rows > many_rows(module, configs) else []
    facts = {"M": rows, "N": w.shape[0], "K": x.shape[-1], "dtype": x.dtype, "arch": module.arch_of(x.device)}
    listed = vars(module)[configs]
    found = listed(**{name: facts[name] for name in inspect.signature(listed).parameters})
    ways = [Way(_config_name(config), _configured(function, config)) for config in found[:CONFIGS]]
    return own + ways[: CONFIGS - len(own)]


def many_rows(module: ModuleType, configs: str) -> float:
    """Beyond how many rows a weight of a format is by itself expanded in memory, and then multiplied."""
    return float(module.MANY_ROWS) if configs == "int4_configs" else math.inf


def _config_name(config: Mapping[str, Any]) -> str:
    blocks = "x".join(str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    parts = f", {config['SPLIT']} parts" if config.get("SPLIT", 1) > 1 else ""
    loads = ", TMA, persistent" if config.get("PROGRAMS") else ", TMA" * config.get("TMA", False)
    return f"{blocks}, {config['num_warps']} warps, {config['num_stages']} stages{parts}{loads}"


def _configured(matmul: Callable[..., Any], config: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda x, w, **given: matmul(x, w, **given, config=config)


def _library(x: Tensor, w: Tensor) -> str | None:
    """The name of the library call that multiplies such matrices; None: there is none that is exact."""
    (rows, inner), columns = x.shape[-2:], w.shape[-2]
    if x.dtype != w.dtype:
        return None
    if x.dtype in FLOATS:
        return "torch.matmul" if x.dtype != torch.float32 or full_precision() else None
    single = _count(x, w) == 1 and x.stride(-1) == 1 and w.stride(-1) == 1
    if x.dtype == torch.int8 and single and rows > 16 and inner % 8 == 0 and columns % 8 == 0:
        return "torch._int_mm"
    newer = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)
    if x.dtype == EIGHT and single and newer and inner % 16 == 0 and columns % 16 == 0:
        return "torch._scaled_mm"
    return None


def _multiplied(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of any dtype for which `_library` names a call, [..., M, N]; int32 for int8, float32 for float8."""
    if x.dtype in FLOATS:
        return functional.linear(x, w) if w.dim() == 2 else torch.matmul(x, w.transpose(-1, -2))
    left, right = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1]).t()
    if x.dtype == torch.int8:
        return torch._int_mm(left, right)
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.float32)


def _direct(x: Tensor, w: Tensor, extra: tuple[Any, ...], **_: Any) -> None:
    """The product alone, into the tensor that the epilogue would store."""
    out = extra[0]
    if w.dim() == 2:
        torch.mm(x.reshape(-1, x.shape[-1]), w.t(), out=out.view(-1, w.shape[0]))
    else:
        torch.matmul(x, w.transpose(-1, -2), out=out)


def _with_bias(x: Tensor, w: Tensor, extra: tuple[Any, ...], **_: Any) -> None:
    bias, out = extra[:2]
    if w.dim() == 2:
        torch.addmm(bias, x.reshape(-1, x.shape[-1]), w.t(), out=out.view(-1, w.shape[0]))
    else:
        torch.add(torch.matmul(x, w.transpose(-1, -2)), bias, out=out)


def _with_epilogue(module: ModuleType) -> Callable[..., Any]:
    """A library's product, then the generated epilogue in a kernel of its own: that which combines parts, of one."""

    def run(x: Tensor, w: Tensor, extra: tuple[Any, ...], kernels: tuple[Any, ...], **_: Any) -> None:
        rows, columns, count = x.shape[-2], w.shape[-2], _count(x, w)
        batch = x.shape[:-2] if w.dim() == 2 else torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
        inner = 1 if count == 1 else batch[-1]
        # Where a tile is, is many instructions: large ones have them for more elements.
        tall, wide = (4, 128) if rows <= 4 else (16, 128) if columns >= 128 else (16, 64)
        tiles = -(-rows // tall) * -(-columns // wide) * count
        if tiles > 0:
            kernels[1][(tiles,)](
                _multiplied(x, w), *extra, rows, columns, inner, count * rows * columns,
                SPLIT=1, BLOCK_M=tall, BLOCK_N=wide, enable_fp_fusion=True,
            )  # fmt: skip

    return run


# --- attention ------------------------------------------------------------------------------------------------------


def attention_ways(
    module: ModuleType, attention: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **given: Any
) -> list[Way]:
    """The ways to run `attention(query, key, value, ...)`; the first one is what the module does by itself.

    Args:
        attention: the module's own function.
    """
    rows, mask, bias = query.shape[2], given.get("key_mask"), given.get("bias")
    few = rows <= module.FEW_QUERIES  # heads share blocks, and keys are parted: as the function itself decides
    if few:
        rows *= query.shape[1] // key.shape[1]
    configs = module.attention_configs(
        query.shape[3], value.shape[3], query.dtype, module.arch_of(query.device), rows, key.shape[2],
        mask is not None, bias is not None,
    )  # fmt: skip
    if few:
        configs = configs[:1]
    own, *others = configs
    found = [Way(f"attention, {_attention_config(own)}", attention)]
    found += [Way(f"attention, {_attention_config(config)}", _attending(attention, config)) for config in others]
    if _takes(query, key, **given):
        found.append(Way("SDPA", _library_attention))
        if query.dtype in HALVES and _cudnn_takes(query, key, value):
            found.append(Way("SDPA, cuDNN", _cudnn_attention))
    return found


def _attention_config(config: Mapping[str, Any]) -> str:
    return f"{config['BLOCK_M']}x{config['BLOCK_N']}, {config['num_warps']} warps, {config['num_stages']} stages"


def _attending(attention: Callable[..., Any], config: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda query, key, value, **given: attention(query, key, value, **given, config=config)


def _cudnn_takes(*tensors: Tensor) -> bool:
    """What cuDNN asks for, and PyTorch does not say until it is called."""
    return all(tensor.stride(-1) == 1 for tensor in tensors) and not torch.are_deterministic_algorithms_enabled()


def _cudnn_attention(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _library_attention(query, key, value, **given)


def _takes(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    empty: str = "zeros",  # of what, without a mask, no row is
    bias: Tensor | None = None,
    **others: Any,
) -> bool:
    """Whether PyTorch's operator says exactly the same."""
    if softcap or sinks is not None or others or query.dtype not in FLOATS or query.numel() == 0 or key.numel() == 0:
        return False
    if query.dtype == torch.float32 and not full_precision():
        return False
    if bias is not None or key_mask is not None:
        return False  # PyTorch's kernels do not agree on rows without a key; and that of kernels/ skips padding
    banded = left is not None or right is not None
    return not banded or (left is None and right == 0)


def _library_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    right: int | None = None,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    found = functional.scaled_dot_product_attention(
        query, key, value, is_causal=right == 0, scale=scale, enable_gqa=grouped
    )
    # What reads the result may view it: it lies in memory as that of the module's own function.
    laid = found.transpose(1, 2)
    return found if laid.is_contiguous() else laid.contiguous().transpose(1, 2)
