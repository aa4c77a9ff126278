"""Norms written out."""

from __future__ import annotations

from typing import Any

import torch

from .. import pattern as p
from ..graph import Program, dtype, same_sizes, shape
from ..ops.norm import rms_norm
from ..pattern import Match, Refusal, Rule

aten = torch.ops.aten


def _maybe_cast(inner: Any, name: str) -> p.OneOf:
    return p.optional(lambda value: p.Call(aten._to_copy.default, self=value, dtype=p.Literal(name)), inner)


def _rms_norm_pattern() -> p.Call:
    wide = _maybe_cast(p.Any("x"), "wide")
    power = p.Call(aten.pow.Tensor_Scalar, name="power", self=wide, exponent=p.Literal("exponent"))
    mean = p.Call(aten.mean.dim, self=power, dim=p.Literal("axes"), keepdim=True)
    spread = p.Call(aten.add.Tensor, self=mean, other=p.Literal("eps"))
    scaled = p.Call(
        aten.mul.Tensor, name="scaled", commutative=True, self=wide, other=p.Call(aten.rsqrt.default, self=spread)
    )
    return p.Call(aten.mul.Tensor, commutative=True, self=p.Weight("weight"), other=_maybe_cast(scaled, "narrow"))


def _rms_norm_condition(found: Match) -> Any:
    source = found["x"]
    rank = len(shape(source))
    if found["exponent"] != 2 or [axis % rank for axis in found["axes"]] != [rank - 1]:
        return Refusal("the mean is not that of squares over the last axis")
    if not same_sizes(shape(found["weight"]), shape(source)[-1:]) or not same_sizes(shape(found.root), shape(source)):
        return Refusal(f"the weight's shape {list(shape(found['weight']))} is not that of the last axis")
    half = dtype(source) in (torch.float16, torch.bfloat16)
    in_fp32 = dtype(found["power"]) is dtype(found["scaled"]) is torch.float32
    if half and not (in_fp32 and found.get("narrow") is dtype(source)):
        return Refusal("half precision that is not normalised in fp32 and rounded before the weight")
    if dtype(found["weight"]) != dtype(source) or dtype(found.root) != dtype(source):
        return Refusal("input, weight and result differ in dtype")
    if not half and (found.get("wide") or found.get("narrow")):
        return Refusal("a cast that changes the precision of the computation")
    return float(found["eps"])


def _rms_norm_replace(program: Program, found: Match, eps: Any) -> None:
    program.replace(found.root, program.call(rms_norm, found["x"], found["weight"], eps, before=found.root))


RULES = (Rule("rms_norm", _rms_norm_pattern(), _rms_norm_condition, _rms_norm_replace),)
