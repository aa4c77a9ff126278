"""The kinds of attention that there are: the only list."""

from __future__ import annotations

from .kind import Kind
from .kinds.exact import Exact
from .kinds.linear import Linear
from .kinds.linformer import Linformer
from .kinds.nystrom import Nystrom
from .kinds.performer import Performer
from .kinds.sliding_window import SlidingWindow

KINDS: dict[str, type[Kind]] = {
    kind.kind_name(): kind for kind in (Exact, SlidingWindow, Linformer, Nystrom, Performer, Linear)
}
