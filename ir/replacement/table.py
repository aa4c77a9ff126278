"""The kinds of attention that there are: the only list."""

from __future__ import annotations

from .kind import Kind
from .kinds.depthwise_conv import DepthwiseConv
from .kinds.dynamic_sparse import DynamicSparse
from .kinds.exact import Exact
from .kinds.funnel import Funnel
from .kinds.graph import Graph
from .kinds.linear import Linear
from .kinds.linformer import Linformer
from .kinds.lsh import Lsh
from .kinds.nystrom import Nystrom
from .kinds.performer import Performer
from .kinds.random_sparse import RandomSparse
from .kinds.sliding_window import SlidingWindow

KINDS: dict[str, type[Kind]] = {
    kind.kind_name(): kind
    for kind in (
        SlidingWindow,
        DynamicSparse,
        RandomSparse,
        Graph,
        Linformer,
        Performer,
        Nystrom,
        Linear,
        Lsh,
        DepthwiseConv,
        Funnel,
        Exact,
    )
}
