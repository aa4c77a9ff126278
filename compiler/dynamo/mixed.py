"""The option `dtype`: matrix products, convolutions and attention in half precision, the rest where it is safe.

The choice operator by operator is that of torch.autocast (Micikevicius et al. 2018, "Mixed precision training"), made
where functions are called and not below the dispatcher, so that composite operators stay whole for the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# By the names of functions and methods, which are the same for torch.x, Tensor.x and torch.nn.functional.x.
_HALVED = frozenset([
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm",
    "einsum", "chain_matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "scaled_dot_product_attention",
])  # fmt: skip
_FULL = frozenset([
    "softmax", "log_softmax", "softmin", "logsumexp", "layer_norm", "rms_norm", "group_norm", "batch_norm",
    "instance_norm", "norm", "vector_norm", "normalize", "cosine_similarity", "exp", "expm1", "pow", "__pow__",
    "__rpow__", "log", "log2", "log10", "log1p", "rsqrt", "reciprocal", "softplus", "sum", "prod", "mean", "var",
    "std", "var_mean", "std_mean", "cumsum", "cumprod", "cdist", "cross_entropy", "nll_loss", "mse_loss", "l1_loss",
    "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
])  # fmt: skip
_WIDEST = frozenset([
    "cat", "concat", "concatenate", "stack", "where", "index_put", "index_copy", "index_add", "scatter", "scatter_add",
    "lerp",
])  # fmt: skip
_OPTIONS = ("attn_mask", "out")  # tensors that an operator takes in a dtype of their own


class Mixed(TorchFunctionMode):
    """Casts the arguments of what is called within, as the function wants them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call a function."""
        name, kwargs = str(getattr(func, "__name__", "")), dict(kwargs or {})
        dtype = self._wanted(name, args, kwargs)
        if dtype is None:
            return func(*args, **kwargs)
        apart = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        if name == "scaled_dot_product_attention":  # a mask in fp32 stays: the least number of fp32 is no half's
            apart |= dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False))
            args = args[:3]
        args, kwargs = _cast((tuple(args), kwargs), dtype)
        return func(*args, **kwargs, **apart)

    def _wanted(self, name: str, args: Sequence[Any], kwargs: Any) -> torch.dtype | None:
        """The dtype that the float arguments of a call are to have; None: the one that they have."""
        found = {leaf.dtype for leaf in pytree.tree_leaves((args, kwargs)) if _is_float(leaf)}
        if not found:
            return None
        if name in _HALVED:
            return self._dtype
        if name in _FULL:
            return torch.float32
        if name.endswith("_") and not name.endswith("__") and args and _is_float(args[0]):
            return args[0].dtype if len(found) > 1 else None  # in place: as what is changed
        return torch.float32 if name in _WIDEST and len(found) > 1 else None


def mixed(gm: fx.GraphModule, call: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
    """What runs a graph with halves in it, its outputs in the dtypes that they have without; None: as it is."""
    if dtype is None:
        return call
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]
    dtypes = [node.meta["example_value"].dtype if _is_tensor(node) else None for node in outputs]

    def run(*args: Any) -> tuple[Any, ...]:
        with Mixed(dtype):
            found = call(*args)
        return tuple(
            value.to(usual) if usual is not None and value.dtype != usual else value
            for value, usual in zip(found, dtypes, strict=True)
        )

    return run


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """A structure with its fp32, bf16 and fp16 tensors in a dtype."""
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) and leaf.dtype != dtype else leaf, values)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in _FLOATS
