"""RemovePadding: what padding tokens cost is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from ..ir.axes import carried, rank
from ..ir.errors import RewriteError
from ..ir.graph import Program, arguments, same_sizes, shape
from ..ir.ops.attention import attention
from ..ir.ops.integer import integer_softmax
from ..ir.ops.padding import pack_tokens, packed_attention, real_tokens, unpack_tokens
from ..ir.ops.table import taking
from ..ir.packing import Place, Region, behind, is_fixed, key_masks, region_of, trim
from ..ir.pattern import Refusal
from ..ir.printer import target_name
from ..ir.rewrite import Applied, Context, Pass, PassResult

aten = torch.ops.aten
RULE = "padding"


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Compute the tokens that are no padding, and those alone: all samples' in one row, one after another (Effective
    Transformer: ByteDance, 2020; ByteTransformer: Zhai et al., 2023).

        before:  %y = aten.linear(%x, @w)                                    f32[d0, d1, 8]
                 %a = fxpress.attention(%q, %k, %v, key_mask=%m)
        after:   %t = fxpress.real_tokens(%m)                                i64[u0]
                 %p = fxpress.pack_tokens(%x, %t)                            f32[1, u0, 8]
                 %y = aten.linear(%p, @w)
                 %a = fxpress.packed_attention(%q, %k, %v, %m)
                 %r = fxpress.unpack_tokens(%z, %m)                          f32[d0, d1, 8], where z leaves the row

    At tokens the outputs are those of the model; at padding, where the model gives what is of no use, they are zero.
    Refused where padding counts: where a call that the mask does not keep from it reads it.
    """

    keeps_padding: ClassVar[bool] = False

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        result = PassResult()
        found = False
        for mask in key_masks(program):
            region = region_of(program, mask)  # of the program as the regions before have left it
            if not region.attention:
                continue
            found, first = True, region.attention[0].name
            if reader := trim(program, region):
                result.refusals.append(Refusal(reader.reason, RULE, reader.node.name))
            elif not context.take():
                return result
            else:
                detail = _detail(program, region, context)
                _Packing(program, region).run()
                result.rewrites[RULE] += 1
                result.matches.append(Applied(RULE, first, detail))
        if not found and not program.calls(packed_attention, pack_tokens):
            if program.calls(integer_softmax):
                raise RewriteError(
                    "attention of integers keeps its padding; leave out remove_padding, or integer_only before it"
                )
            attentions = taking("query", "key", "value", "key_mask")
            if others := [node for node in program.calls(*taking("key_mask")) if node.target not in attentions]:
                raise RewriteError(
                    f"padding cannot be removed: {target_name(others[0])} takes tokens by their places in the batch; "
                    "leave out remove_padding, or replace attention by another kind"
                )
            raise RewriteError(
                "no attention among tokens has a key mask that says which are padding; "
                "give an attention mask among the example inputs"
            )
        if found and not result.changes:
            raise RewriteError(f"padding cannot be removed: {result.refusals[0].reason}")
        return result


def _detail(program: Program, region: Region, context: Context) -> str:
    text = f"{len(region.places)} calls on tokens alone, {len(region.attention)} of them attention"
    if context.inputs:
        real = program.values([region.key_mask], context.inputs)[0]
        text += f"; padding is {1 - float(real.double().mean()):.0%} of the example"
    return text


@dataclass
class _Packing:
    """The rewrite of one region."""

    program: Program
    region: Region
    made: dict[tuple[fx.Node, Any], fx.Node] = field(default_factory=dict)  # packed values, by where they came from
    tokens: Any = None
    sizes: tuple[Any, ...] = ()  # nodes: B, N and T

    def run(self) -> None:
        self._start()
        places = self.region.places
        for node, place in places.items():
            self.made[node, place] = self._packed_call(node, place)
        for node, place in places.items():
            outside = dict.fromkeys(user for user in node.users if user not in places)
            for user in [user for user in outside if user.target is aten.sym_size.int]:
                self._size(user, node, place)
                del outside[user]
            if isinstance(node.meta["val"], tuple | list):
                for user in outside:
                    if is_fixed(node, user.meta["val"]):
                        user.replace_input_with(node, self.made[node, place])
            elif outside:
                packed = self.made[node, place]
                batched = self._unpacked(packed, place, packed.next, self.region.at_padding.get(node, 0.0))
                node.replace_all_uses_with(batched, delete_user_cb=outside.__contains__)
        self.program.clean()

    def _start(self) -> None:
        """The places of tokens, computed ahead of all that is to be packed."""
        program, mask = self.program, self.region.key_mask
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        needed = behind(mask)
        ahead = [node for node in calls if node in needed]
        first = next(node for node in calls if node not in needed)
        for node in ahead:
            first.prepend(node)
        like = self.region.attention[0]
        self.tokens = program.call(real_tokens, mask, before=first, like=like)
        batch, length = (program.call(aten.sym_size.int, mask, axis, before=first, like=like) for axis in (0, 1))
        count = program.call(aten.sym_size.int, self.tokens, 0, before=first, like=like)
        self.sizes = (batch, length, count)

    def _packed_call(self, node: fx.Node, place: Place) -> fx.Node:
        """A call of the region once more, on packed tokens."""
        given = arguments(node)
        if node in self.region.attention:
            return self._attention(node, given)
        axes = carried(node)

        def operand(used: fx.Node) -> fx.Node:
            if used in axes:
                return self._operand(node, used, place)
            return used

        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        if node.target in (aten.reshape.default, aten.view.default, aten.expand.default):
            wanted = list(args[1])
            wanted[place[0]], wanted[place[1]] = 1, self.sizes[2]
            args = (args[0], wanted, *args[2:])
        target: Any = node.target
        return self.program.call(target, *args, before=node, **kwargs)

    def _operand(self, node: fx.Node, used: fx.Node, place: Place) -> fx.Node:
        """An operand as the packed call reads it: packed if it has a number for each token, or each place of one."""
        axes = carried(node)[used]
        if place[0] in axes and place[1] in axes:
            return self._packed(used, (axes.index(place[0]), axes.index(place[1])), node)
        ahead = rank(node) - len(shape(used))
        own = [axis - ahead for axis in place]
        if all(axis < 0 or same_sizes([shape(used)[axis]], [1]) for axis in own):
            return used  # the same for all tokens
        wanted: list[Any] = [1] * ahead + [-1] * len(shape(used))
        wanted[place[0]], wanted[place[1]] = self.sizes[:2]
        if (used, place) not in self.made:
            spread = self.program.call(aten.expand.default, used, wanted, before=node)
            self.made[used, place] = self._pack(spread, place, node)
        return self.made[used, place]

    def _attention(self, node: fx.Node, given: dict[str, Any]) -> fx.Node:
        """Attention one sample after the other; where it is of another kind, or has other masks, in the batch."""
        place, mask = (0, 2), self.region.key_mask
        operands = {name: self._packed(given[name], place, node) for name in ("query", "key", "value")}
        if node.target is attention and (causal := _is_causal(given)) is not None:
            options: dict[str, Any] = {"causal": True} if causal else {}
            if given["scale"] is not None:
                options["scale"] = given["scale"]
            if given["softcap"]:
                options["softcap"] = given["softcap"]
            return self.program.call(packed_attention, *operands.values(), mask, before=node, **options)
        batched = {name: self._unpacked(value, place, node) for name, value in operands.items()}
        return self._pack(self.program.call_again(node, **batched, key_mask=mask), place, node)

    def _packed(self, node: fx.Node, place: Place, before: fx.Node) -> fx.Node:
        if (node, place) not in self.made:
            self.made[node, place] = self._pack(node, place, before)
        return self.made[node, place]

    def _pack(self, node: fx.Node, place: Place, before: fx.Node) -> fx.Node:
        front = self._moved(node, _to_front(place, len(shape(node))), before)
        row = self.program.call(pack_tokens, front, self.tokens, before=before)
        return self._moved(row, _from_front(place, len(shape(node))), before)

    def _unpacked(self, node: fx.Node, place: Place, before: fx.Node, at_padding: float = 0.0) -> fx.Node:
        front = self._moved(node, _to_front(place, len(shape(node))), before)
        batched = self.program.call(unpack_tokens, front, self.region.key_mask, before=before)
        if at_padding:
            padding = self.program.call(aten.bitwise_not.default, self.region.key_mask, before=before)
            for _ in range(len(shape(node)) - 2):
                padding = self.program.call(aten.unsqueeze.default, padding, -1, before=before)
            batched = self.program.call(aten.masked_fill.Scalar, batched, padding, at_padding, before=before)
        return self._moved(batched, _from_front(place, len(shape(node))), before)

    def _moved(self, node: fx.Node, order: list[int], before: fx.Node) -> fx.Node:
        if order == sorted(order):
            return node
        return self.program.call(aten.permute.default, node, order, before=before)

    def _size(self, user: fx.Node, node: fx.Node, place: Place) -> None:
        """A size of a value that is packed now."""
        axis = int(arguments(user)["dim"]) % len(shape(node))
        if axis in place:
            user.replace_all_uses_with(self.sizes[place.index(axis)])
        else:
            size = self.program.call(aten.sym_size.int, self.made[node, place], axis, before=user)
            user.replace_all_uses_with(size)


def _is_causal(given: dict[str, Any]) -> bool | None:
    """Whether attention is causal, its key mask aside; None: it has other masks."""
    if any(given[name] is not None for name in ("bias", "left", "sinks")):
        return None
    right = given["right"]
    return right is not None if right is None or (isinstance(right, int) and right == 0) else None


def _to_front(place: Place, axes: int) -> list[int]:
    return [*place, *(axis for axis in range(axes) if axis not in place)]


def _from_front(place: Place, axes: int) -> list[int]:
    order = _to_front(place, axes)
    return [order.index(axis) for axis in range(axes)]
