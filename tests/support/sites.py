"""One attention of a small program, as the kinds that may replace it see it, and numbers for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from build import normal, program
from torch import Tensor
from torch.export import Dim

from fxpress.ir.ops.attention import attention
from fxpress.ir.replacement.kind import Kind, compute
from fxpress.ir.replacement.kinds.depthwise_conv import DepthwiseConv
from fxpress.ir.replacement.kinds.dynamic_sparse import DynamicSparse
from fxpress.ir.replacement.kinds.exact import Exact
from fxpress.ir.replacement.kinds.graph import Graph
from fxpress.ir.replacement.kinds.linear import Linear
from fxpress.ir.replacement.kinds.linformer import Linformer
from fxpress.ir.replacement.kinds.lsh import Lsh
from fxpress.ir.replacement.kinds.nystrom import Nystrom
from fxpress.ir.replacement.kinds.performer import Performer
from fxpress.ir.replacement.kinds.random_sparse import RandomSparse
from fxpress.ir.replacement.kinds.sliding_window import SlidingWindow
from fxpress.ir.replacement.site import Sample, Site, sites

HEADS, GROUPS, SIZE = 4, 2, 4
LONGEST = 512


def ring(nodes: int) -> list[list[int]]:
    """An adjacency: each node sees itself and its neighbours, and the first node all."""
    return [[int(not i or (i - j) % nodes in (0, 1, nodes - 1)) for j in range(nodes)] for i in range(nodes)]


# Every kind where it leaves something out, also of a few tokens.
BITING: dict[str, tuple[Kind, ...]] = {
    "sliding_window": (SlidingWindow(4), SlidingWindow(3, global_tokens=2), SlidingWindow(2, 1, dilation=3)),
    "dynamic_sparse": (
        DynamicSparse(4, top_k=1),
        DynamicSparse(4, mass=0.4, similarity=0.2),
        DynamicSparse(4, top_k=1, per_query=True),
    ),
    "random_sparse": (RandomSparse(4, window=1, random_blocks=1), RandomSparse(4, 3, 0, 2, seed=5)),
    "graph": (
        Graph(),
        Graph("star", degree=4, hubs=0),
        Graph("expander", block=4),
        Graph("adjacency", block=4, adjacency=ring(LONGEST // 4)),
    ),
    "linformer": (Linformer(4), Linformer(4, "fitted")),
    "performer": (Performer(), Performer(features=11, seed=1)),
    "nystrom": (Nystrom(4),),
    "linear": (Linear(6, window=3), Linear(6, window=0)),
    "lsh": (Lsh(4, rounds=2, buckets=8),),
    "depthwise_conv": (DepthwiseConv(5), DepthwiseConv(4, dynamic=True)),
    "exact": (Exact(),),
}


@functools.cache
def site(causal: bool = False, heads: int = HEADS, groups: int = GROUPS) -> Site:
    """The attention of a program with a key mask; at most LONGEST tokens."""

    def forward(m: Any, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
        found: Tensor = attention(query, key, value, None, key_mask, None, 0 if causal else None)
        return found

    few = normal(2, groups, 5, SIZE)
    batch, length = Dim("batch"), Dim("length")
    each = {0: batch, 2: length}
    axes = {"query": each, "key": each, "value": each, "key_mask": {0: batch, 1: length}}
    examples = normal(2, heads, 5, SIZE), few, few, torch.ones(2, 5, dtype=torch.bool)
    traced = program(forward, *examples, dynamic=axes)
    (found,) = sites(traced)
    return dataclasses.replace(found, longest=LONGEST)


def applicable(kinds: Mapping[str, tuple[Kind, ...]], causal: bool) -> list[Kind]:
    """Those that an attention with shared keys may be of."""
    return [kind for each in kinds.values() for kind in each if kind.refusal(site(causal)) is None]


def qkv(
    length: int, batch: int = 1, heads: int = HEADS, groups: int = GROUPS, seed: int = 0, dtype: Any = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys, and values of another size."""
    return (
        normal(batch, heads, length, SIZE, seed=seed, dtype=dtype),
        normal(batch, groups, length, SIZE, seed=seed + 1, dtype=dtype),
        normal(batch, groups, length, SIZE + 1, seed=seed + 2, dtype=dtype),
    )


def lengths(*real: int, longest: int = 0) -> Tensor:
    """A key mask [B, N] of samples of so many tokens, padded on the right."""
    return torch.arange(longest or max(real)) < torch.tensor(real)[:, None]


def weights(kind: Kind, at: Site) -> dict[str, Tensor]:
    """The kind's weights, away from their start where training may move them."""
    found = {}
    for seed, (name, tensor) in enumerate(kind.weights(at).items()):
        if name == "taps":
            tensor = normal(*tensor.shape, seed=seed).softmax(-1)
        elif tensor.is_floating_point() and name not in kind.frozen:
            tensor = tensor + normal(*tensor.shape, seed=seed) * 0.3
        found[name] = tensor
    return found


def attend(
    kind: Kind,
    at: Site,
    tensors: tuple[Tensor, ...],
    key_mask: Tensor | None,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What the kind gives for query, key and value."""
    found: Tensor = kind.attend(compute, at, (*tensors, key_mask), weights(kind, at) if given is None else given)
    return found


def exactly(at: Site, tensors: tuple[Tensor, ...], key_mask: Tensor | None) -> Tensor:
    """What it stands for."""
    found: Tensor = attention(*tensors, key_mask=key_mask, right=0 if at.causal else None)
    return found


def samples(at: Site, count: int = 3) -> list[Sample]:
    """Calibration data of a site, padded."""
    made = []
    for index in range(count):
        tensors = qkv(12 + index, 2, at.heads, at.groups, seed=10 * index)
        mask = lengths(12 + index, 7)
        made.append(Sample(*tensors, key_mask=mask, output=exactly(at, tensors, mask)))
    return made
