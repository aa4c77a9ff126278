"""Replacements against the modules of transformers that compute the same thing: same weights, same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import normal
from torch import Tensor, nn

from fxpress.ir import graph  # noqa: F401  # registers every family
from fxpress.ir.ops.low_rank_attention import nystrom_attention
from fxpress.ir.ops.window_attention import window_attention

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def heads(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """[B, N, WIDTH] -> [B, HEADS, N, SIZE]."""
    return layer(hidden).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def merged(result: Tensor) -> Tensor:
    """[B, HEADS, N, SIZE] -> [B, N, WIDTH]."""
    return result.transpose(1, 2).flatten(2)


def longformer(
    length: int, window: int, global_tokens: int, real: int, local: bool
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The attention module of a tiny LongformerModel; what it was given and gave, and the key mask.

    Args:
        real: how many tokens of the first sample are no padding.
        local: whether what global tokens are projected by is the projection of the others.
    """
    module = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = module.LongformerConfig(
        vocab_size=30, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=8,
        attention_window=window, max_position_embeddings=100, initializer_range=0.8,
    )  # fmt: skip
    model = module.LongformerModel(config).eval()
    layer = model.encoder.layer[0].attention.self
    if local:
        for name in ("query", "key", "value"):
            getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, given, result: seen.extend((given[0], result[0])))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, real:] = 0
    everywhere = torch.zeros_like(mask)
    everywhere[:, :global_tokens] = 1
    ids = torch.randint(3, 30, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, attention_mask=mask, global_attention_mask=everywhere)
    return layer, seen[0], seen[1], mask.bool()


@pytest.mark.parametrize("real", [24, 13])
@pytest.mark.parametrize("global_tokens", [0, 1, 3])
@pytest.mark.parametrize("window", [4, 8, 12])
def test_longformer(window: int, global_tokens: int, real: int) -> None:
    """A window of w is w / 2 keys on each side. Lengths are multiples of w here; Longformer pads others up to one.

    Rows of padding are not compared: Longformer gives zeros there, ours attends from them as from any other. Its
    masked scores are finite (-10000 added, and fp32's lowest), which is of no consequence beside real keys.
    """
    layer, hidden, expected, mask = longformer(24, window, global_tokens, real, local=True)
    projected = (heads(getattr(layer, name), hidden) for name in ("query", "key", "value"))
    with torch.no_grad():
        found = merged(window_attention(*projected, mask, window // 2, window // 2, global_tokens))
    close(found[mask], expected[mask])


def test_longformer_projects_global_tokens_by_themselves() -> None:
    """What the first test sets equal: rows of global tokens then differ from ours, the others do not."""
    layer, hidden, expected, mask = longformer(24, 4, 2, 24, local=False)
    projected = (heads(getattr(layer, name), hidden) for name in ("query", "key", "value"))
    with torch.no_grad():
        found = merged(window_attention(*projected, mask, 2, 2, 2))
    close(found[:, 2:], expected[:, 2:])
    assert (found[:, :2] - expected[:, :2]).abs().amax() > 0.01


def nystromformer(landmarks: int, length: int, start: str) -> Any:
    """Its attention module, without the convolution that it adds to the result."""
    module = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    from transformers import NystromformerConfig

    torch.manual_seed(0)
    config = NystromformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_landmarks=landmarks, segment_means_seq_len=length
    )
    layer = module.NystromformerSelfAttention(config).eval()
    layer.conv_kernel_size = None  # which the configuration's types do not allow
    layer.init_option = start  # given in the configuration, it is read under another name, and fails
    return layer


@pytest.mark.parametrize(("landmarks", "length"), [(4, 24), (6, 24), (12, 24), (24, 24)])
def test_nystromformer(landmarks: int, length: int) -> None:
    """Where the length is a multiple of the landmarks; others its reshape refuses.

    Its pseudo-inverse starts for each matrix by itself, as ours does. Padding is not compared: Nystromformer's
    landmarks are means over padding, too, so that what it gives depends on how much there is.
    """
    layer = nystromformer(landmarks, length, "exact")
    hidden = normal(2, length, WIDTH)
    with torch.no_grad():
        expected = layer(hidden)[0]
        projected = (heads(getattr(layer, name), hidden) for name in ("query", "key", "value"))
        close(merged(nystrom_attention(*projected, None, landmarks)), expected)


def test_nystromformer_starts_from_the_largest_of_a_batch() -> None:
    """Unless told otherwise: then what one sample gives depends on the others. Ours does not, and so differs."""
    layer, hidden = nystromformer(6, 24, "original"), normal(2, 24, WIDTH) * 4
    with torch.no_grad():
        projected = [heads(getattr(layer, name), hidden) for name in ("query", "key", "value")]
        found = merged(nystrom_attention(*projected, None, 6))
        alone = torch.cat([merged(nystrom_attention(*(p[[index]] for p in projected), None, 6)) for index in range(2)])
        assert (layer(hidden)[0] - found).abs().amax() > 1e-4
    close(found, alone)
