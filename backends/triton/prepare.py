"""A copy of a program for this backend: what is fused for others is written as the operators that it is made of.

Kernels are then chosen anew: a product takes as its epilogue whatever elementwise operators follow it, a norm the
addition before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.expand import expand, inline
from ...ir.graph import Program, arguments, dtype, shape
from ...ir.ops.float8 import FLOAT8, float8_linear, float8_products, float8_quantize, float8_scale
from ...ir.ops.integer import integer_linear, integer_matmul
from ...ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from ...ir.ops.quantize import dequantize, expand_int4, int4_linear, int8_linear, int8_weight_linear
from ...ir.ops.sparse import sparse24_linear
from ...ir.ops.table import OPERATORS
from .lowerings.attentions import WRITTEN
from .lowerings.products import PRODUCTS
from .lowerings.table import KERNELS, POINTWISE, VALUES
from .sizes import Sizes

aten = torch.ops.aten
HERE = (add_layer_norm, add_rms_norm, int8_linear, integer_linear)  # written anew below
BIASED = (
    aten.linear.default, aten.addmm.default, aten.baddbmm.default, integer_linear, int4_linear, int8_weight_linear,
    sparse24_linear,
)  # fmt: skip
FEW_ROWS = 64  # up to which a product takes as long as its weight takes to be read
DEPTH = 4  # references that call operators of ours in turn


def prepare(program: Program) -> Program:
    """The program in the operators of this backend's table; the one that is given stays as it is."""
    found = program.copy()
    expand(found)
    _float8_linears(found)
    for node in found.calls(expand_int4):
        if any(part.op != "get_attr" for part in node.all_input_nodes):
            continue  # no weight: unpacked as its reference says
        name = str(node.args[0].target).replace("packed", "integers")  # type: ignore[union-attr]
        found.replace(node, found.add_weight(name, found.computed(node), trainable=False))
    for _ in range(DEPTH):
        foreign = [node for node in found.graph.nodes if node.target in OPERATORS and not _known(node)]
        for node in foreign:
            inline(found, node, WRITTEN.get(node.target))
    for node in found.calls(aten.einsum.default):
        inline(found, node)
    for node in found.calls(integer_matmul):
        if dtype(node.args[0]) != torch.int8:
            _wide_integers(found, node)
    for node in found.calls(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        _slices(found, node)
    for node in found.calls(add_layer_norm, add_rms_norm):
        _norm(found, node)
    for node in found.calls(int8_linear):
        _int8_linear(found, node)
    _weights_of_8_bits(found)
    for node in found.calls(*BIASED):
        _bias(found, node)
    for node in found.calls(aten.unbind.int):
        _unbind(found, node)
    found.clean()
    return found


def _known(node: fx.Node) -> bool:
    """Whether there is a lowering of an operator of ours; others are what their references call."""
    target: Any = node.target
    if target in KERNELS:
        return dtype(next(iter(arguments(node).values()))) != torch.float64  # no kernel of ours multiplies doubles
    return target in HERE or any(target in table for table in (POINTWISE, VALUES, PRODUCTS))


def _norm(program: Program, node: fx.Node) -> None:
    """before: (%norm, %sum) = add_layer_norm(%x, %y, ...);  after: %sum = add(%x, %y);  %norm = norm(%sum, ...)"""
    given = arguments(node)
    total = program.call(aten.add.Tensor, given["input"], given["residual"], before=node)
    if node.target is add_rms_norm:
        normed = program.call(rms_norm, total, given["weight"], given["eps"], before=node)
    else:
        size = [shape(total)[-1]]
        normed = program.call(
            aten.layer_norm.default, total, size, given["weight"], given["bias"], given["eps"], before=node
        )
    for part in list(node.users):
        program.replace(part, total if part.args[1] else normed)


def _bias(program: Program, node: fx.Node) -> None:
    """before: %y = linear(%x, @w, @b);  after: %y = add(linear(%x, @w), @b)"""
    given = arguments(node)
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        plain = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
        new = program.call(plain, *(given[name] for name in list(given)[1:3]), before=node)
        if given["alpha"] != 1:
            new = program.call(aten.mul.Scalar, new, given["alpha"], before=node)
        if given["beta"] != 0:
            new = program.call(aten.add.Tensor, new, given["self"], alpha=given["beta"], before=node)
    elif given["bias"] is None:
        return
    else:
        new = program.call(node.target, **{**given, "bias": None}, before=node)  # type: ignore[arg-type]
        new = program.call(aten.add.Tensor, new, given["bias"], before=node)
    program.replace(node, new)


def _int8_linear(program: Program, node: fx.Node) -> None:
    """The product of the integers as they are stored; what the zero point adds to it is known for each channel."""
    given = arguments(node)
    narrow = dtype(given["scale"])
    wide = torch.promote_types(narrow, torch.float32)

    def call(target: Any, *args: Any, **options: Any) -> fx.Node:
        return program.call(target, *args, before=node, **options)

    sums = call(integer_linear, given["input"], given["weight"], None)
    if given["zero_point"] is not None:
        shift = call(aten._to_copy.default, given["zero_point"], dtype=torch.int32)
        rows = _sums(program, node, given["weight"])
        sums = call(aten.sub.Tensor, sums, call(aten.mul.Tensor, shift, rows))
    scale = given["scale"] if narrow == wide else call(aten._to_copy.default, given["scale"], dtype=wide)
    channel = call(aten.squeeze.dim, given["weight_scale"], -1)
    channel = channel if dtype(channel) == wide else call(aten._to_copy.default, channel, dtype=wide)
    found = call(aten._to_copy.default, sums, dtype=wide)
    found = call(aten.mul.Tensor, found, call(aten.mul.Tensor, scale, channel))
    if given["bias"] is not None:
        found = call(aten.add.Tensor, found, given["bias"])
    if dtype(found) != narrow:
        found = call(aten._to_copy.default, found, dtype=narrow)
    program.replace(node, found)


def _weights_of_8_bits(program: Program) -> None:
    """A product of few rows at the example's sizes reads integers: as floats they would be written and read again.

    before:  %y = aten.linear(%x, dequantize(@integers, @scale, @zero_point), @b)
    after:   %y = int8_weight_linear(%x, @integers, @scale, @zero_point, @b)
    """
    sizes = Sizes(program)
    for node in program.calls(aten.linear.default):
        given = arguments(node)
        if given["weight"].target is not dequantize or sizes.hints(sizes.shape(given["input"])[:-1]) > FEW_ROWS:
            continue
        parts = arguments(given["weight"])
        stored = all(part is None or (part.op == "get_attr" and len(shape(part)) == 2) for part in parts.values())
        if not stored or dtype(parts["input"]) != torch.int8 or dtype(given["input"]) == torch.float64:
            continue
        operands = (parts["input"], parts["scale"], parts["zero_point"], given["bias"])
        program.replace(node, program.call(int8_weight_linear, given["input"], *operands, before=node))


def _sums(program: Program, node: fx.Node, weight: fx.Node) -> fx.Node:
    """The sums of a weight's rows; of one that is stored, computed here: a run would read it twice."""
    if weight.op == "get_attr":
        found = program.tensor(weight).sum(1, dtype=torch.int32)
        return program.add_weight(f"{weight.target}_sums", found, trainable=False)
    return program.call(aten.sum.dim_IntList, weight, [1], before=node, dtype=torch.int32)


def _float8_linears(program: Program) -> None:
    """Inputs of float8_e4m3 are stored once for all that multiply them; scales of theirs are applied to the sums.

    before:  %y = float8_linear(%x, @w, @s, @b, True)
    after:   %r = float8_scale(%x);  %q = to(float8_quantize(%x, %r), float8);
             %y = add(mul(float8_products(%q, @w), mul(%r, @s)), @b)
    """
    stored: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in program.calls(float8_linear):
        given, narrow = arguments(node), dtype(node)
        if narrow == torch.float64:
            inline(program, node)
            continue

        def call(target: Any, *args: Any, before: fx.Node = node, **options: Any) -> fx.Node:
            return program.call(target, *args, before=before, **options)

        x, weight, scale = given["input"], given["weight"], given["weight_scale"]
        if given["quantize_input"]:
            if x not in stored:
                wide = x if narrow == torch.float32 else call(aten._to_copy.default, x, dtype=torch.float32)
                rows = call(float8_scale, wide)
                stored[x] = rows, call(aten._to_copy.default, call(float8_quantize, wide, rows), dtype=FLOAT8)
            rows, numbers = stored[x]
            found = call(float8_products, numbers, weight)
            found = call(aten.mul.Tensor, found, call(aten.mul.Tensor, rows, scale))
        elif given["bias"] is None:
            continue
        else:
            found = call(float8_linear, x, weight, scale)
        if given["bias"] is not None:
            found = call(aten.add.Tensor, found, given["bias"])
        if dtype(found) != narrow:
            found = call(aten._to_copy.default, found, dtype=narrow)
        program.replace(node, found)


def _wide_integers(program: Program, node: fx.Node) -> None:
    """Products of probabilities, int32, as sums along an axis: no matrix unit multiplies them."""
    given = arguments(node)
    left = program.call(aten.unsqueeze.default, given["input"], -1, before=node)
    right = program.call(aten.unsqueeze.default, given["other"], -3, before=node)
    each = program.call(aten.mul.Tensor, left, right, before=node)
    program.replace(node, program.call(aten.sum.dim_IntList, each, [-2], dtype=torch.int32, before=node))


def _slices(program: Program, node: fx.Node) -> None:
    """before: %a, %b = chunk(%x, 2, -1);  after: %a = slice(%x, -1, 0, 4);  %b = slice(%x, -1, 4, 8)"""
    given = arguments(node)
    axis = given["dim"] % len(shape(given["self"]))
    sizes = [part.shape[axis] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return
    for part in list(node.users):
        place: Any = part.args[1]
        start = sum(sizes[:place])
        end = start + sizes[place]
        program.replace(part, program.call(aten.slice.Tensor, given["self"], axis, start, end, before=part))


def _unbind(program: Program, node: fx.Node) -> None:
    """before: %a, %b = unbind(%x, 1);  after: %a = select(%x, 1, 0);  %b = select(%x, 1, 1)"""
    given = arguments(node)
    for part in list(node.users):
        program.replace(part, program.call(aten.select.int, given["self"], given["dim"], part.args[1], before=part))
