"""Which attentions each kind of ReplaceAttention refuses, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import normal, program, reasons, rewritten
from sites import BITING
from torch import Tensor
from torch.export import Dim

from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.rewrite import Context, PassResult
from fxpress.passes import Quantize, ReplaceAttention

X = normal(2, 5, 12)
CAPPED = ("sliding_window", "exact")  # kinds that keep a soft cap, and a window of the model's own
CROSS = ("linformer", "exact")
NAMES = tuple(BITING)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, 4)).transpose(1, 2)


def of(attend: Callable[[Any, Tensor, Tensor], Tensor], **weights: Tensor) -> Program:
    """`attend(self, rows [B, 3, N, 4], other rows [B, 3, M, 4])` as a program of x [B, N, 12] and y [B, M, 12]."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return attend(m, heads(x), heads(y)).transpose(1, 2).flatten(2)

    batch = Dim("batch")
    axes = {"x": {0: batch, 1: Dim("n")}, "y": {0: batch, 1: Dim("m")}}
    return program(forward, X, normal(2, 7, 12), dynamic=axes, **weights)


def replaced(traced: Program, rewrite: ReplaceAttention) -> PassResult:
    _, result = rewritten(traced, rewrite, Context(calibration=[[X, normal(2, 7, 12)]]))
    return result


# --- refusals --------------------------------------------------------------------------------------------------


@functools.cache
def plain() -> Program:
    return of(lambda m, x, y: attention(x, x, x))


@functools.cache
def causal() -> Program:
    return of(lambda m, x, y: attention(x, x, x, right=0))


@functools.cache
def biased() -> Program:
    """A learned bias for each pair, as in T5."""

    def attend(m: Any, x: Tensor, y: Tensor) -> Tensor:
        place = torch.arange(x.shape[2])
        distance = (place[None, :] - place[:, None]).clamp(-4, 4) + 4
        return attention(x, x, x, m.table[distance].permute(2, 0, 1)[None])  # type: ignore[no-any-return]

    return of(attend, table=normal(9, 3))


@functools.cache
def masked() -> Program:
    """A mask that is neither of keys nor a band."""
    return of(lambda m, x, y: attention(x, x, x, (x @ x.transpose(-1, -2)) > 0))


@functools.cache
def with_sinks() -> Program:
    return of(lambda m, x, y: attention(x, x, x, sinks=m.sinks), sinks=normal(3))


@functools.cache
def capped() -> Program:
    return of(lambda m, x, y: attention(x, x, x, softcap=5.0))


@functools.cache
def undefined() -> Program:
    return of(lambda m, x, y: attention(x, x, x, empty="nan"))


@functools.cache
def cross() -> Program:
    return of(lambda m, x, y: attention(x, y, y))


@functools.cache
def windowed() -> Program:
    return of(lambda m, x, y: attention(x, x, x, left=3, right=0))


@functools.cache
def looking_ahead() -> Program:
    return of(lambda m, x, y: attention(x, x, x, right=2))


@functools.cache
def sized() -> Program:
    """A window as wide as half of the tokens."""
    return of(lambda m, x, y: attention(x, x, x, left=x.shape[2] // 2, right=0))


REFUSED: list[tuple[Callable[[], Program], tuple[str, ...], str]] = [
    (biased, NAMES, "its scores have a bias for each pair, which {} cannot take"),
    (masked, NAMES, "its scores have a mask that could not be read as a key mask or a band, which {} cannot take"),
    (with_sinks, NAMES, "its rows have a sink of their own, which {} cannot take"),
    (undefined, NAMES, "it gives NaN where no key is allowed"),
    (capped, tuple(sorted({*NAMES} - {*CAPPED})), "its scores are capped, which {} cannot do"),
    (
        cross,
        tuple(sorted({*NAMES} - {*CROSS})),
        "its keys are other tokens than its queries, and {} is for attention of tokens to themselves",
    ),
    (causal, ("nystrom", "linformer"), "it is causal, and {} would mix later tokens in"),
    (causal, ("graph",), "it is causal, and the topology 'star' is not"),
    (windowed, tuple(sorted({*NAMES} - {*CAPPED})), "it has a window of its own already, which {} does not keep"),
    (looking_ahead, tuple(sorted({*NAMES} - {*CAPPED})), "it has a window of its own already, which {} does not keep"),
    (sized, ("sliding_window", "exact"), "its window has no fixed width"),
]


@pytest.mark.parametrize(
    ("traced", "name", "reason"), [(traced, name, reason) for traced, names, reason in REFUSED for name in names]
)
def test_a_refusal(traced: Callable[[], Program], name: str, reason: str) -> None:
    """If no attention is left that could be replaced, it is an error, which says where and why."""
    with pytest.raises(RewriteError) as error:
        replaced(traced(), ReplaceAttention(name))
    assert f"no attention can be replaced by {name}; attention: {reason.format(name)}" == str(error.value)


@pytest.mark.parametrize(
    ("traced", "name", "options"),
    [
        *[(plain, name, {}) for name in NAMES],
        *[(causal, name, {}) for name in NAMES if name not in ("nystrom", "linformer", "graph")],
        *[(capped, name, {}) for name in CAPPED],
        *[(cross, name, {}) for name in CROSS],
        (windowed, "exact", {}),
        (windowed, "sliding_window", {"window": 3}),
        (looking_ahead, "exact", {}),
        (looking_ahead, "sliding_window", {"window": 2}),
    ],
)
def test_what_is_not_refused(traced: Callable[[], Program], name: str, options: dict[str, Any]) -> None:
    quick = {"steps": 1} if name == "linear" else {}
    assert replaced(traced(), ReplaceAttention(name, **options, **quick)).changes == 1


@pytest.mark.parametrize("options", [{"global_tokens": 1}, {"dilation": 2}], ids=str)
def test_a_window_with_holes_does_not_keep_a_window(options: dict[str, int]) -> None:
    with pytest.raises(RewriteError, match="a window of its own already, which global tokens and dilation would not"):
        replaced(windowed(), ReplaceAttention("sliding_window", window=2, **options))


def test_an_expander_is_not_causal() -> None:
    with pytest.raises(RewriteError, match="it is causal, and the topology 'expander' is not"):
        replaced(causal(), ReplaceAttention("graph", topology="expander"))


@pytest.mark.parametrize(("length", "allowed"), [(8, True), (9, False)])
def test_an_adjacency_needs_a_node_for_every_token(length: int, allowed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return attention(heads(x), heads(x), heads(x))  # type: ignore[no-any-return]

    rewrite = ReplaceAttention("graph", topology="adjacency", block=4, adjacency=[[1, 0], [1, 1]])
    traced = program(forward, X, dynamic={"x": {0: Dim("batch"), 1: Dim("n", max=length)}})
    if allowed:
        assert replaced(traced, rewrite).changes == 1
    else:
        with pytest.raises(RewriteError, match="it may have 9 tokens, the adjacency is of 8"):
            replaced(traced, rewrite)


def test_an_adjacency_needs_to_know_how_many_tokens_there_are() -> None:
    with pytest.raises(RewriteError, match="it may have any number of tokens, the adjacency is of 128"):
        replaced(plain(), ReplaceAttention("graph", topology="adjacency", adjacency=[[1, 0], [1, 1]]))


def test_heads_that_share_keys_cannot_stay_one_by_one() -> None:
    traced = of(lambda m, x, y: attention(x, x[:, :1], x[:, :1]))
    with pytest.raises(RewriteError, match="its heads share keys, so that none can stay exact; give min_mass=0"):
        replaced(traced, ReplaceAttention("depthwise_conv", min_mass=0.5))


def test_heads_of_any_number() -> None:
    traced = program(lambda m, x: attention(x, x, x), normal(2, 3, 5, 4))
    with pytest.raises(RewriteError, match="its heads have no fixed number and size"):
        replaced(traced, ReplaceAttention("nystrom"))


def test_a_program_without_attention() -> None:
    traced = program(lambda m, x: x * 2, X)
    with pytest.raises(RewriteError, match="the program has no attention; fxpress inspect --explain canonicalize says"):
        replaced(traced, ReplaceAttention("nystrom"))


def test_attention_of_integers() -> None:
    before, _ = rewritten(plain(), Quantize(attention="int8"))
    with pytest.raises(RewriteError, match="multiplies integers already; put replace_attention before quantize"):
        replaced(before, ReplaceAttention("nystrom"))


def test_of_several_kinds_those_that_fit_are_tried() -> None:
    result = replaced(causal(), ReplaceAttention(["nystrom", "exact"], layers="auto"))
    assert result.rewrites == {"exact": 1}
    assert reasons(result, "nystrom") == ["it is causal, and nystrom would mix later tokens in"]
