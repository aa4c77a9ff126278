"""Tiny models, and inputs for them, that the tests of several folders share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """One Transformer layer over token ids with a boolean padding mask (True: may be attended)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        bias = None if mask is None else mask[:, None, None, :]
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def encoder() -> Encoder:
    return Encoder().eval()


def inputs(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    """Token ids, and a mask that pads the last third of the last row."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"ids": torch.randint(0, 50, (batch, length), generator=generator), "mask": mask}


def bert() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return transformers.BertModel(config).eval()


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=1000, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def text(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    """`inputs` under Hugging Face's names."""
    given = inputs(batch, length)
    return {"input_ids": given["ids"], "attention_mask": given["mask"].long()}
