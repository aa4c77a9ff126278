"""Models in half precision: weights and activations in bfloat16 or float16; kernels compute and add up in fp32."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.equality import cosine, sqnr_db
from ..ir.errors import InputError, nearest
from ..ir.graph import Program, identifier

aten = torch.ops.aten
_CASTS = (aten.to, aten._to_copy)
_VIEWS = (aten.unsqueeze, aten.view, aten.reshape, aten.expand, aten.slice, aten.select, aten.permute, aten.transpose)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def half_dtype(name: str | None, model: Any, backend: str) -> torch.dtype | None:
    """The dtype of a name; None as it is.

    Raises:
        InputError: no such dtype, or model or backend cannot be of it.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}: {nearest(name, DTYPES)}")
    if backend == "openvino":
        return None  # the model keeps its own; `inner_dtype`
    if not isinstance(model, torch.nn.Module):
        raise InputError("dtype needs an nn.Module: an exported program has its dtypes written into it")
    on_gpu = any(weight.is_cuda for weight in model.parameters())
    if backend == "onnx" or (backend == "auto" and not on_gpu):
        raise InputError(
            f"dtype={name!r} needs backend='openvino', 'triton' or 'eager': ONNX Runtime's CPU kernels are of float32"
        )
    return DTYPES[name]


def inner_dtype(name: str | None, backend: str) -> str | None:
    """What the openvino backend computes in; weights, inputs and outputs stay as they are. None for other backends.

    Raises:
        InputError: OpenVINO is not installed, or this machine does not compute in it.
    """
    if name is None or backend != "openvino":
        return None
    if name != "bfloat16":
        raise InputError(f"the openvino backend computes in float32 or bfloat16, not in {name}")
    try:
        from ..backends.openvino.session import check_dtype
    except ModuleNotFoundError as error:
        raise InputError(f"backend 'openvino' needs the package {error.name}: pip install openvino") from error
    check_dtype(name)
    return name


def narrowed(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a model with its floats in a dtype; without one the model itself."""
    return model if dtype is None else copy.deepcopy(model).to(dtype)


def keep_exact(program: Program, model: torch.nn.Module, origin: torch.nn.Module) -> bool:
    """Give a narrowed model, and its program, those of the original's buffers that are cast to float32 at each reading.

    Rotary frequencies are, and are more than weights: rounded to bfloat16 they are off by an eighth of a turn at the
    two-hundredth token. transformers' `from_pretrained(dtype=...)` makes them in float32 whatever the dtype.

    Returns:
        whether there are any.
    """
    exact = {identifier(name): (name, buffer) for name, buffer in origin.named_buffers()}
    kept = False
    for node in program.graph.nodes:
        if node.op != "get_attr" or node.target not in exact:
            continue
        name, buffer = exact[str(node.target)]
        views = _read_in_float32(node) if buffer.dtype is torch.float32 else None
        if not views:
            continue
        for module, path in ((model, name), (program.module, str(node.target))):
            owner, _, leaf = path.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.clone()
        for view in views:
            view.meta["val"] = view.meta["val"].to(torch.float32)
        kept = True
    return kept


def _read_in_float32(node: fx.Node) -> list[fx.Node] | None:
    """A tensor and the views of it that a program reads, if it casts all of them to float32; else None."""
    found, done = [node], 0
    while done < len(found):
        for user in found[done].users:
            packet = getattr(user.target, "overloadpacket", None)
            if packet in _CASTS and user.meta["val"].dtype is torch.float32:
                continue
            if packet not in _VIEWS:
                return None
            found.append(user)
        done += 1
    return found if node.users and node.meta["val"].dtype in DTYPES.values() else None


def narrow_inputs(inputs: Any, dtype: torch.dtype | None) -> Any:
    """The same structure with its float tensors in a dtype; without one the inputs themselves."""
    if dtype is None:
        return inputs
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, inputs)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def precision_loss(model: torch.nn.Module, program: Program, flat: Sequence[Tensor], example: Any) -> dict[str, float]:
    """How far a program in half precision is from the model in its own: the worst output's SQNR in dB, and cosine.

    Args:
        flat: the example, as the program takes it.
        example: the same as the model takes it, positional and named; floats are cast to the model's dtype.
    """
    usual = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    args, kwargs = narrow_inputs(example, usual)
    with torch.no_grad():
        return loss(program.run(flat), pytree.tree_leaves(model(*args, **kwargs)))


def loss(found: Sequence[Any], truth: Sequence[Any]) -> dict[str, float]:
    """How far outputs are from others: SQNR in dB and cosine, each of the worst; what is no float is not looked at."""
    found, truth = ([leaf for leaf in side if _is_float(leaf) and leaf.numel()] for side in (found, truth))
    pairs = list(zip(found, truth, strict=True))
    return {
        "sqnr_db": min((sqnr_db(a, b) for a, b in pairs), default=float("inf")),
        "cosine": min((cosine(a, b) for a, b in pairs), default=1.0),
    }
