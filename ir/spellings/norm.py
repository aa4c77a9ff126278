"""Norms written out, one step a rule: the normalisation itself, then its weight, bias and casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import pattern as p
from ..graph import Program, arguments, dtype, same_sizes, shape
from ..ops.norm import rms_norm
from ..pattern import Match, Refusal, Rule

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def _maybe_cast(inner: Any) -> p.OneOf:
    """T5 squares x in fp32, but multiplies x itself."""
    return p.OneOf(inner, p.Call(aten._to_copy.default, shared=True, self=inner, dtype=p.Any("wide")))


def _divided(numerator: Any, square: Any) -> p.OneOf:
    """numerator / sqrt(square + eps), however it is spelled; `square` may also be the root itself, then refused."""
    spread = p.Call(aten.add.Tensor, self=square, other=p.Literal("eps"))
    root = p.Call(aten.sqrt.default, anchor=True, self=spread)
    reciprocal = p.Call(aten.reciprocal.default, self=root)
    inverse = p.OneOf(
        p.Call(aten.rsqrt.default, anchor=True, self=spread),
        reciprocal,
        p.Call(aten.mul.Tensor, self=reciprocal, other=p.OneOf(1, 1.0)),  # torch's 1 / root
        p.Call(aten.pow.Tensor_Scalar, self=spread, exponent=-0.5),
    )
    outside = p.Call(
        aten.add.Tensor, name="outside", self=p.Call(aten.sqrt.default, self=square), other=p.Literal("eps")
    )
    return p.OneOf(
        p.Call(aten.mul.Tensor, name="scaled", commutative=True, self=inverse, other=numerator),
        p.Call(aten.div.Tensor, name="scaled", self=numerator, other=root),
        p.Call(aten.div.Tensor, name="scaled", self=numerator, other=outside),
    )


def _mean(value: Any, axes: str) -> p.Call:
    return p.Call(aten.mean.dim, shared=True, self=value, dim=p.Literal(axes), keepdim=True)


_X = _maybe_cast(p.Any("x"))
_CENTRED = p.Call(aten.sub.Tensor, self=_X, other=_mean(_X, "mean_axes"))
_SQUARE = p.Call(aten.mul.Tensor, name="square", self=_X, other=_X)
_VARIANCE = p.OneOf(
    p.Call(aten.var.correction, name="square", self=_X, dim=p.Literal("axes"), correction=p.Literal("correction"),
           keepdim=True),
    p.Call(aten.var.dim, name="square", self=_X, dim=p.Literal("axes"), unbiased=p.Literal("correction"),
           keepdim=True),
)  # fmt: skip


def _is_last(axes: Any, node: Any) -> bool:
    rank = len(shape(node))
    return isinstance(axes, list | tuple) and [axis % rank for axis in axes] == [rank - 1]


def _norm_condition(found: Match) -> Any:
    """The dtype in which the norm is computed."""
    source, scaled = found["x"], found["scaled"]
    if found.get("outside") is not None:
        return Refusal("eps is added outside of the square root")
    if not _is_last(found["axes"], source):
        return Refusal("the mean is not over the last axis alone")
    if found.get("correction", 0) not in (0, False):
        return Refusal("the variance is not divided by the number of elements")
    if not _is_last(found.get("mean_axes", [-1]), source):
        return Refusal("the mean that is subtracted is not over the last axis alone")
    if not same_sizes(shape(scaled), shape(source)):
        return Refusal("the input broadcasts")
    if dtype(scaled) in _HALF or dtype(found["square"]) != dtype(scaled):
        return Refusal("half precision that is not normalised in fp32")
    if torch.finfo(dtype(scaled)).bits < torch.finfo(dtype(source)).bits:
        return Refusal("a cast that narrows the input")
    return dtype(scaled)


def _widened(program: Program, source: Any, wide: torch.dtype, before: fx.Node) -> fx.Node:
    if dtype(source) == wide:
        return source  # type: ignore[no-any-return]
    return program.call(aten._to_copy.default, source, dtype=wide, before=before)


def _rms_norm_replace(program: Program, found: Match, wide: Any) -> None:
    source = _widened(program, found["x"], wide, found.root)
    program.replace(found.root, program.call(rms_norm, source, None, float(found["eps"]), before=found.root))


def _layer_norm_condition(found: Match) -> Any:
    if not isinstance(shape(found["x"])[-1], int):
        return Refusal("the size of the last axis varies")
    return _norm_condition(found)


def _layer_norm_replace(program: Program, found: Match, wide: Any) -> None:
    source = _widened(program, found["x"], wide, found.root)
    sizes, eps = [shape(source)[-1]], float(found["eps"])
    new = program.call(aten.layer_norm.default, source, sizes, found.get("weight"), None, eps, before=found.root)
    program.replace(found.root, new)


# --- RMSNorm of what is centred is LayerNorm -------------------------------------------------------------------


def _centred_condition(found: Match) -> Any:
    if not isinstance(shape(found["x"])[-1], int):
        return Refusal("the size of the last axis varies")
    if not _is_last(found["mean_axes"], found["x"]):
        return Refusal("the mean that is subtracted is not over the last axis alone")
    if dtype(found["x"]) in _HALF or dtype(found.root) != dtype(found["x"]):
        return Refusal("the mean is subtracted in half precision")
    return dtype(found["x"])


_OF_CENTRED = p.Call(
    rms_norm,
    input=p.Call(aten.sub.Tensor, shared=True, self=p.Any("x"), other=_mean(p.Any("x"), "mean_axes"), anchor=True),
    weight=p.Any("weight"),
    eps=p.Literal("eps"),
)


# --- torch's own operator --------------------------------------------------------------------------------------

_TORCH = p.Call(
    aten.rms_norm.default, input=p.Any("x"), normalized_shape=p.Literal("sizes"), weight=p.Any("weight"),
    eps=p.Literal("eps"),
)  # fmt: skip


def _torch_condition(found: Match) -> Any:
    """The eps; torch's default is that of the dtype that it computes in."""
    if len(found["sizes"]) != 1:
        return Refusal(f"the norm is over {len(found['sizes'])} axes")
    weight, kind = found["weight"], dtype(found["x"])
    if weight is not None and dtype(weight) != kind:
        return Refusal("input and weight differ in dtype")
    if found["eps"] is None and kind in _HALF:
        return Refusal("the default eps in half precision differs between devices")
    return float(torch.finfo(kind).eps if found["eps"] is None else found["eps"])


def _torch_replace(program: Program, found: Match, eps: Any) -> None:
    """torch scales before it rounds half precision, as `rms_norm` does with a weight in fp32."""
    weight = found["weight"]
    if weight is not None and dtype(weight) in _HALF:
        weight = program.call(aten._to_copy.default, weight, dtype=torch.float32, before=found.root)
    program.replace(found.root, program.call(rms_norm, found["x"], weight, eps, before=found.root))


# --- weight, bias and rounding ---------------------------------------------------------------------------------


def _is_call(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def _operands(node: fx.Node) -> Any:
    """A binary call's operands in both orders."""
    first, second = node.args[:2]
    return ((first, second), (second, first))


def _affine(node: fx.Node, target: Any, place: str, norms: tuple[Any, ...]) -> Match | Refusal | None:
    """`node` is a norm, so far without `place` (weight or bias), combined with a vector over the last axis."""
    if not _is_call(node, target) or node.kwargs:
        return None
    for norm, vector in _operands(node):
        if not _is_call(norm, *norms) or not isinstance(vector, fx.Node) or arguments(norm)[place] is not None:
            continue
        if len(shape(vector)) != 1:
            continue
        if not same_sizes(shape(vector), shape(norm)[-1:]):
            return Refusal(f"the {place}'s shape {list(shape(vector))} is not that of the last axis")
        if norm.target is aten.layer_norm.default and len(arguments(norm)["normalized_shape"]) != 1:
            return Refusal("the norm is over several axes")
        if dtype(node) != dtype(norm) or not (dtype(vector) == dtype(norm) or dtype(vector) in _HALF):
            return Refusal(f"the norm and its {place} differ in dtype")
        if norm.target is aten.layer_norm.default and dtype(norm) in _HALF:
            return Refusal(f"layer_norm rounds half precision after its {place}, not before")
        nodes = frozenset((node, norm))
        leaked = p.leak(nodes, node)
        return Refusal(leaked) if leaked else Match(node, {"norm": norm, "vector": vector}, nodes)
    return None


def _weighted(node: fx.Node) -> Match | Refusal | None:
    found = _affine(node, aten.mul.Tensor, "weight", (rms_norm, aten.layer_norm.default))
    if isinstance(found, Match) and arguments(found["norm"]).get("bias") is not None:
        return Refusal("the weight scales the bias too")
    return found


def _biased(node: fx.Node) -> Match | Refusal | None:
    return _affine(node, aten.add.Tensor, "bias", (aten.layer_norm.default,))


def _with(place: str) -> Any:
    def replace(program: Program, found: Match, _: Any) -> None:
        vector = _widened(program, found["vector"], dtype(found["norm"]), found.root)
        given = arguments(found["norm"]) | {place: vector}
        given.pop("cudnn_enable", None)
        program.replace(found.root, program.call(found["norm"].target, *given.values(), before=found.root))

    return replace


_ROUNDED = p.Call(
    aten._to_copy.default,
    dtype=p.Literal("narrow"),
    self=p.Call(
        rms_norm,
        anchor=True,
        input=p.Call(aten._to_copy.default, shared=True, self=p.Any("x"), dtype=p.Literal("wide")),
        weight=p.Any("weight"),
        eps=p.Literal("eps"),
    ),
)


def _rounded_condition(found: Match) -> Any:
    if found["wide"] is not torch.float32 or not dtype(found["x"]) == found["narrow"] != torch.float32:
        return Refusal("the norm is not rounded to the input's dtype")
    if found["narrow"] not in _HALF:
        return Refusal("a cast that changes the precision of the computation")
    return True


def _rounded_replace(program: Program, found: Match, _: Any) -> None:
    new = program.call(rms_norm, found["x"], found["weight"], found["eps"], before=found.root)
    program.replace(found.root, new)


def _always(_: Match) -> bool:
    return True


RULES = (
    Rule("rms_norm", _divided(_X, _mean(_SQUARE, "axes")), _norm_condition, _rms_norm_replace),
    Rule("rms_norm", _TORCH, _torch_condition, _torch_replace),
    Rule("layer_norm", _divided(_CENTRED, _VARIANCE), _layer_norm_condition, _layer_norm_replace),
    Rule("layer_norm", _OF_CENTRED, _centred_condition, _layer_norm_replace),
    Rule("norm_weight", _weighted, _always, _with("weight")),
    Rule("norm_bias", _biased, _always, _with("bias")),
    Rule("norm_rounding", _ROUNDED, _rounded_condition, _rounded_replace),
)
