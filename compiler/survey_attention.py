"""How many attentions a model has, counted without the compiler.

The count watches the model run in eager PyTorch, below every Python spelling: torch's own attention kernels count one
each, and so does a softmax over the last axis whose operand comes, through element-wise operations and changes of shape
alone, from a product of two computed tensors, and whose result reaches, the same way, another product with a computed
tensor. A weight, or a view of one, is not computed: routers, pooling weights and logits multiply by weights. What the
model's result does not depend on is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .trace import plain_attention

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addbmm, aten.matmul, aten.linear}
_SOFTMAX = {aten._softmax, aten._safe_softmax, aten.softmax}
_SHAPES = {
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.transpose, aten.t, aten.permute, aten.expand,
    aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.cat,
    aten.stack, aten.clone, aten._to_copy, aten.detach, aten.alias, aten.constant_pad_nd, aten.gather, aten.index,
    aten.index_select, aten.masked_fill, aten.where, aten.copy, aten.flip, aten.roll, aten.as_strided, aten.repeat,
    aten.unfold, aten.lift_fresh, aten.slice_scatter, aten.diagonal,
}  # fmt: skip


@dataclass(eq=False)
class _Step:
    """A call seen while the model ran; each tensor argument with the call it comes from, if any; is it a weight?"""

    packet: Any
    call: Any
    arguments: list[tuple[_Step | None, bool]]
    over_last_axis: bool

    @property
    def passes_on(self) -> bool:
        """Whether each element of the result comes from one element of each argument."""
        return self.packet in _SHAPES or torch.Tag.pointwise in self.call.tags

    @property
    def operands(self) -> list[tuple[_Step | None, bool]]:
        """The two matrices of a product."""
        return self.arguments[:2] if self.packet is aten.linear else self.arguments[-2:]


class _Watch(TorchDispatchMode):
    """Records which call made each tensor."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {id(weight) for weight in weights}
        self.made: dict[int, _Step] = {}
        self.steps: list[_Step] = []
        self.kept: list[Tensor] = []  # so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call and note it."""
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        packet = getattr(aten, name.removesuffix("_"), func.overloadpacket)  # in place counts as its plain form
        last = packet in _SOFTMAX and tensors[0].dim() >= 3 and args[1] in (-1, tensors[0].dim() - 1)
        step = _Step(packet, func, [(self.made.get(id(item)), id(item) in self.weights) for item in tensors], last)
        self.steps.append(step)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.made[id(leaf)] = step
                self.kept.append(leaf)
        return result


def count(model: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """The number of attentions that a model computes on some inputs."""
    with torch.no_grad(), plain_attention(), _Watch([*model.parameters(), *model.buffers()]) as watch:
        result = model(**inputs)
    ends = [watch.made.get(id(leaf)) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    needed = _behind(ends, lambda step: True)
    users: dict[_Step, list[_Step]] = {}
    for step in needed:
        for source, _ in step.arguments:
            if source is not None:
                users.setdefault(source, []).append(step)
    return sum("scaled_dot_product" in str(step.call) or _is_softmax_of_attention(step, users) for step in needed)


def _behind(ends: Iterable[_Step | None], through: Callable[[_Step], bool]) -> set[_Step]:
    """The steps that some steps come from, themselves included, reached through steps for which `through` is true."""
    found: set[_Step] = set()
    waiting = [step for step in ends if step is not None]
    while waiting:
        step = waiting.pop()
        if step not in found:
            found.add(step)
            waiting += [source for source, _ in step.arguments if source is not None] if through(step) else []
    return found


def _computed(argument: tuple[_Step | None, bool]) -> bool:
    """Whether a tensor is neither a weight nor a weight seen in another shape."""
    step, is_weight = argument
    if is_weight or step is None:
        return not is_weight
    return step.packet not in _SHAPES or not step.arguments or any(map(_computed, step.arguments))


def _is_softmax_of_attention(step: _Step, users: dict[_Step, list[_Step]]) -> bool:
    if not step.over_last_axis:
        return False
    before = _behind([step.arguments[0][0]], lambda item: item.passes_on)
    after, waiting = set(), list(users.get(step, ()))
    while waiting:
        user = waiting.pop()
        if user not in after:
            after.add(user)
            waiting += users.get(user, ()) if user.passes_on else ()
    return all(any(item.packet in _PRODUCTS and all(map(_computed, item.operands)) for item in side)
               for side in (before, after))  # fmt: skip
