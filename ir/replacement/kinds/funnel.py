"""funnel: from an attention on, the model has fewer tokens; at its end as many as before."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...errors import InputError, RewriteError
from ...graph import Program, arguments, fake_result, mark_current, shape, source_of
from ...ops import norm
from ...ops.attention import attention
from ...ops.linear import gated_linear, linear_act, mlp, split_linear
from ...ops.pool import pool_mask, pool_tokens, unpool_tokens
from ..kind import Call, Kind, check_integer
from ..site import Site

aten = torch.ops.aten

# What computes each token by itself, or moves axes: it does not matter how many tokens there are.
_BY_TOKEN = {
    aten.linear.default, aten.layer_norm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default,
    linear_act, gated_linear, split_linear, mlp, norm.rms_norm, norm.add_layer_norm, norm.add_rms_norm,
    operator.getitem,
}  # fmt: skip
_RESIDUAL = {aten.add.Tensor, norm.add_layer_norm, norm.add_rms_norm}


@dataclass(frozen=True)
class Funnel(Kind):
    """Pooled queries (Funnel-Transformer: Dai et al., 2020). The attention has a query for each `stride` tokens, by
    their masked mean, and all keys; its residual is pooled alike, and the layers that follow see the pooled tokens
    alone. CLS stays by itself. Where the model's outputs, or anything that does not take tokens one by one, read them,
    they are up-sampled. No weights. A stride of 1 is exact.

    Attributes:
        stride: tokens that become one.
        residual: whether up-sampled tokens keep what they had, and get the change of their pooled one besides.
    """

    stride: int = 2
    residual: bool = True
    causal: ClassVar[bool] = False
    local: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("stride", self.stride, 1)
        if type(self.residual) is not bool:
            raise InputError(f"residual must be True or False, found {self.residual!r}")

    def refuses(self, site: Site) -> str | None:
        """A fixed length is written all over the graph."""
        return "its length is fixed; compile with dynamic_shapes='auto'" if isinstance(site.length, int) else None

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """The pooled result [B, H, P, E]."""
        query, key, value, key_mask = inputs
        pooled = call(pool_tokens, query, key_mask, self.stride)
        return call(attention, pooled, key, value, None, key_mask, None, None, site.scale)

    def replace(self, program: Program, site: Site, weights: Mapping[str, fx.Node]) -> None:
        """Pool the attention, and let everything after it that can have the pooled tokens."""
        rewriting = _Pooling(program, site, self.stride, self.residual)
        following = [node for node in program.graph.nodes if node > site.node]
        given = site.given
        pooled = program.call(pool_tokens, given["query"], given["key_mask"], self.stride, before=site.node)
        result = program.call_again(site.node, query=pooled)
        site.node.replace_all_uses_with(result)
        program.graph.erase_node(site.node)
        rewriting.pooled[result] = None
        for node in following:
            rewriting.visit(node)


@dataclass
class _Pooling:
    """The rewriting of what follows a pooled attention."""

    program: Program
    site: Site
    stride: int
    keep: bool  # whether up-sampled tokens keep what they had
    pooled: dict[fx.Node, None] = field(default_factory=dict)  # nodes whose tokens are the pooled ones
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)  # pooled from nodes with all tokens
    wide: dict[fx.Node, fx.Node] = field(default_factory=dict)  # up-sampled
    residual: fx.Node | None = None  # the tokens that the first residual connection carries past the attention

    def visit(self, node: fx.Node) -> None:
        """Let a node have pooled tokens if all it reads can be had pooled; else up-sample what it reads."""
        read = [used for used in node.all_input_nodes if used in self.pooled]
        if not read:
            return
        if node.op == "call_function" and self._keeps_first(node):
            return  # reads the first token, which is by itself
        changed = self._pooled_arguments(node) if node.op == "call_function" else None
        if changed is None:
            for used in read:
                node.replace_input_with(used, self._up(used, node))
            return
        for old, new in changed.items():
            node.replace_input_with(old, new)
        node.meta["val"] = fake_result(self.program, node)
        mark_current(node)
        self.pooled[node] = None

    def _keeps_first(self, node: fx.Node) -> bool:
        given = arguments(node)
        if node.target is not aten.select.int or given["index"] != 0:
            return False
        value = given["self"].meta["val"]
        found: bool = value.dim() == 3 and given["dim"] % 3 == 1
        return found

    def _pooled_arguments(self, node: fx.Node) -> dict[fx.Node, fx.Node] | None:
        """What a node has to read in the place of what it reads; None: it needs all tokens."""
        given = arguments(node)
        is_attention = "query" in given and "key" in given
        if node.target not in _BY_TOKEN and not is_attention:
            return None
        if is_attention and not self._is_plain(given):
            return None
        changed = {}
        for used in node.all_input_nodes:
            if used in self.pooled or not self._has_tokens(used):
                continue
            new = self._pool(used, node, is_attention)
            if new is None:
                return None
            changed[used] = new
        return changed

    def _is_plain(self, given: Mapping[str, Any]) -> bool:
        """Whether an attention is of the pooled tokens to themselves, and all it knows of places is the key mask."""
        of_tokens = all(given[name] in self.pooled for name in ("query", "key", "value"))
        mask = given.get("key_mask")
        others = any(given.get(name) is not None for name in ("bias", "left", "right"))
        return of_tokens and mask is self.site.given["key_mask"] and not others

    def _has_tokens(self, node: fx.Node) -> bool:
        """Whether a value has an axis of all tokens, or is their number."""
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        return any(isinstance(size, torch.SymInt) and _symbols(size) & _symbols(self.site.length) for size in sizes)

    def _pool(self, node: fx.Node, before: fx.Node, is_mask: bool) -> fx.Node | None:
        """A value of all tokens as that of the pooled ones; None: there is none."""
        if node in self.made:
            return self.made[node]
        value, mask = node.meta["val"], self.site.given["key_mask"]
        if not isinstance(value, Tensor):
            if not _is_size(value, self.site.length):
                return None
            some = next(iter(self.pooled))
            self.made[node] = self.program.call(aten.sym_size.int, some, 2, before=before)
        elif is_mask and node is mask:
            self.made[node] = self.program.call(pool_mask, node, self.stride, before=before)
        elif before.target in _RESIDUAL and value.dim() == 3 and _is_size(value.shape[1], self.site.length):
            self.made[node] = self.program.call(pool_tokens, node, mask, self.stride, before=before)
            self.residual = self.residual or node
        else:
            return None
        return self.made[node]

    def _up(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """Pooled tokens up-sampled."""
        if node in self.wide:
            return self.wide[node]
        value, like = node.meta["val"], self.residual
        if not isinstance(value, Tensor) or value.dim() not in (3, 4) or like is None:
            raise RewriteError(f"pooled tokens cannot be up-sampled for {before.name}{source_of(before)}")
        skips = self.keep and value.dim() == 3 and shape(node)[-1] == shape(like)[-1]
        source = node
        if skips:
            source = self.program.call(aten.sub.Tensor, node, self.made[like], before=before, like=node)
        found = self.program.call(unpool_tokens, source, like, self.stride, before=before, like=node)
        if skips:
            found = self.program.call(aten.add.Tensor, like, found, before=before, like=node)
        self.wide[node] = found
        return found


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _is_size(size: Any, length: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == length.node.expr)
