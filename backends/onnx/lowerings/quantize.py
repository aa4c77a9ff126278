"""Quantization: real integer matmuls of ONNX Runtime.

Activations are unsigned bytes there, the integers of the graph language plus 128: with signed ones the same matmul
takes ten times as long on x86 (measured on Zen 4, onnxruntime 1.32). The sums, and so the results, are the same.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from ....ir.graph import arguments, dtype, shape
from ....ir.ops.integer import cast, integer_linear
from ....ir.ops.quantize import (
    SMALLEST_SCALE,
    dequantize,
    dynamic_quantize,
    int8_linear,
    pack_int4,
    quantize,
)
from .lowering import Lowering, Probe, plain_sum, reference

_SHIFT = 128  # from the integers of the graph language, -128..127, to those of the kernels, 0..255


def _quantize_linear(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return symbolic("QuantizeLinear", (input, scale, zero_point), dtype=torch.uint8, shape=input.shape, version=21)


def raised(zero_point: Tensor | None) -> Tensor:
    """A zero point as the kernels have it."""
    if zero_point is None:
        return torch.full((), _SHIFT, dtype=torch.uint8)
    return zero_point if zero_point.dtype is torch.uint8 else (zero_point.to(torch.int32) + _SHIFT).to(torch.uint8)


def _quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8, stored: bool = False
) -> Tensor:
    return _quantize_linear(input, scale, raised(zero_point))


def _refuses_quantize(node: fx.Node) -> str | None:
    given = arguments(node)
    if not given["stored"]:
        return "its integers are kept as floats"
    if given["bits"] != 8:
        return f"there is no kernel for {given['bits']} bits"
    return "there is more than one scale" if shape(given["scale"]) else _read_as_numbers(node)


def _read_as_numbers(node: fx.Node) -> str | None:
    """Who reads stored integers as numbers: they are 128 higher here than in the graph language."""
    for user in node.users:
        if user.target is operator.getitem:
            found = _read_as_numbers(user) if user.args[1] == 0 else None
            if found is not None:
                return found
        elif user.target not in (int8_linear, integer_linear, dequantize):
            return f"{user.name} reads its integers, which are stored as unsigned bytes; dequantize them first"
    return None


def _refuses_stored(node: fx.Node) -> str | None:
    return "its integers are stored" if arguments(node)["stored"] else None


def _dynamic_quantize(
    input: Tensor, per: str, unsigned: bool = False, stored: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    if per == "tensor":
        integers, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (input,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(input.shape, (), ()),
            version=11,
        )
        return integers, scale, zero_point
    top = (input if unsigned else input.abs()).amax(-1, keepdim=True)
    scale = (top * (1 / (255 if unsigned else 127))).clamp(min=SMALLEST_SCALE)
    zero_point = torch.full((), 0 if unsigned else _SHIFT, dtype=torch.uint8)
    # Divided first: a QuantizeLinear with a scale for each row takes matrices, and more nodes around it than it saves.
    return _quantize_linear(input / scale, torch.ones(()), zero_point), scale, zero_point


def _refuses_dynamic(node: fx.Node) -> str | None:
    given = arguments(node)
    if not given["stored"]:
        return "its integers are kept as floats"
    if dtype(given["input"]) is not torch.float32:
        return f"no kernel quantizes {dtype(given['input'])}"
    return _read_as_numbers(node)


def _dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Activations are as the kernels have them; weights are integers in the file, and floats as soon as it is loaded.

    ONNX Runtime computes Cast and Mul of a weight once, a DequantizeLinear at each run: a layer [3072, 768] takes ten
    times as long for one row then, a fifth longer for 128 rows (1.32 on Zen 4).
    """
    if input.dtype is torch.uint8:
        zero_point = raised(zero_point).to(scale.dtype)
    found: Tensor = reference(dequantize)(input, scale, zero_point)
    return found


def _int8_linear(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """MatMulIntegerToFloat; a scale for each token, which the kernel does not take, multiplies its result."""
    if input.dtype is torch.int8:  # of a requantize
        input = cast(input, torch.uint8) + torch.full((), _SHIFT, dtype=torch.uint8)  # modulo 256
    columns = weight_scale.reshape(-1)
    tokenwise = scale.dim() > 0
    inside: list[Tensor | None] = [torch.ones(()) if tokenwise else scale, columns, raised(zero_point), None]
    result = symbolic(
        "com.microsoft::MatMulIntegerToFloat",
        (input, weight.t(), *inside, None if tokenwise else bias),
        dtype=scale.dtype,
        shape=(*input.shape[:-1], weight.shape[0]),
        version=1,
    )
    if tokenwise:
        result = result * scale
        result = result if bias is None else plain_sum(result, bias)
    return result


def _refuses_int8_linear(node: fx.Node) -> str | None:
    given = arguments(node)
    if dtype(node) is not torch.float32:
        return f"the kernel gives float32, not {dtype(node)}"
    width = shape(given["weight_scale"])[-1]
    return None if width == 1 else f"the weight has {width} scales a row, the kernel takes one"


def _int4_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """MatMulNBits in blocks, on inputs that the kernel rounds to 8 bits for each block of a token (accuracy level 4).

    At the other levels ONNX Runtime 1.32 takes up to 200 times as long on a CPU.
    """
    width, rows = input.shape[-1], weight.shape[0]
    groups, block = blocks(width, weight_scale.shape[-1])
    bytes_ = F.pad(weight, (0, groups * block // 2 - weight.shape[-1])).reshape(rows, groups, block // 2)
    inputs = [input, bytes_, _per_block(weight_scale, groups).reshape(-1)]
    if zero_point is not None:
        inputs.append(pack_int4(_per_block(zero_point, groups)).reshape(-1))
    result = symbolic(
        "com.microsoft::MatMulNBits",
        inputs,
        {"K": width, "N": rows, "bits": 4, "block_size": block, "accuracy_level": 4},
        dtype=input.dtype,
        shape=(*input.shape[:-1], rows),
        version=1,
    )
    return result if bias is None else result + bias


def _int4_embedding(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, indices: Tensor, width: int
) -> Tensor:
    """GatherBlockQuantized, which unpacks the rows that are looked up; its bytes are those of `pack_int4`."""
    groups, block = blocks(width, weight_scale.shape[-1])
    inputs = [weight, indices, _per_block(weight_scale, groups)]
    if zero_point is not None:
        inputs.append(pack_int4(_per_block(zero_point, groups)))
    return symbolic(
        "com.microsoft::GatherBlockQuantized",
        inputs,
        {"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        dtype=weight_scale.dtype,
        shape=(*indices.shape, width),
        version=1,
    )


def _expand_int4(weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, width: int) -> Tensor:
    """Nodes that read constants alone: ONNX Runtime computes them once, when it loads the model.

    In 2 ns a weight: all in bytes, and halves that lie apart until they are transposed. A shift of pairs takes six
    times as long, and floats take four times.
    """
    rows, groups = weight_scale.shape
    size = 2 * weight.shape[1] if groups == 1 else blocks(width, groups)[1]
    bytes_ = F.pad(weight, (0, groups * size // 2 - weight.shape[1])).unsqueeze(0)
    both = (2, rows, bytes_.shape[2])
    places = torch.tensor([0, 4], dtype=torch.uint8).reshape(2, 1, 1)
    halves = symbolic("BitShift", (bytes_, places), {"direction": "RIGHT"}, dtype=torch.uint8, shape=both, version=11)
    mask = torch.tensor(15, dtype=torch.uint8)
    raised = symbolic("BitwiseAnd", (halves, mask), dtype=torch.uint8, shape=both, version=18)
    raised = raised.permute(1, 2, 0).reshape(rows, groups, size).to(torch.int8)
    zeros = torch.tensor(8, dtype=torch.int8) if zero_point is None else (zero_point + 8).unsqueeze(-1)
    integers = (raised - zeros) * weight_scale.unsqueeze(-1)
    return integers.reshape(rows, -1)[:, :width]


def _int4_rows(weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, indices: Tensor, width: int) -> Tensor:
    """The same in floats, which hold bytes exactly: the exporter has no shift of bytes."""
    packed = F.embedding(indices, weight).to(torch.float32)
    high = (packed / 16).floor()
    integers = torch.stack((packed - high * 16, high), -1).flatten(-2)[..., :width] - 8
    zeros = None if zero_point is None else F.embedding(indices, zero_point)
    found: Tensor = reference(dequantize)(integers, F.embedding(indices, weight_scale), zeros)
    return found


def _refuses_int4_embedding(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["width"] % 2:
        return f"the kernel takes even widths, not {given['width']}"
    if dtype(node) is not torch.float32:
        return f"the kernel gives float32, not {dtype(node)}"
    size = blocks(given["width"], shape(given["weight_scale"])[-1])[1]
    return None if size >= 16 else f"the kernel takes groups of 16 or more, not {size}"


def _per_block(values: Tensor, blocks_: int) -> Tensor:
    return values.expand(-1, blocks_) if values.shape[-1] == 1 else values


def blocks(width: int, groups: int) -> tuple[int, int]:
    """The number of a row's groups and their size, a power of two; a whole row is cut in blocks of 32."""
    size = 32 if groups == 1 else 1 << (-(-width // groups) - 1).bit_length()
    return -(-width // size), size


def _refuses_int4_linear(node: fx.Node) -> str | None:
    given = arguments(node)
    if dtype(given["input"]) is not torch.float32:
        return f"the kernel multiplies float32, not {dtype(given['input'])}"
    size = blocks(shape(given["input"])[-1], shape(given["weight_scale"])[-1])[1]
    return None if size >= 16 else f"the kernel takes groups of 16 or more, not {size}"


QUANTIZE = (
    Lowering("QuantizeLinear", _quantize, _refuses_quantize),
    Lowering("Div+Round+Clip", reference(quantize), _refuses_stored),
)
DYNAMIC_QUANTIZE = (
    Lowering("DynamicQuantizeLinear", _dynamic_quantize, _refuses_dynamic),
    Lowering("Div+Round+Clip", reference(dynamic_quantize), _refuses_stored),
)
DEQUANTIZE = (Lowering("Cast+Mul", _dequantize),)
INT4_LINEAR = (Lowering("MatMulNBits", _int4_linear, _refuses_int4_linear, standard=False),)
EXPAND_INT4 = (Lowering("BitShift+Mul", _expand_int4),)
INT4_EMBEDDING = (
    Lowering("GatherBlockQuantized", _int4_embedding, _refuses_int4_embedding, standard=False),
    Lowering("Gather+Floor", _int4_rows),
)
INT8_LINEAR = (Lowering("MatMulIntegerToFloat", _int8_linear, _refuses_int8_linear, standard=False),)

PROBE = Probe(
    prepare=lambda name, tensor: (tensor.to(torch.int32) + _SHIFT).to(torch.uint8) if name == "input" else tensor,
    wrap=lambda function: function,
)
