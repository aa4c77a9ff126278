"""graph: each token, or block of tokens, sees its neighbours in a graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.block_attention import block_attention, expander_blocks
from ...ops.window_attention import window_attention
from ..kind import Call, Kind, aligned, check_integer
from ..site import Site


@dataclass(frozen=True)
class Graph(Kind):
    """Attention along the edges of a graph. O(edges). No weights. The complete graph is exact.

    Attributes:
        topology: "star": a ring of neighbours, and hubs (Star-Transformer: Guo et al., 2019); "expander": a random
            graph of few edges in which all nodes are a few steps apart, and hubs (Exphormer: Shirzad et al., 2023);
            "adjacency": the user's.
        degree: neighbours of a node, half of them on each side.
        hubs: first nodes that all see and that see all.
        block: tokens of a node; a star's are single tokens.
        seed: of the expander.
        adjacency: a square matrix, as nested lists or a tensor: row i, column j not zero: node i sees node j.
    """

    topology: str = "star"
    degree: int = 2
    hubs: int = 1
    block: int = 64
    seed: int = 0
    adjacency: Any = None

    def __post_init__(self) -> None:
        for option, least in (("degree", 0), ("hubs", 0), ("block", 1), ("seed", 0)):
            check_integer(option, getattr(self, option), least)
        if self.topology not in ("star", "expander", "adjacency"):
            raise InputError(f"topology must be 'star', 'expander' or 'adjacency', found {self.topology!r}")
        if self.degree % 2:
            raise InputError(f"degree must be even, half of it on each side, found {self.degree}")
        if (self.adjacency is not None) != (self.topology == "adjacency"):
            raise InputError("topology 'adjacency' goes with an adjacency matrix, the others without")
        if self.adjacency is not None:  # as tuples, which compare and print as what they are
            rows = self._matrix().long().tolist()
            object.__setattr__(self, "adjacency", tuple(map(tuple, rows)))

    def _matrix(self) -> Tensor:
        """The adjacency, boolean [n, n]."""
        try:
            matrix = torch.as_tensor(self.adjacency)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"adjacency must be a square matrix of numbers: {error}") from error
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
            raise InputError(f"adjacency must be a square matrix, found shape {list(matrix.shape)}")
        return matrix != 0

    def refuses(self, site: Site) -> str | None:
        """A graph made of the tokens that there are would let a query know how many come later."""
        if site.causal and self.topology != "adjacency":
            return f"it is causal, and the topology {self.topology!r} is not"
        if self.topology == "adjacency":
            most = len(self._matrix()) * self.block
            longest = site.longest
            if longest is None or longest > most:
                return f"it may have {longest or 'any number of'} tokens, the adjacency is of {most}"
        return None

    def weights(self, site: Site) -> dict[str, Tensor]:
        """Of an adjacency: the neighbours of each node, and which nodes see all."""
        if self.topology != "adjacency":
            return {}
        matrix = self._matrix()
        every = matrix.all(1)
        few = matrix & ~every[:, None]
        width = max(1, int(few.sum(1).max()))
        number = torch.arange(len(matrix))
        order = torch.where(few, number, len(matrix)).sort(-1).values[:, :width]
        table = torch.where(order < len(matrix), order, -1)
        # A row more: tables are never of one row, see `ir.ops.block_attention`.
        return {"table": torch.cat((table, torch.full((1, width), -1)))[None, None], "full": number[every][None]}

    def attend(self, call: Call, site: Site, inputs: Sequence[Any], weights: Mapping[str, Any]) -> Any:
        """A star is a window with global tokens; other graphs are tables of blocks."""
        query, key, value, key_mask = inputs
        if self.topology == "star":
            side = self.degree // 2
            return call(window_attention, query, key, value, key_mask, side, side, self.hubs, 1, False, site.scale)
        (query, key, value, key_mask), restore = aligned(call, inputs)
        if self.topology == "adjacency":
            table, full = weights["table"], weights["full"]
        else:
            both = call(expander_blocks, query, key_mask, self.block, self.degree, self.hubs, self.seed)
            table, full = (call(operator.getitem, both, index) for index in (0, 1))
        result = call(block_attention, query, key, value, table, full, key_mask, self.block, self.block, site.causal,
                    site.scale)  # fmt: skip
        return restore(result)
