"""RemovePadding: the same at tokens, zeros at padding; refused where padding counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from build import normal, program, rewritten
from sampled import sampled
from torch import Tensor, nn
from torch.export import Dim
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fxpress import compile
from fxpress.compiler.driver import Compiled
from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.padding import pack_tokens, packed_attention, unpack_tokens
from fxpress.ir.printer import print_program
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, RemovePadding, ReplaceAttention

WIDTH = 8
After = Callable[[Any, Tensor, Tensor], Any]
SIZES = [(3, 7), (1, 5), (2, 1), (1, 1), (5, 2)]


class Block(nn.Module):
    """One block of a Transformer on x [B, N, 8], attention with a key mask; then `after(self, tokens, key_mask)`."""

    def __init__(self, after: After | None = None, **options: Any) -> None:
        super().__init__()
        self.after, self.options = after, options
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
            getattr(self, name).weight.data = normal(WIDTH, WIDTH, seed=ord(name)) / 3
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, key_mask: Tensor) -> Any:
        heads = [getattr(self, name)(x).unflatten(-1, (2, 4)).transpose(1, 2) for name in ("q", "k", "v")]
        found = attention(*heads, key_mask=key_mask, **self.options).transpose(1, 2).flatten(2)
        tokens = self.norm(x + self.o(found))
        return tokens if self.after is None else self.after(self, tokens, key_mask)


def masked(batch: int, length: int) -> Tensor:
    """The first sample full, then padded at the end, at the beginning, with a hole, without any token."""
    found = torch.ones(batch, length, dtype=torch.bool)
    for row, hidden in enumerate((slice(0), slice(length - length // 3, None), slice(length // 2), slice(1, 2))):
        if row < batch:
            found[row, hidden] = False
    found[4:] = False
    return found


def inputs(batch: int = 3, length: int = 6) -> list[Tensor]:
    return [normal(batch, length, WIDTH, seed=length), masked(batch, length)]


def traced(after: After | None = None, *, fixed: bool = False, **options: Any) -> Program:
    torch.manual_seed(0)
    axes = {0: Dim("batch"), 1: Dim("length")}
    return canonical(Block(after, **options), None if fixed else {"x": axes, "key_mask": axes})


def canonical(model: nn.Module, dynamic: Any = None) -> Program:
    found, _ = rewritten(program(model, *inputs(), dynamic=dynamic), Canonicalize())
    return found


def close(found: Any, expected: Any, real: Tensor) -> None:
    """Equal at tokens, zero at padding; `expected` [B, N, ...]."""
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-6)
    assert not found[~real].any()


def test_the_graph(golden: Callable[[str], None]) -> None:
    before = traced(lambda m, tokens, mask: [tokens, tokens[:, 0]])
    after, result = rewritten(before, RemovePadding(), Context(inputs()))
    golden(f"before\n{print_program(before)}\nafter\n{print_program(after)}")
    assert result.matches[0].detail == "15 calls on tokens alone, 1 of them attention; padding is 28% of the example"


@pytest.mark.parametrize(
    "options", [{}, {"right": 0}, {"scale": 0.1, "softcap": 3.0}, {"left": 1, "right": 1}], ids=str
)
def test_tokens_are_the_same(options: dict[str, Any]) -> None:
    before = traced(**options)
    after, _ = rewritten(before, RemovePadding())
    for sizes in SIZES:
        given = inputs(*sizes)
        close(after.run(given)[0], before.run(given)[0], given[1])


def test_sizes_may_be_fixed() -> None:
    before = traced(fixed=True)
    after, _ = rewritten(before, RemovePadding())
    close(after.run(inputs())[0], before.run(inputs())[0], inputs()[1])


def test_what_padding_holds_does_not_count() -> None:
    after, _ = rewritten(traced(), RemovePadding())
    x, key_mask = inputs()
    expected = after.run([x, key_mask])[0]
    found = after.run([x.masked_fill(~key_mask[..., None], torch.nan), key_mask])[0]
    assert torch.equal(found, expected)


def test_a_batch_of_padding_alone() -> None:
    after, _ = rewritten(traced(), RemovePadding())
    x, key_mask = inputs()
    assert not after.run([x, torch.zeros_like(key_mask)])[0].any()


def test_attention_of_other_kinds_sees_the_batch() -> None:
    bias = normal(2, 6, 6)

    class Biased(Block):
        def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
            rows = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
            return self.o(attention(rows, rows, rows, self.bias, key_mask).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Biased()
    model.register_buffer("bias", bias)
    before = canonical(model)
    after, _ = rewritten(before, RemovePadding())
    assert (
        len(after.calls(attention)) == 1 and len(after.calls(unpack_tokens)) == 4 and not after.calls(packed_attention)
    )
    close(after.run(inputs())[0], before.run(inputs())[0], inputs()[1])


def test_what_differs_by_place_is_packed_with_the_tokens() -> None:
    def after(m: Any, tokens: Tensor, key_mask: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])[:, None] * 0.1
        return tokens * places + torch.arange(tokens.shape[0])[:, None, None]

    before = traced(after)
    found, _ = rewritten(before, RemovePadding())
    for sizes in SIZES:
        given = inputs(*sizes)
        close(found.run(given)[0], before.run(given)[0], given[1])


def test_tied_weights_and_several_readers_of_tokens() -> None:
    def after(m: Any, tokens: Tensor, key_mask: Tensor) -> list[Tensor]:
        return [m.o(tokens), m.o(m.q(tokens)), tokens, tokens.transpose(0, 1)]

    before = traced(after)
    found, _ = rewritten(before, RemovePadding())
    given = inputs()
    for mine, theirs in zip(found.run(given)[:3], before.run(given)[:3], strict=True):
        close(mine, theirs, given[1])
    close(found.run(given)[3], before.run(given)[3], given[1].T)


def test_sizes_of_tokens_are_those_of_the_batch() -> None:
    before = traced(lambda m, tokens, key_mask: [tokens, tokens.new_ones(tokens.shape)])
    after, _ = rewritten(before, RemovePadding())
    assert after.run(inputs(2, 5))[1].shape == (2, 5, WIDTH)


def test_a_second_run_changes_nothing() -> None:
    after, _ = rewritten(traced(), RemovePadding())
    assert rewritten(after, RemovePadding())[1].changes == 0


def test_max_rewrites() -> None:
    assert rewritten(traced(), RemovePadding(), Context(max_rewrites=0))[1].changes == 0


def test_it_can_be_trained() -> None:
    after, _ = rewritten(traced(), RemovePadding())
    x, key_mask = inputs()
    after.run([x.requires_grad_(), key_mask])[0].square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad.abs().sum(-1) > 0, key_mask)


# --- pooling ---------------------------------------------------------------------------------------------------


def weights(tokens: Tensor, mask: Tensor) -> Tensor:
    return mask[..., None].expand(tokens.shape).to(tokens.dtype)


POOLINGS: dict[str, After] = {
    "mean by weights": lambda m, x, mask: (x * weights(x, mask)).sum(1) / weights(x, mask).sum(1).clamp(min=1e-9),
    "mean by count": lambda m, x, mask: (
        x.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    ),
    "maximum": lambda m, x, mask: x.masked_fill(~mask[..., None], -1e9).amax(1),
    "by heads": lambda m, x, mask: (x.reshape(*x.shape[:2], 2, 4).transpose(1, 2) * mask[:, None, :, None]).sum(2),
    "chosen": lambda m, x, mask: torch.where(mask[..., None], x, 2.0).mean(1),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_under_the_mask_is_the_same(name: str) -> None:
    """Samples without any token, too: what is at padding is known."""
    before = traced(POOLINGS[name])
    after, _ = rewritten(before, RemovePadding())
    for sizes in SIZES:
        given = inputs(*sizes)
        torch.testing.assert_close(after.run(given), before.run(given), rtol=1e-5, atol=1e-6)


def test_pooling_under_another_mask_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"aten.sum.dim_IntList reads tokens that are padding"):
        rewritten(traced(lambda m, x, mask: (x * (mask | mask.flip(1))[..., None]).sum(1)), RemovePadding())


# --- what reads padding ----------------------------------------------------------------------------------------


READERS: dict[str, After] = {
    "aten.mean.dim": lambda m, tokens, mask: tokens.mean(1),
    "aten.flip": lambda m, tokens, mask: tokens.flip(1),
    "aten.cumsum": lambda m, tokens, mask: tokens.cumsum(1),
    "aten.max": lambda m, tokens, mask: tokens.max(),
    "aten.slice.Tensor": lambda m, tokens, mask: tokens[:, 1:],
    "aten.matmul": lambda m, tokens, mask: tokens @ tokens.transpose(1, 2),
    "aten.reshape": lambda m, tokens, mask: tokens.reshape(-1, 4),
    "aten.softmax.int": lambda m, tokens, mask: tokens.softmax(1),
    "fxpress.attention": lambda m, tokens, mask: attention(*[tokens[:, None]] * 3),
}


@pytest.mark.parametrize("name", READERS)
def test_refused_where_padding_counts(name: str) -> None:
    with pytest.raises(RewriteError, match=f"padding cannot be removed: {name} reads tokens that are padding"):
        rewritten(traced(READERS[name], fixed=True), RemovePadding())


def test_single_tokens_may_be_read() -> None:
    def after(m: Any, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        last = mask.to(torch.int64).sum(1) - 1
        return [tokens[:, 0], tokens[torch.arange(tokens.shape[0]), last]]

    before = traced(after)
    found, _ = rewritten(before, RemovePadding())
    given = [normal(3, 6, WIDTH), torch.arange(6) < torch.tensor([6, 3, 1])[:, None]]
    for mine, theirs in zip(found.run(given), before.run(given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_padding_counts_for_ahead_of_attention_stays() -> None:
    class Counting(Block):
        def forward(self, x: Tensor, key_mask: Tensor) -> Any:
            scaled = x * 2
            return super().forward(scaled + scaled.cumsum(1), key_mask)

    torch.manual_seed(0)
    axes = {0: Dim("batch"), 1: Dim("length")}
    before = canonical(Counting(), {"x": axes, "key_mask": axes})
    after, result = rewritten(before, RemovePadding())
    assert result.changes == 1
    for sizes in SIZES:
        given = inputs(*sizes)
        close(after.run(given)[0], before.run(given)[0], given[1])


def test_refused_without_a_key_mask() -> None:
    before = program(lambda m, x: attention(x, x, x), normal(2, 2, 5, 4))
    with pytest.raises(RewriteError, match=r"no attention among tokens has a key mask .*; give an attention mask"):
        rewritten(before, RemovePadding())


@pytest.mark.parametrize(("kind", "name"), [("random_sparse", "align_tokens"), ("depthwise_conv", "conv_attention")])
def test_refused_behind_attention_that_needs_places(kind: str, name: str) -> None:
    before, _ = rewritten(traced(), ReplaceAttention(kind), Context(calibration=[inputs()]))
    with pytest.raises(RewriteError, match=rf"fxpress\.{name} takes tokens by their places .*; leave out remove_pad"):
        rewritten(before, RemovePadding())


def test_attention_to_others_is_not_among_tokens() -> None:
    def function(m: Any, x: Tensor, y: Tensor, key_mask: Tensor) -> Tensor:
        return attention(x[:, None], y[:, None], y[:, None], key_mask=key_mask)

    before = program(function, normal(2, 5, 4), normal(2, 5, 4), masked(2, 5), dynamic=None)
    with pytest.raises(RewriteError, match="no attention among tokens"):
        rewritten(before, RemovePadding())


def test_queries_that_are_as_many_as_the_keys_are_other_tokens() -> None:
    """Of fixed sizes, by which they cannot be told apart: a decoder's, none of which is padding."""

    class Crossed(Block):
        def forward(self, x: Tensor, key_mask: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            tokens = super().forward(x, key_mask)
            heads = [item.unflatten(-1, (2, 4)).transpose(1, 2) for item in (y, tokens, tokens)]
            return self.norm(y + self.o(attention(*heads, key_mask=key_mask).transpose(1, 2).flatten(2)))

    given = [*inputs(), normal(3, 6, WIDTH, seed=9)]
    before, _ = rewritten(program(Crossed(), *given), Canonicalize())
    after, result = rewritten(before, RemovePadding())
    assert result.rewrites
    kept = given[1].any(1)  # of a source without tokens nothing is defined
    torch.testing.assert_close(after.run(given)[0][kept], before.run(given)[0][kept], rtol=1e-5, atol=1e-6)


# --- whole models ----------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
}
WIDE: dict[str, Any] = {
    "d_model": 32,
    "vocab_size": 60,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(**TINY)),
    "bert with a head": lambda: BertForMaskedLM(BertConfig(**TINY)),
    "roberta": lambda: RobertaModel(RobertaConfig(**TINY, max_position_embeddings=40)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**TINY, pad_token_id=0, local_attention=6)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**WIDE, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
    "bart": lambda: BartModel(
        BartConfig(
            **WIDE,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=40,
        )
    ),
}


def tokens(name: str, batch: int, length: int) -> dict[str, Tensor]:
    """Every second sample padded in its last third."""
    ids = torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(length))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["attention_mask"][1::2, length - length // 3 :] = 0
    if name in ("t5", "bart"):
        found["decoder_input_ids"] = ids[:, :4].flip(1)
    return found


def compiled(name: str, passes: str, backend: str = "eager", **options: Any) -> Compiled:
    torch.manual_seed(0)
    return compile(MODELS[name]().eval(), passes, tokens(name, 2, 12), backend=backend, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "onnx"])
@pytest.mark.parametrize("name", sampled(MODELS, few=("bert with a head", "modernbert", "t5", "llama")))
def test_models_equal_eager_at_tokens(name: str, backend: str) -> None:
    found = compiled(name, "remove_padding, fuse", backend)
    assert found.report.equal and found.report.passes[1].changes == 1
    for sizes in ((3, 17), (1, 9), (4, 6)):
        assert found.verify(tokens(name, *sizes)).equal


def test_an_encoder_and_a_decoder_with_a_mask_each() -> None:
    torch.manual_seed(0)

    def both(batch: int, length: int) -> dict[str, Tensor]:
        given = tokens("bart", batch, length)
        mask = torch.ones_like(given["decoder_input_ids"])
        mask[1:, 2:] = 0
        return given | {"decoder_attention_mask": mask}

    found = compile(MODELS["bart"]().eval(), "remove_padding, fuse", both(2, 12), backend="eager")
    assert found.report.passes[1].changes == 2 and found.report.equal
    assert len(found.program.calls(packed_attention)) == 2 and len(found.program.calls(attention)) == 1
    assert found.verify(both(3, 7)).equal


def test_fewer_numbers_are_multiplied_and_padding_is_zero() -> None:
    found = compiled("bert", "remove_padding, fuse")
    assert found.report.macs_after < 0.88 * found.report.macs_before  # a sixth of the tokens is padding
    given = tokens("bert", 2, 12)
    assert not found(**given).last_hidden_state[given["attention_mask"] == 0].any()


def test_before_or_after_fuse_is_the_same() -> None:
    first, second = compiled("bert", "remove_padding, fuse"), compiled("bert", "fuse, remove_padding")
    given = tokens("bert", 3, 9)
    assert torch.equal(first(**given).last_hidden_state, second(**given).last_hidden_state)
    assert first.report.equal and second.report.equal


@pytest.mark.parametrize(
    "passes",
    [
        "remove_padding, quantize(int8), fuse",
        "quantize(int8), remove_padding, fuse",
        "quantize(int8, mode=dynamic, granularity=token), remove_padding, fuse",
        "mask_weights(0.5, magnitude), remove_padding, fuse",
        "mask_weights(0.25, magnitude, 'heads+neurons'), remove_padding, fuse",
        "replace_attention(sliding_window, window=5, force=True), remove_padding, fuse",
        "replace_attention(nystrom, landmarks=3, force=True), remove_padding, fuse",
    ],
)
def test_it_composes_with_other_passes(passes: str) -> None:
    """With the same passes without it, the tokens are the same."""
    calibration = [tokens("bert", 2, 12), tokens("bert", 3, 8)]
    found = compiled("bert", passes, calibration=calibration)
    without = compiled("bert", passes.replace("remove_padding, ", ""), calibration=calibration)
    given = tokens("bert", 4, 11)
    real = given["attention_mask"] > 0
    mine, theirs = (item(**given).last_hidden_state[real] for item in (found, without))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert found.program.calls(pack_tokens)


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ("quantize(int8, mode=dynamic), remove_padding", "fxpress.dynamic_quantize reads tokens that are padding"),
        ("remove_padding, replace_attention(linformer, force=True)", "put remove_padding behind replace_attention"),
        ("integer_only, remove_padding", "leave out remove_padding, or integer_only before it"),
        ("remove_padding, mask_weights(0.5, magnitude, heads)", "there are no heads that can be cut"),
    ],
)
def test_orders_that_do_not_work_say_so(passes: str, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        compiled("bert", passes, calibration=[tokens("bert", 2, 12)])


def test_attention_of_packed_tokens_stays_in_floats() -> None:
    found = compiled("bert", "remove_padding, quantize(int8, attention=int8)", calibration=[tokens("bert", 2, 12)])
    assert "put remove_padding behind quantize" in found.report.passes[2].refusals[0]["reason"]


def test_a_key_mask_that_is_part_of_a_bias_is_none() -> None:
    config = DebertaV2Config(**TINY, relative_attention=True, pos_att_type=["p2c", "c2p"])
    with pytest.raises(RewriteError, match="no attention among tokens has a key mask"):
        compile(DebertaV2Model(config).eval(), "remove_padding", tokens("bert", 2, 12), backend="eager")


def test_it_runs_in_torch_compile() -> None:
    """Whose sizes are fixed at first, and dynamic from the second on."""
    model = Block().eval()
    quick = torch.compile(model, backend="fxpress", options={"passes": ["remove_padding"], "backend": "eager"})
    with torch.no_grad():
        for sizes in SIZES[:3]:
            given = inputs(*sizes)
            close(quick(*given), model(*given), given[1])
