"""Which linear layers read their 2:4 sparse weight compressed: those that get faster by it, by the roofline.

A product of few rows takes as long as its weight takes to be read. Of a weight of 16 bits a compressed one is 9/16 of
the bytes, but its numbers have to be put in their places: 12 instructions for four, once for each tile of rows, while
the next ones are loaded. From data sheets, in picoseconds for a number of the weight:

                                                        A100    H100    B200
    read (2 bytes at 1.9, 3.35, 8 TB/s)                 1.05    0.60    0.25
    read compressed                                     0.59    0.34    0.14
    expand (64 instructions a clock, multiprocessor)    0.31    0.21    0.17

So it pays everywhere for one tile of rows, FEW_ROWS of kernels/sparse24_matmul.py, and not everywhere for two. From a
few hundred rows on arithmetic is what takes the time, of which these kernels spare nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ...ir.graph import Program, arguments
from ...ir.ops.integer import integer_linear
from ...ir.ops.quantize import dequantize, int8_weight_linear
from ...ir.ops.sparse import pack_sparse24, sparse24_linear, sparse24_misfit
from ...kernels.sparse24_matmul import FEW_ROWS
from .sizes import Sizes, text

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
COUNTED = (*HALF, torch.float32, torch.float64, torch.int8)
LEAST = 2**19  # bytes that must be saved: a quarter of a microsecond of an A100's memory, what launches vary by


def compress(program: Program, least: int = LEAST) -> list[dict[str, Any]]:
    """Compress the 2:4 sparse weights of a prepared program where that pays.

    A product whose rows may be few or many keeps the dense weight beside the compressed one, and the launch chooses.

        before:  %y = aten.linear(%x, @w)
        after:   %y = fxpress.sparse24_linear(%x, @w_values, @w_positions, None)

    Returns:
        For the report, of each weight half of whose numbers or more are zero: the operator, what became of it and why,
        and of how many alike.
    """
    sizes = Sizes(program)
    found: dict[tuple[str, str], int] = {}
    for node in program.calls(aten.linear.default, integer_linear, int8_weight_linear):
        given = arguments(node)
        weight = _stored(given["weight"])
        if weight is None or not _is_half_zero(program.tensor(weight)):
            continue
        rows = sizes.shape(given["input"])[:-1]
        chosen = _refused(program, sizes, node, weight, rows, least) or _compressed(program, sizes, node, weight, rows)
        width, depth = program.tensor(weight).shape
        title = f"linear [{text(math.prod(rows, start=sympy.Integer(1)))}, {depth}] x [{width}, {depth}]"
        found[title, chosen] = found.get((title, chosen), 0) + 1
    program.clean()
    return [
        {"operator": title, "sizes": title, "chosen": chosen, "milliseconds": {}, "nodes": count}
        for (title, chosen), count in found.items()
    ]


def _stored(weight: Any) -> fx.Node | None:
    """The tensor that a product's weight is read from, itself or quantized."""
    if isinstance(weight, fx.Node) and weight.target is dequantize:
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return weight if weight.meta["val"].dim() == 2 and weight.meta["val"].dtype in COUNTED else None


def _is_half_zero(weight: torch.Tensor) -> bool:
    return weight.numel() > 0 and 2 * int(weight.count_nonzero()) <= weight.numel()


def _refused(
    program: Program, sizes: Sizes, node: fx.Node, weight: fx.Node, rows: Sequence[sympy.Expr], least: int
) -> str | None:
    """Why a product reads its weight as it is; None: it is better compressed."""
    numbers = program.tensor(weight).detach()
    misfit = sparse24_misfit(numbers)
    if misfit is not None:
        return f"dense: not 2:4, {misfit}"
    if node.target is not aten.linear.default or arguments(node)["weight"] is not weight:
        return "dense: its weight is quantized, of so few bytes that to expand them takes as long as to read them"
    if numbers.dtype not in HALF:
        name = str(numbers.dtype).removeprefix("torch.")
        return f"dense: products of {name} have no tensor cores in full precision, arithmetic is what takes the time"
    if len(weight.users) > 1:
        return "dense: others read the weight, too, and it would be there twice"
    saved = numbers.numel() * numbers.element_size() - sum(
        part.numel() * part.element_size() for part in pack_sparse24(numbers)
    )
    if saved < least:
        return f"dense: {saved / 1e6:.2f} MB less to read, what pays begins at {least / 1e6:.2f} MB"
    shown = sizes.hints(rows)
    if shown > FEW_ROWS:
        return f"dense: {shown} rows at the example's sizes, beyond {FEW_ROWS} arithmetic is what takes the time"
    return None


def _compressed(program: Program, sizes: Sizes, node: fx.Node, weight: fx.Node, rows: Sequence[sympy.Expr]) -> str:
    """Compress the weight of a product."""
    given, numbers = arguments(node), program.tensor(weight).detach()
    bounds = [sizes.bound(size, program.signature.ranges) for size in rows]
    always = None not in bounds and math.prod(bounds) <= FEW_ROWS  # type: ignore[arg-type]
    parts = [
        program.add_weight(f"{weight.target}_{name}", part, trainable=False)
        for name, part in zip(("values", "positions"), pack_sparse24(numbers), strict=True)
    ]
    new = program.call(
        sparse24_linear, given["input"], *parts, given["bias"], *([] if always else [weight]), before=node
    )
    program.replace(node, new)
    stored = sum(program.tensor(part).numel() * program.tensor(part).element_size() for part in parts)
    share = stored / (numbers.numel() * numbers.element_size())
    said = f"sparse24_linear: {share:.0%} of the weight's bytes"
    return said if always else f"{said} up to {FEW_ROWS} rows, beyond the dense weight"
