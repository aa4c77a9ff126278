"""The matmul floor: a model's matmul operations over the best rate at which this machine multiplies.

Operations are counted while the model runs in PyTorch: every multiplication and addition of its matmuls, those of
attention included, masked or not. For a windowed model the share of attention outside the window is taken off.
The rate is the best of ONNX Runtime and torch on the model's own linear layers at the same number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
from candidates import session_of
from workloads import Shape

Product = tuple[int, Callable[[], Any]]  # operations, a run


def attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of query @ key.T and weights @ value, from the shapes [batch, heads, length, size]."""
    batch, heads, length, size = query
    return 2 * int(batch * heads * length * key[2] * (size + value[3]))


def count_operations(run: Callable[[], Any], length: int, window: int | None) -> tuple[Any, int]:
    """What the run gives, and its matmul operations."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch has no formula for it
    with FlopCounterMode(display=False, custom_mapping={cpu_attention: attention_operations}) as counter:
        result = run()
    counts = counter.get_flop_counts()["Global"]
    inside = 1.0 if window is None else band_share(length, window)
    return result, round(sum(n * (inside if op is cpu_attention else 1) for op, n in counts.items()))


def band_share(length: int, window: int) -> float:
    """The share of the pairs (i, j) with |i - j| <= window."""
    i = numpy.arange(length)
    pairs = numpy.minimum(i + window, length - 1) - numpy.maximum(i - window, 0) + 1
    return float(pairs.sum()) / length**2


def linear_sizes(model: Any) -> list[tuple[int, int]]:
    """(inner, outer) size of the model's linear layers, each once."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    found = {(module.in_features, module.out_features) for module in model.modules() if isinstance(module, Linear)}
    return sorted(found | {(module.nx, module.nf) for module in model.modules() if isinstance(module, Conv1D)})


def products(shape: Shape, sizes: list[tuple[int, int]]) -> list[Product]:
    """Each linear layer as one matmul with a constant weight, in ONNX Runtime and in torch."""
    import torch
    import torch.nn.functional as F
    from onnx import TensorProto, helper, numpy_helper

    random = numpy.random.default_rng(0)
    rows = shape[0] * shape[1]
    found: list[Product] = []
    for k, n in sizes:
        x = random.standard_normal((rows, k), numpy.float32)
        weight = random.standard_normal((k, n), numpy.float32)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "matmul",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, n])],
            [numpy_helper.from_array(weight, "w")],
        )
        opsets = [helper.make_opsetid("", 20)]
        session = session_of(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
        tensor, transposed = torch.from_numpy(x), torch.from_numpy(weight.T.copy())
        operations = 2 * rows * k * n
        found.append((operations, lambda session=session, x=x: session.run(None, {"x": x})))
        found.append((operations, lambda tensor=tensor, w=transposed: F.linear(tensor, w)))
    return found
