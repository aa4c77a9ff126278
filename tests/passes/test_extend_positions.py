"""ExtendPositions: tables of learned positions are repeated; nothing changes up to their old length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program, rewritten
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from fxpress import compile
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.rewrite import Context
from fxpress.passes import ExtendPositions

OLD, NEW = 16, 40


class Positions(nn.Module):
    """Tokens with learned positions, whose numbers are stored, as those of BERT are."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(OLD, 4, seed=1))
        self.register_buffer("numbers", numbers)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.embedding(self.numbers[:, : x.shape[1]], self.table)


def traced(numbers: Tensor | None = None) -> tuple[Program, Context]:
    x = normal(2, 6, 4)
    made = program(Positions(torch.arange(OLD)[None] if numbers is None else numbers), x)
    return made, Context([x])


def test_the_table_is_repeated_and_the_numbers_go_on() -> None:
    before, context = traced()
    after, result = rewritten(before, ExtendPositions(NEW), context)
    table = normal(OLD, 4, seed=1)
    x = normal(2, NEW, 4, seed=2)
    assert torch.equal(after.run([x])[0], x + torch.cat((table, table, table))[:NEW])
    assert result.matches[0].detail == f"{OLD} positions repeated to {NEW}"
    assert after.signature.ranges["d1"][1] == NEW and before.signature.ranges["d1"][1] == OLD


def test_nothing_changes_up_to_the_old_length() -> None:
    before, context = traced()
    after, _ = rewritten(before, ExtendPositions(NEW), context)
    x = normal(3, OLD, 4)
    assert torch.equal(after.run([x])[0], before.run([x])[0])


def test_a_second_run_changes_nothing() -> None:
    before, context = traced()
    after, _ = rewritten(before, ExtendPositions(NEW), context)
    assert rewritten(after, ExtendPositions(NEW), context)[1].changes == 0


def test_a_shorter_length_changes_nothing() -> None:
    before, context = traced()
    assert rewritten(before, ExtendPositions(OLD - 1), context)[1].changes == 0


def test_max_rewrites() -> None:
    before, context = traced()
    context.max_rewrites = 0
    after, result = rewritten(before, ExtendPositions(NEW), context)
    assert result.changes == 0 and after.signature.ranges["d1"][1] == OLD


def test_the_length_grows_once_all_tables_are_longer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(OLD)[: x.shape[1]]
        return x + F.embedding(places, m.one) + F.embedding(places, m.other)

    x = normal(2, 6, 4)
    before = program(forward, x, one=normal(OLD, 4), other=normal(OLD, 4, seed=1))
    after, result = rewritten(before, ExtendPositions(NEW), Context([x], max_rewrites=1))
    assert result.changes == 1 and after.signature.ranges["d1"][1] == OLD


def test_numbers_that_do_not_go_on_are_refused() -> None:
    numbers = torch.arange(OLD)[None].clone()
    numbers[0, 9] = 3
    before, context = traced(numbers)
    with pytest.raises(RewriteError, match="numbers of numbers are neither alike nor 0, 1, 2"):
        rewritten(before, ExtendPositions(NEW), context)


def test_words_are_no_positions() -> None:
    words = torch.arange(6)[None]
    before = program(lambda self, x: F.embedding(x, self.table), words, table=normal(OLD, 4))
    with pytest.raises(RewriteError, match="looks up no table by position"):
        rewritten(before, ExtendPositions(NEW), Context([words]))


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "512"])
def test_bad_lengths(length: Any) -> None:
    with pytest.raises(InputError, match="length must be a positive integer"):
        ExtendPositions(length)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=OLD), add_pooling_layer=False),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=OLD + 2), add_pooling_layer=False),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=50, max_position_embeddings=OLD)
    ),
    "gpt2": lambda: GPT2Model(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=OLD, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_take_longer_inputs(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    options = {"use_cache": False} if name == "gpt2" else {}

    def inputs(length: int) -> dict[str, Any]:
        ids = torch.randint(2, 50, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask, **options}

    compiled = compile(model, passes=[ExtendPositions(NEW)], example_inputs=inputs(6))
    with torch.no_grad():
        short, long = inputs(OLD), inputs(NEW)
        torch.testing.assert_close(compiled(**short)[0], model(**short)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(**long)[0], compiled.program(**long)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=f"is {NEW + 1}, the traced program is valid for at most {NEW}"):
        compiled(**inputs(NEW + 1))
