"""Attention: torch's own operator, and its parts written out (`scores.py` reads those)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import pattern as p
from ..graph import Program, arguments, dtype, same_sizes, shape
from ..ops.attention import ABSORBING, attention, wide
from ..pattern import Match, Refusal, Rule
from .magnitude import magnitude
from .numbers import number
from .scores import Reading, Term, find

aten = torch.ops.aten


# --- torch's operator ------------------------------------------------------------------------------------------


def _sdpa_condition(found: Match) -> Any:
    if found["dropout_p"] != 0:
        return Refusal(f"dropout {found['dropout_p']} on the attention weights")
    mask, query = found["mask"], found["query"]
    if mask is not None and dtype(mask) not in (torch.bool, dtype(query), wide(dtype(query))):
        return Refusal(f"a mask of dtype {dtype(mask)}")
    scores = (*shape(found.root)[:-1], shape(found["key"])[-2])
    terms = [Term(mask, scores, fill=-math.inf if dtype(mask) is torch.bool else None)] if mask is not None else []
    reading = Reading(query, found["key"], found["value"], scores, scale=found["scale"], terms=terms, safe=True)
    reading.right = 0 if found["is_causal"] else None
    return _plan(reading, found.root)


SDPA = Rule(
    "attention",
    p.Call(
        aten.scaled_dot_product_attention.default,
        query=p.Any("query"),
        key=p.Any("key"),
        value=p.Any("value"),
        attn_mask=p.Any("mask"),
        dropout_p=p.Literal("dropout_p"),
        is_causal=p.Literal("is_causal"),
        scale=p.Literal("scale"),
        enable_gqa=p.Literal("enable_gqa"),
    ),
    _sdpa_condition,
    lambda program, found, plan: _replace(program, found, plan),
)


# --- what is read -> one operator ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How an attention of any rank becomes one over [batch, heads, length, size].

    Leading axes become two by reshaping: [B * H, N, D] with H heads, [B, G, R, N, D] with G key heads for R query
    heads each, [A, B, H, N, D] with a batch of A * B; where there are none, both are 1.
    """

    reading: Reading
    batch: Any
    heads: Any
    groups: Any


def _plan(reading: Reading, root: fx.Node) -> _Plan | Refusal:
    if not all(isinstance(item, fx.Node) for item in (reading.query, reading.key, reading.value)):
        return Refusal("query, key and value must be tensors")
    lead = reading.product[:-2]
    if len(lead) > 3:
        return Refusal(f"scores of rank {len(reading.product)}, expected at most 5")
    shared = all(same_sizes(shape(item)[2:-2], [1]) for item in (reading.key, reading.value))
    grouped = len(lead) == 3 and shared and not same_sizes(lead[2:], [1])
    if len(lead) == 3:
        batch, heads = (lead[0], lead[1] * lead[2]) if grouped else (lead[0] * lead[1], lead[2])
    elif len(lead) == 2:
        batch, heads = lead
    else:
        heads = _heads(reading) if lead else 1
        batch = lead[0] // heads if lead else 1
    groups = lead[1] if grouped else _groups(reading, heads)
    plan = _Plan(reading, batch, heads, groups)
    reason = _dtype_problem(reading) or _shape_problem(plan, grouped) or _size_problem(plan, root)
    reason = reason or _mask_problem(reading)
    return Refusal(reason) if reason else plan


def _shape_problem(plan: _Plan, grouped: bool) -> str | None:
    """Operands may broadcast as matmul lets them where there are two leading axes; all others are reshaped."""
    reading, heads = plan.reading, plan.heads
    lead = reading.product[:-2]
    for name, item in (("query", reading.query), ("key", reading.key), ("value", reading.value)):
        own = shape(item)[:-2]
        fits = same_sizes(own, lead) or (grouped and same_sizes(own, (*lead[:2], 1)) and name != "query")
        if len(lead) == 2:
            fits = len(own) < 2 or (len(own) == 2 and (same_sizes(own[:1], [1]) or same_sizes(own[:1], lead[:1])))
        if not fits and not (name == "value" and same_sizes(own, (plan.batch, heads))):
            return f"a {name} of shape {list(shape(item))} for scores of shape {list(reading.product)}"
    if plan.groups is None:
        counts = (shape(item)[:-2][-1:] or (1,) for item in (reading.key, reading.value))
        return f"{' and '.join(str(count[0]) for count in counts)} key and value heads for {heads} query heads"
    if reading.sinks is not None and not same_sizes(shape(reading.sinks), [heads]):
        return f"sinks {list(shape(reading.sinks))} for {heads} heads"
    return None


def _size_problem(plan: _Plan, root: fx.Node) -> str | None:
    """Reshaping and expanding needs every size as a number or as the size of some tensor."""
    reading = plan.reading
    lead = reading.product[:-2]
    if not isinstance(plan.heads, int) and (len(lead) != 2 or any(len(term.at) > 4 for term in reading.terms)):
        return "the number of heads is not fixed"
    sizes = [*shape(root), *lead, *(size for term in reading.terms for size in term.at[:-2])]
    unknown = [size for size in sizes if not isinstance(size, int) and _owner(size, root, reading) is None]
    return f"the size {unknown[0]} is that of no input" if unknown else None


def _mask_problem(reading: Reading) -> str | None:
    """Why several masks are not one. What a row gives that is masked throughout depends on the values they leave."""
    fills = {term.fill for term in reading.terms if term.fill is not None}
    added = [index for index, term in enumerate(reading.terms) if term.fill is None]
    if reading.sinks is not None or not fills or fills == {-math.inf}:
        return None
    if len(fills) > 1:
        return f"masks fill with different values: {sorted(fills)}"
    if not added:
        return None
    first = next(index for index, term in enumerate(reading.terms) if term.fill is not None)
    fill = max(fills)
    if added[-1] > first and fill > ABSORBING:
        return f"a bias is added to scores that are filled with {fill:g}"
    biases = [reading.terms[index] for index in added]
    if fill > ABSORBING and sum(magnitude(term.tensor, True) * abs(term.factor) for term in biases) > -fill / 2:
        return f"a bias that may itself be as low as {fill:g}, with which scores are filled"
    return "a bias and a finite fill in float16" if dtype(reading.value) is torch.float16 else None


def _dtype_problem(reading: Reading) -> str | None:
    """The operator computes in fp32 anyway: half-precision queries and keys may be upcast before their product, and
    masks be in fp32."""
    wanted = dtype(reading.value)
    if not wanted.is_floating_point:
        return f"a value of dtype {wanted}"
    for name, item in (("query", reading.query), ("key", reading.key)):
        if dtype(item) is not wanted and not _is_upcast(item, wanted):
            return f"a {name} of dtype {dtype(item)} and a value of dtype {wanted}"
    for term in reading.terms:
        if dtype(term.tensor) not in (torch.bool, wanted, wide(wanted)) and not _is_upcast(term.tensor, wanted):
            return f"a mask of dtype {dtype(term.tensor)} and a value of dtype {wanted}"
    return None


_LAYOUT = (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default)


def _is_upcast(node: Any, narrow: torch.dtype) -> bool:
    while isinstance(node, fx.Node) and node.target in _LAYOUT:
        node = node.args[0]
    cast = isinstance(node, fx.Node) and node.target is aten._to_copy.default
    return cast and dtype(node) is torch.float32 and dtype(node.args[0]) is narrow


def _heads(reading: Reading) -> Any:
    """The heads of [B * H, N, D]: from the scores seen as [B, H, N, M], or from the query's [B, H, N, D]; else 1."""
    if isinstance(reading.heads, int):
        return reading.heads
    node = reading.query
    while isinstance(node, fx.Node) and node.target in (aten.reshape.default, aten.mul.Tensor, aten.div.Tensor):
        before = shape(node.args[0])
        if len(before) == 4 and same_sizes(before[2:], shape(node)[1:]) and isinstance(before[1], int):
            return before[1]
        node = node.args[0]
    return 1


def _groups(reading: Reading, heads: Any) -> Any:
    """The number of key heads, of which each serves as many query heads; None if there is no such number."""
    first, second = (
        heads if len(reading.product) != 4 else (shape(item)[:-2] or (1,))[-1] for item in (reading.key, reading.value)
    )
    whole = [same_sizes([count], [heads]) for count in (first, second)]
    if all(whole) or not same_sizes([first], [second]):
        single = [same_sizes([count], [1]) for count in (first, second)]
        return heads if all(a or b for a, b in zip(whole, single, strict=True)) else None
    divides = isinstance(heads, int) and isinstance(first, int) and first > 0 and heads % first == 0
    return first if divides else None


def _replace(program: Program, found: Match, plan: _Plan) -> None:
    emit = _Emit(program, found.root, plan)
    new = emit.attention()
    program.replace(found.root, new)
    for node in sorted(found.nodes - {found.root}, key=list(program.graph.nodes).index, reverse=True):
        if not node.users:
            program.graph.erase_node(node)


class _Emit:
    """Writes the operator and what leads to and from it before the root of a match."""

    def __init__(self, program: Program, root: fx.Node, plan: _Plan) -> None:
        self.program, self.root, self.plan, self.reading = program, root, plan, plan.reading

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.call(target, *args, before=self.root, **kwargs)

    def attention(self) -> fx.Node:
        reading, plan = self.reading, self.plan
        query, key = reading.query, reading.key
        if reading.multiplier is not None:
            query = self.call(aten.mul.Tensor, query, reading.multiplier)
        if reading.transposed:
            key = self.call(aten.transpose.int, key, -2, -1)
        upcast = dtype(query) is not dtype(reading.value)
        if upcast:
            query, key = (self.call(aten._to_copy.default, item, dtype=dtype(reading.value)) for item in (query, key))
        options: dict[str, Any] = {"bias": self.bias(), "right": reading.right, "scale": reading.scale}
        options |= {"softcap": reading.softcap or None, "sinks": reading.sinks, "empty": self.empty()}
        value = reading.value
        new = self.call(
            attention,
            self.operand(query, plan.heads, True),
            self.operand(key, plan.groups, False),
            self.operand(value, plan.groups, False),
            **{name: option for name, option in options.items() if option is not None},
        )
        return self.result(new)

    def operand(self, item: fx.Node, heads: Any, is_query: bool) -> fx.Node:
        """[..., N, D] -> [batch, heads, N, D]."""
        rank = len(shape(item))
        if rank == 3 and len(self.reading.product) != 3:
            item, rank = self.call(aten.unsqueeze.default, item, 0), 4
        if rank == 2 and len(self.reading.product) != 2:
            item, rank = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, item, 0), 0), 4
        wanted = (self.plan.batch, heads)
        if rank != 4:
            return self.reshaped(item, wanted)
        if same_sizes(shape(item)[:2], wanted):
            return item
        return self.call(aten.expand.default, item, [*map(self.size, wanted), -1, -1])

    def reshaped(self, item: fx.Node, lead: tuple[Any, Any]) -> fx.Node:
        batch, heads = lead
        rows = [size if isinstance(size, int) else self.call(aten.sym_size.int, item, axis)
                for axis, size in zip((-2, -1), shape(item)[-2:], strict=True)]  # fmt: skip
        return self.call(aten.reshape.default, item, [batch if isinstance(batch, int) else -1, heads, *rows])

    def size(self, value: Any) -> Any:
        """A size as an argument: a number, or the call that gives it."""
        owner = None if isinstance(value, int) else _owner(value, self.root, self.reading)
        return self.call(aten.sym_size.int, *owner) if owner else value

    def result(self, new: fx.Node) -> fx.Node:
        """[batch, heads, N, E] -> the shape of the root."""
        wanted = shape(self.root)
        if same_sizes(shape(new), wanted):
            return new
        return self.call(aten.reshape.default, new, [self.size(size) for size in wanted])

    # --- masks

    def empty(self) -> str | None:
        """What a row gives that is masked throughout; None for zeros, and where no row can be."""
        reading = self.reading
        if not reading.terms or reading.sinks is not None:
            return None
        fills = {term.fill for term in reading.terms}
        if reading.clamped or not fills & {None, -math.inf}:
            return "mean"
        return None if reading.safe else "nan"

    def bias(self) -> fx.Node | None:
        """All masks as one: boolean where each of them fills, else added."""
        bias: fx.Node | None = None
        filled = 0.0
        for term in self.reading.terms:
            mask = self.placed(term)
            if term.fill is not None and (bias is None or dtype(bias) is torch.bool):
                bias = mask if bias is None else self.call(aten.bitwise_and.Tensor, bias, mask)
                filled = term.fill
            elif term.fill is not None:
                bias = self.call(aten.where.ScalarOther, mask, bias, _hiding(term.fill, dtype(bias)))
            elif bias is None:
                bias = mask
            elif dtype(bias) is torch.bool:
                hidden = self.call(aten.add.Tensor, mask, _hiding(filled, dtype(mask)))
                bias = self.call(aten.where.self, bias, mask, hidden)
            else:
                bias = self.call(aten.add.Tensor, bias, mask)
        return bias

    def placed(self, term: Term) -> fx.Node:
        """A term's tensor, added or True where a key is allowed; it broadcasts to [batch, heads, N, M]."""
        mask = term.tensor
        if term.fill is not None and dtype(mask) is not torch.bool:  # of zeros and ones
            mask = self.call(aten.ne.Scalar, mask, 0)
        if term.fill is not None and not term.keeps:
            mask = self.inverse(mask)
        if term.fill is None and _is_upcast(mask, dtype(self.reading.value)):
            mask = self.call(aten._to_copy.default, mask, dtype=dtype(self.reading.value))
        if term.fill is None and term.factor != 1:
            mask = self.call(aten.mul.Tensor, mask, term.factor)
        lead, heads = term.at[:-2], self.plan.heads
        own = shape(mask)[:-2]
        if same_sizes(lead, (self.plan.batch, heads)) or not own:
            return mask
        if same_sizes(own, [1] * len(own)):
            return self.reshaped(mask, (1, 1))
        for _ in range(len(lead) - len(own)):
            mask = self.call(aten.unsqueeze.default, mask, 0)
        if len(lead) > 1 and same_sizes(lead[-1:], [heads]):  # one axis of heads, which may go on to broadcast
            lead, heads = (*lead[:-1], shape(mask)[-3]), shape(mask)[-3]
        if not same_sizes(shape(mask)[:-2], lead):
            mask = self.call(aten.expand.default, mask, [*map(self.size, lead), -1, -1])
        return self.reshaped(mask, (self.plan.batch, heads))

    def inverse(self, mask: fx.Node) -> fx.Node:
        """Not `mask`."""
        known = mask.target in (aten.bitwise_not.default, aten.logical_not.default)
        source: Any = mask.args[0] if known else None
        return source if known and dtype(source) is torch.bool else self.call(aten.logical_not.default, mask)


def _hiding(fill: float, kind: torch.dtype) -> float:
    """What is added to scores instead of filling them: the fill where it absorbs them, else a number that does."""
    if fill == -math.inf:
        return fill
    lowest = torch.finfo(kind).min
    return max(fill, lowest) if fill <= ABSORBING else lowest


def _owner(size: Any, root: fx.Node, reading: Reading) -> tuple[fx.Node, int] | None:
    """A tensor and its axis of a symbolic size."""
    inputs = [node for node in root.graph.nodes if node.op == "placeholder"]
    for node in (reading.query, reading.key, reading.value, *inputs):
        for axis, found in enumerate(shape(node)):
            if same_sizes([found], [size]):
                return node, axis
    return None


SPELLED = Rule("attention", find, lambda found: _plan(found["reading"], found.root), _replace)


# --- attention -> the same with less before it -----------------------------------------------------------------


def _changed(program: Program, root: fx.Node, **changes: Any) -> None:
    """Replace an attention by one with other arguments."""
    given = {name: value for name, value in {**arguments(root), **changes}.items() if value is not None}
    program.replace(root, program.call(attention, **given, before=root))


def _repeated(node: Any, axis: int) -> Any:
    """What is repeated along an axis, each element several times in a row, to give a value; None if nothing is."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    given = arguments(node)
    source = given.get("self")
    if node.target is aten.repeat_interleave.self_int and given["dim"] is not None:
        return source if given["dim"] % len(shape(node)) == axis else None
    if node.target is aten.expand.default and len(shape(source)) == len(shape(node)):
        kept = [size for place, size in enumerate(shape(source)) if place != axis]
        wanted = [size for place, size in enumerate(shape(node)) if place != axis]
        return source if same_sizes(shape(source)[axis : axis + 1], [1]) and same_sizes(kept, wanted) else None
    if node.target is not aten.reshape.default or _repeated(source, axis + 1) is None:
        return None
    assert source is not None
    sizes, single = shape(source), source.args[0]
    merged = (*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :])
    added = single.target is aten.unsqueeze.default and single.args[1] % len(sizes) == axis + 1
    return single.args[0] if added and same_sizes(shape(node), merged) else None


def _find_repeated(root: fx.Node) -> Match | Refusal | None:
    """Key and value whose heads are repeated for the queries' (repeat_kv): the operator reads grouped heads itself."""
    if root.target is not attention:
        return None
    given, sources = arguments(root), {}
    for name in ("key", "value"):
        node = given[name]
        swapped = isinstance(node, fx.Node) and node.target is aten.transpose.int and {*node.args[1:]} == {1, 2}
        source = _repeated(node.args[0], 2) if swapped else _repeated(node, 1)
        if source is None:
            return None
        sources[name] = (source, swapped)
    counts = [shape(source)[2 if swapped else 1] for source, swapped in sources.values()]
    if not same_sizes(counts[:1], counts[1:]) or not isinstance(counts[0], int):
        return None
    return Match(root, sources, frozenset({root}))


def _replace_repeated(program: Program, found: Match, _: Any) -> None:
    changes = {}
    for name in ("key", "value"):
        source, swapped = found[name]
        changes[name] = program.call(aten.transpose.int, source, 1, 2, before=found.root) if swapped else source
    _changed(program, found.root, **changes)


GROUPED = Rule("grouped_heads", _find_repeated, lambda _: True, _replace_repeated)


def _is_read_once(node: fx.Node) -> bool:
    """Whether one argument of one call reads a node: an attention may read it as key and as value."""
    reads: list[fx.Node] = []
    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), reads.append)
    return reads.count(node) == 1


def _find_scaled(root: fx.Node) -> Match | Refusal | None:
    """A query or key that is multiplied by a number for this attention alone."""
    if root.target is not attention:
        return None
    given = arguments(root)
    size = shape(given["query"])[-1]
    if given["scale"] is None and not isinstance(size, int):
        return None
    scale = size**-0.5 if given["scale"] is None else given["scale"]
    for node in (given["query"], given["key"]):
        while isinstance(node, fx.Node) and node.target in _LAYOUT and _is_read_once(node):
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.div.Tensor):
            continue
        source, factor = node.args[0], number(node.args[1])
        kept = isinstance(source, fx.Node) and dtype(source) is dtype(node) and same_sizes(shape(source), shape(node))
        if kept and factor and 0 < factor < math.inf and _is_read_once(node):
            scaled = scale * factor if node.target is aten.mul.Tensor else scale / factor
            return Match(root, {"scaled": node, "source": source, "scale": scaled}, frozenset({root}))
    return None


def _replace_scaled(program: Program, found: Match, _: Any) -> None:
    _changed(program, found.root, scale=found["scale"])
    program.replace(found["scaled"], found["source"])


SCALED = Rule("attention_scale", _find_scaled, lambda _: True, _replace_scaled)

RULES = (SDPA, SPELLED, GROUPED, SCALED)
