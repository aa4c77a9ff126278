"""ReplaceAttention: goldens, which attentions are replaced, what is stored, training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import integers
import pytest
import torch
from build import assert_equal, before_after, normal, program, reasons, rewritten
from sites import BITING
from torch import Tensor, nn
from torch.export import Dim

from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.low_rank_attention import nystrom_attention
from fxpress.ir.printer import print_program
from fxpress.ir.replacement.kind import Kind
from fxpress.ir.replacement.kinds.depthwise_conv import DepthwiseConv
from fxpress.ir.replacement.kinds.graph import Graph
from fxpress.ir.rewrite import Context, PassResult
from fxpress.passes import Canonicalize, ReplaceAttention

X = normal(2, 4, 9, 4)
TEXTS = [integers.batch(3, length, seed=length) for length in (12, 16, 20)]
QUICK = {"linear": {"steps": 2}, "linformer": {"steps": 2}, "depthwise_conv": {"steps": 2}}
EVERY = [
    dataclasses.replace(kind, **QUICK.get(name, {}))
    for name, kinds in BITING.items()
    for kind in kinds
    if not (isinstance(kind, Graph) and kind.adjacency)  # which needs sequences of limited length
]
BY_TEXT = {str(kind): kind for kind in EVERY}
every = pytest.mark.parametrize("kind", EVERY, ids=str)


def replace(kind: Kind, **options: Any) -> ReplaceAttention:
    """The pass with a kind's options."""
    own = {entry.name: getattr(kind, entry.name) for entry in dataclasses.fields(kind)}
    return ReplaceAttention(kind.kind_name(), **options, **own)


@functools.cache
def encoder(layers: int = 2) -> Program:
    """An encoder with a key mask, canonical; not to be changed."""
    return integers.canonical(integers.Encoder(layers=layers))


def replaced(rewrite: ReplaceAttention, layers: int = 2, **context: Any) -> tuple[Program, PassResult]:
    return rewritten(encoder(layers), rewrite, Context(calibration=TEXTS, **context))


@functools.cache
def once(text: str) -> tuple[Program, PassResult]:
    """The encoder with all its attention of a kind; not to be changed."""
    return replaced(replace(BY_TEXT[text]))


def names(result: PassResult) -> list[str]:
    """Of the attentions that were replaced."""
    return [match.node for match in result.matches]


# --- golden graphs ---------------------------------------------------------------------------------------------

GOLDEN = {
    "band": ReplaceAttention("sliding_window", window=128),
    "nystrom": ReplaceAttention("nystrom", landmarks=32),
    "performer": ReplaceAttention("performer", features=8),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_graph(case: str, golden: Callable[[str], None]) -> None:
    golden(before_after(encoder(1), *rewritten(encoder(1), GOLDEN[case])))


# --- every kind ------------------------------------------------------------------------------------------------


@every
def test_every_attention_is_replaced_and_reported(kind: Kind) -> None:
    after, result = once(str(kind))
    assert result.rewrites == {kind.kind_name(): 2} and result.refusals == []
    assert [(match.node, match.detail) for match in result.matches] == [
        ("layers.0", str(kind)),
        ("layers.1", str(kind)),
    ]
    outputs = after.run(integers.batch(2, 9))[0]
    assert outputs.shape == (2, 9, 12) and outputs.isfinite().all()


REMAIN = ("exact",)  # which is exact attention again


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind.kind_name() not in REMAIN], ids=str)
def test_a_second_time_nothing_changes(kind: Kind) -> None:
    before, _ = once(str(kind))
    after, result = rewritten(before, replace(kind), Context(calibration=TEXTS))
    assert result.changes == 0 and print_program(before) == print_program(after)


@pytest.mark.parametrize("empty", ["zeros", "mean"])
@pytest.mark.parametrize("options", [("exact", {}), ("sliding_window", {"window": 8})], ids=str)
def test_a_token_that_sees_nothing_gives_what_it_did(options: tuple[str, Any], empty: str) -> None:
    """The first, where a token does not see itself."""
    before = program(lambda m, x: attention(x, x, x, right=-1, empty=empty), normal(2, 2, 5, 4), dynamic=None)
    after, result = rewritten(before, ReplaceAttention(options[0], **options[1]))
    assert result.changes == 1
    assert_equal(before, after, [normal(2, 2, 5, 4)])


@pytest.mark.parametrize("layers", ["all", "auto"])
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind.needs_calibration], ids=str)
def test_weights_are_fitted_for_half_precision_too(kind: Kind, layers: str) -> None:
    budget = {"min_cosine": 0.01} if layers == "auto" else {}
    before = program(lambda m, x: attention(x, x, x), X.bfloat16(), dynamic={"x": {0: Dim("batch"), 2: Dim("n")}})
    after, result = rewritten(before, replace(kind, layers=layers, **budget), Context(calibration=[[X.bfloat16()]]))
    assert result.changes == 1
    assert after.run([X.bfloat16()])[0].dtype is torch.bfloat16


@pytest.mark.parametrize("size", [(2, 7), (1, 1), (3, 40)])
@pytest.mark.parametrize("options", [("exact", {}), ("nystrom", {}), ("sliding_window", {"window": 64})], ids=str)
def test_what_sees_all_keys_gives_what_the_model_does(options: tuple[str, Any], size: tuple[int, int]) -> None:
    after, _ = replaced(ReplaceAttention(options[0], **options[1]))
    given = integers.batch(*size)
    mask = given[1]  # rows of padding may differ
    torch.testing.assert_close(after.run(given)[0][mask], encoder().run(given)[0][mask], rtol=1e-4, atol=1e-5)


def test_a_program_is_changed_in_no_other_place() -> None:
    after, _ = replaced(ReplaceAttention("nystrom"))
    old = [node.target for node in encoder().graph.nodes if node.target is not attention]
    assert [node.target for node in after.graph.nodes if node.target is not nystrom_attention] == old


# --- weights ---------------------------------------------------------------------------------------------------


def added(rewrite: ReplaceAttention) -> tuple[set[str], set[str]]:
    """Trainable weights and buffers that the program did not have, without the layer."""
    after, _ = replaced(rewrite)
    before = set(dict(encoder().module.state_dict()))
    found = {name for name, weight in after.module.named_parameters() if weight.requires_grad} - before
    return tuple(  # type: ignore[return-value]
        {name.removeprefix("layers__0_") for name in part if "__0_" in name}
        for part in (found, set(dict(after.module.named_buffers())))
    )


STORED: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "performer": ({}, set(), {"performer_projection"}),
    "lsh": ({}, set(), {"lsh_rotations"}),
    "linear": ({"steps": 2}, {"linear_query_features", "linear_key_features", "linear_gain"}, set()),
    "linformer": ({"projection": "fitted", "steps": 2}, {"linformer_pooling"}, set()),
    "depthwise_conv": ({}, {"depthwise_conv_taps"}, set()),
    "nystrom": ({}, set(), set()),
    "random_sparse": ({}, set(), set()),
}


@pytest.mark.parametrize("name", STORED)
def test_weights_are_stored_with_the_program(name: str) -> None:
    """What is learned as parameters; projections and rotations as buffers."""
    options, parameters, buffers = STORED[name]
    assert added(ReplaceAttention(name, **options)) == (parameters, buffers)


def test_heads_are_chosen_by_integers_that_are_buffers() -> None:
    _, buffers = added(ReplaceAttention("depthwise_conv", kernel=5, min_mass=0.3005))
    assert buffers == {f"depthwise_conv_{name}" for name in ("mixed", "others", "order")}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["performer", "lsh", "nystrom"])
def test_weights_have_the_dtype_of_the_queries(name: str, half: torch.dtype) -> None:
    x, mask = integers.batch()
    traced = program(integers.Encoder(layers=1).to(half), x.to(half), mask)
    after, _ = rewritten(rewritten(traced, Canonicalize())[0], ReplaceAttention(name))
    assert all(tensor.dtype is half for tensor in after.module.buffers())
    assert after.run([x.to(half), mask])[0].dtype is half


@every
def test_a_step_of_training(kind: Kind) -> None:
    """Every trainable weight, those of the kind too, has a finite gradient; fixed taps read no query and no key."""
    after = once(str(kind))[0].copy()
    loss = (after.run(integers.batch(2, 13, seed=4))[0] - 1).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    unread = (".q.weight", ".q.bias", ".k.weight", ".k.bias") if kind == DepthwiseConv(5, steps=2) else ()
    for name, weight in after.module.named_parameters():
        if not name.endswith(unread):
            assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_fits_of_later_layers_know_the_earlier_ones() -> None:
    """Taps of the second layer are those of what a convolution in the first makes of the data."""
    both, _ = replaced(ReplaceAttention("depthwise_conv", kernel=3))
    second, _ = replaced(ReplaceAttention("depthwise_conv", layers=["layers.1"], kernel=3))
    name = "layers__1_depthwise_conv_taps"
    assert not torch.equal(getattr(both.module, name), getattr(second.module, name))


# --- shapes of graphs ------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One attention block twice: tied weights; the result of the second is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = integers.Layer(False, nn.functional.gelu, False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x, mask)
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.block.q, self.block.k, self.block.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        return self.block.o(mixed.transpose(1, 2).flatten(2)), mixed * 2


@pytest.mark.parametrize("name", ["performer", "linear", "sliding_window"])
def test_layers_with_tied_weights_are_replaced_each(name: str) -> None:
    before = integers.canonical(Shared())
    after, result = rewritten(before, ReplaceAttention(name, **QUICK.get(name, {})), Context(calibration=TEXTS))
    assert result.changes == 2
    old, new = (sum(weight.numel() for weight in item.module.parameters()) for item in (before, after))
    assert new - old == (2 * (2 * 3 * 4 * 64 + 3) if name == "linear" else 0)  # features and gains
    block, both = after.run(integers.batch(2, 9))
    expected = nn.functional.linear(
        both.transpose(1, 2).flatten(2) / 2, after.module.block.o.weight, after.module.block.o.bias
    )
    torch.testing.assert_close(block, expected)


# --- which attentions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"layers": ["layers.1"]}, [1]),
        ({"layers": ["layers"]}, [0, 1, 2]),
        ({"layers": ["*.[02]"]}, [0, 2]),
        ({"layers": ["layers.?"]}, [0, 1, 2]),
        ({"layers": [2, 0]}, [0, 2]),
        ({"layers": [0, "layers.2"]}, [0, 2]),
        ({"skip": ["layers.0"]}, [1, 2]),
        ({"skip": [1]}, [0, 2]),
        ({"layers": [0, 1], "skip": ["layers.1"]}, [0]),
        ({"layers": [0], "skip": [0]}, []),
        ({"layers": []}, []),
    ],
    ids=str,
)
def test_layers_that_are_meant(options: dict[str, Any], expected: list[int]) -> None:
    after, result = replaced(ReplaceAttention("nystrom", **options), 3)
    assert names(result) == [f"layers.{index}" for index in expected]
    assert len(after.calls(nystrom_attention)) == len(expected)


def test_numbers_count_the_attentions_that_are_left() -> None:
    before, _ = replaced(ReplaceAttention("nystrom", layers=[0]), 3)
    _, result = rewritten(before, ReplaceAttention("nystrom", layers=[0]))
    assert names(result) == ["layers.1"]


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"layers": "auto", "min_cosine": 0.1}], ids=str)
def test_as_many_attentions_as_rewrites_are_left(options: dict[str, Any], budget: int) -> None:
    after, result = replaced(ReplaceAttention("sliding_window", window=4, **options), 3, max_rewrites=budget)
    assert result.changes == budget
    assert len([node for node in after.calls(attention) if node.args[5:]]) == budget


# --- several attentions, some of which can be replaced ---------------------------------------------------------


def test_what_cannot_be_replaced_stays_and_says_why() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = x.unflatten(-1, (3, 4)).transpose(1, 2)
        return attention(attention(rows, rows, rows, right=0), rows, rows).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]

    before = program(forward, normal(2, 5, 12), dynamic={"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("n")}})
    after, result = rewritten(before, ReplaceAttention("nystrom"))
    assert result.changes == 1 and reasons(result) == ["it is causal, and nystrom would mix later tokens in"]
    assert len(after.calls(attention)) == 1
    with pytest.raises(RewriteError):
        rewritten(after, ReplaceAttention("nystrom"))
