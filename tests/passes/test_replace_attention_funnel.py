"""ReplaceAttention("funnel"): what follows a pooled attention has the pooled tokens, until something needs all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import before_after, normal, program, rewritten
from torch import Tensor, nn
from torch.export import Dim

from fxpress import compile
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program, shape
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.pool import pool_mask, pool_tokens, unpool_tokens
from fxpress.passes import Canonicalize, ReplaceAttention

HEADS, WIDTH = 2, 8


class Layer(nn.Module):
    """A post-norm layer of attention and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        found = attention(query, key, value, key_mask=mask).transpose(1, 2).flatten(2)
        x = self.first(x + self.o(found))
        return self.second(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Layers, with a head that reads what it wants of the last tokens."""

    def __init__(self, layers: int = 2, head: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = head

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.head is None else self.head(x, mask)


def inputs(batch: int = 2, length: int = 6) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    return normal(batch, length, WIDTH, seed=length), mask


def traced(layers: int = 2, head: Callable[[Tensor, Tensor], Tensor] | None = None) -> Program:
    model = Encoder(layers, head).eval()
    axes = {0: Dim("batch"), 1: Dim("length", min=2)}
    return rewritten(trace(model, bind_example(model, inputs()), {"x": axes, "mask": axes}), Canonicalize())[0]


def pooled(before: Program, layer: int = 0, **options: Any) -> Program:
    return rewritten(before, ReplaceAttention("funnel", [f"layers.{layer}"], **options))[0]


def test_the_graph(golden: Callable[[str], None]) -> None:
    before = traced(1)
    after, result = rewritten(before, ReplaceAttention("funnel"))
    golden(before_after(before, after, result))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("residual", [False, True])
def test_a_stride_of_one_is_exact(residual: bool, length: int) -> None:
    before = traced()
    x = inputs(2, length)
    found = pooled(before, stride=1, residual=residual).run(x)[0]
    torch.testing.assert_close(found, before.run(x)[0], rtol=1e-5, atol=1e-5)


def test_the_layers_that_follow_have_the_pooled_tokens() -> None:
    after = pooled(traced(3), 1)
    first, second, third = after.calls(attention)
    length, fewer = shape(first)[2], shape(second)[2]
    assert str(fewer) != str(length) and str(shape(third)[2]) == str(fewer)
    assert [str(shape(node.args[1])[2]) for node in (first, second, third)] == [str(length), str(length), str(fewer)]
    assert len(after.calls(pool_mask)) == 1 and len(after.calls(unpool_tokens)) == 1


def test_what_is_computed_is_that_of_pooled_tokens() -> None:
    """By hand: the second layer with pooled queries and residual."""
    model, (x, mask) = Encoder(2).eval(), inputs()
    tokens = model.layers[0](x, mask)
    layer = model.layers[1]
    few = pool_tokens(tokens, mask)
    query, key, value = (
        item.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)
        for item in (layer.q(few), layer.k(tokens), layer.v(tokens))
    )
    found = attention(query, key, value, key_mask=mask).transpose(1, 2).flatten(2)
    middle = layer.first(few + layer.o(found))
    last = layer.second(middle + layer.down(F.gelu(layer.up(middle))))
    after = pooled(traced(), 1, residual=False)
    torch.testing.assert_close(after.run((x, mask))[0], unpool_tokens(last, x), rtol=1e-5, atol=1e-5)
    kept = pooled(traced(), 1)
    expected = tokens + unpool_tokens(last - few, x)
    torch.testing.assert_close(kept.run((x, mask))[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_padding_changes_nothing(length: int) -> None:
    after = pooled(traced())
    x = normal(1, length, WIDTH)
    alone = after.run((x, torch.ones(1, length, dtype=torch.bool)))[0]
    wide = F.pad(x, (0, 0, 0, 200), value=3.0)
    mask = F.pad(torch.ones(1, length, dtype=torch.bool), (0, 200))
    torch.testing.assert_close(after.run((wide, mask))[0][:, :length], alone, rtol=1e-5, atol=1e-5)


def test_the_first_token_needs_no_up_sampling() -> None:
    after = pooled(traced(2, lambda x, mask: torch.tanh(x[:, 0])))
    assert after.calls(unpool_tokens) == []


HEADS_OF_ALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean of real tokens": lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "mean": lambda x, mask: x.mean(1),
    "another token": lambda x, mask: x[:, 1],
    "a softmax over tokens": lambda x, mask: x.softmax(1),
    "running sums": lambda x, mask: x.cumsum(1),
}


@pytest.mark.parametrize("head", HEADS_OF_ALL)
def test_what_reads_tokens_together_reads_all(head: str) -> None:
    before = traced(2, HEADS_OF_ALL[head])
    tokens = pooled(traced())
    x = inputs()
    expected = HEADS_OF_ALL[head](tokens.run(x)[0], x[1])
    torch.testing.assert_close(pooled(before).run(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_pooling_twice() -> None:
    """A quarter of the tokens behind the second; each up-sampling undoes its own."""
    after = pooled(pooled(traced(3), 0), 2)
    x = inputs(2, 9)
    assert after.run(x)[0].shape == (2, 9, WIDTH)
    assert len(after.calls(unpool_tokens)) == 2
    lengths = [node.meta["val"].shape[2] for node in after.calls(attention)]
    assert len({str(length) for length in lengths}) == 2  # of the first two, pooled once, and of the third


@pytest.mark.slow
def test_in_onnx_at_every_length(tmp_path: Path) -> None:
    compiled = compile(Encoder(3).eval(), [ReplaceAttention("funnel", ["layers.1"], force=True)], inputs())
    for size in ((2, 6), (3, 9), (1, 1), (2, 2), (1, 40)):
        x = inputs(*size)
        torch.testing.assert_close(compiled(*x), compiled.program(*x), rtol=1e-4, atol=1e-5)


def test_a_fixed_length_is_refused() -> None:
    before = program(Encoder(1).eval(), *inputs(), dynamic=None)
    with pytest.raises(RewriteError, match="its length is fixed; compile with dynamic_shapes='auto'"):
        rewritten(rewritten(before, Canonicalize())[0], ReplaceAttention("funnel"))


def test_it_cannot_be_tried_by_itself() -> None:
    with pytest.raises(InputError, match="layers='auto' cannot try funnel, which changes more than the attention"):
        ReplaceAttention("funnel", layers="auto")


@pytest.mark.parametrize(("options", "problem"), [
    ({"stride": 0}, "stride must be an integer, 1 or more, found 0"),
    ({"stride": 2.0}, "stride must be an integer, 1 or more, found 2.0"),
    ({"residual": 1}, "residual must be True or False, found 1"),
])  # fmt: skip
def test_bad_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        ReplaceAttention("funnel", **options)
