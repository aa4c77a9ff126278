"""The survey of all families: how attentions and masks are counted, how a family is made tiny, tried and recorded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxpress.compiler import survey, survey_table
from fxpress.compiler.driver import compile
from fxpress.compiler.survey import Outcome
from fxpress.compiler.survey_attention import count
from fxpress.compiler.survey_masks import Masks, masks
from fxpress.ir.errors import InputError

# --- the count, independent of the compiler --------------------------------------------------------------------


class Model(torch.nn.Module):
    """Projections of one input x [B, N, 8], and one of the computations below."""

    def __init__(self, compute: str) -> None:
        super().__init__()
        self.compute = compute
        self.query, self.key, self.value = (torch.nn.Linear(8, 8) for _ in range(3))
        self.experts = torch.nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return COMPUTATIONS[self.compute](self, x, self.query(x), self.key(x), self.value(x))


def in_heads(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (2, 4)).transpose(1, 2)


COMPUTATIONS = {
    "torch's operator": lambda m, x, q, k, v: F.scaled_dot_product_attention(*map(in_heads, (q, k, v))),
    "torch's operator, plain kernel": lambda m, x, q, k, v: F.scaled_dot_product_attention(
        *map(in_heads, (q, k, v)), dropout_p=0.0, scale=0.3, attn_mask=torch.zeros(x.shape[1], x.shape[1])
    ),
    "spelled out": lambda m, x, q, k, v: torch.softmax(q @ k.mT / 8**0.5, -1) @ v,
    "einsum, mask in place, cast": lambda m, x, q, k, v: torch.einsum(
        "bnm,bmd->bnd", torch.einsum("bnd,bmd->bnm", q, k).masked_fill_(x[:, :1, 0:1] > 9, -1e9).float().softmax(2), v
    ),
    "a router": lambda m, x, q, k, v: torch.softmax(x @ m.experts, -1) @ m.experts.t(),
    "logits that meet a computed tensor": lambda m, x, q, k, v: torch.softmax(x @ m.experts, -1).mT @ v,
    "pooling weights": lambda m, x, q, k, v: (torch.softmax(x.mean(-1, keepdim=True), 1) * v).sum(1),
    "softmax over the queries": lambda m, x, q, k, v: torch.softmax(q @ k.mT, 1) @ v,
    "scores that are returned": lambda m, x, q, k, v: torch.softmax(q @ k.mT, -1),
    "a result that nothing needs": lambda m, x, q, k, v: (torch.softmax(q @ k.mT, -1) @ v, x + q)[1],
}
PRESENT = {
    "torch's operator": 1,
    "torch's operator, plain kernel": 1,
    "spelled out": 1,
    "einsum, mask in place, cast": 1,
    "a router": 0,
    "logits that meet a computed tensor": 0,
    "pooling weights": 0,
    "softmax over the queries": 0,
    "scores that are returned": 0,
    "a result that nothing needs": 0,
}


@pytest.mark.parametrize("compute", COMPUTATIONS)
def test_attentions_present(compute: str) -> None:
    assert count(Model(compute).eval(), {"x": torch.randn(2, 5, 8)}) == PRESENT[compute]


# --- masks -----------------------------------------------------------------------------------------------------


class Masked(torch.nn.Module):
    """Attention over x [B, N, 8] with a mask made from `keep` [B, N]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.position = torch.nn.Parameter(torch.randn(1, 1, 1, 6))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        heads = in_heads(x)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=BIASES[self.kind](self, keep))


def additive(keep: Tensor) -> Tensor:
    parts = keep.cumsum(1) // 2
    return torch.where((parts[:, :, None] == parts[:, None, :])[:, None], 0.0, torch.finfo(torch.float32).min)


# The mask stays a tensor: which keys a query sees depends on values of both.
BIASES = {
    "none": lambda m, keep: None,
    "a position bias": lambda m, keep: m.position,
    "a position bias that masks": lambda m, keep: m.position + additive(keep),
    "an additive mask": lambda m, keep: additive(keep),
    "an operator that is not known": lambda m, keep: (keep[:, None, :, None] * keep[:, None, None, :]).flip(2) > 0,
}
READ = {
    "none": Masks(1, 1),
    "a position bias": Masks(1, 1),
    "a position bias that masks": Masks(1, 1, tensors=("(cumsum[b, i]) // 2 == (cumsum[b, j]) // 2",)),
    "an additive mask": Masks(1, 1, tensors=("(cumsum[b, i]) // 2 == (cumsum[b, j]) // 2",)),
    "an operator that is not known": Masks(1, 0, ("int64 of flip",), ("1 <= flip[b, 0, i, j]",)),
}


@pytest.mark.parametrize("kind", BIASES)
def test_masks(kind: str) -> None:
    inputs = {"x": torch.randn(2, 6, 8), "keep": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    compiled = compile(Masked(kind).eval(), example_inputs=inputs, backend="eager")
    tensors = [torch.as_tensor(value) for value in compiled.traced.signature.bind((), inputs)]
    assert masks(compiled.traced, compiled.program, [tensors]) == READ[kind]


# --- the record and the table ----------------------------------------------------------------------------------

OUTCOMES = [
    Outcome("bert", "BertModel", ("input_ids",), sizes=survey.SIZES, sqnr_db=130.0, present=2, found=2, read=2,
            fused={}),
    Outcome("t5", "T5Model", ("input_ids",), sizes=((2, 12),), sqnr_db=120.0, present=3, found=2, fused={},
            misses=("a|b",)),
    Outcome("odd", "OddModel", stage="trace", reason="cannot trace OddModel: it loops"),
    Outcome("view", "ViewModel", stage="trace", reason="the model changes a view in place"),
    Outcome("off", "OffModel", stage="equal", reason="at (1, 1): output: NaN"),
    Outcome("none", stage="model", reason="needs timm"),
]  # fmt: skip


def test_record(tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    record = tmp_path / "outcomes.jsonl"
    assert survey.recorded(record) == {}
    record.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in OUTCOMES))
    found = survey.recorded(record)
    assert list(found) == [outcome.family for outcome in OUTCOMES]
    assert found["bert"].sqnr_db == 130.0


def test_a_record_is_kept_with_one_line_a_family(tmp_path: Path) -> None:
    record = tmp_path / "outcomes.jsonl"
    survey.keep(record, [Outcome("t5", stage="equal"), Outcome("bert")])
    assert list(survey.recorded(record)) == ["bert", "t5"]
    assert [file.name for file in tmp_path.iterdir()] == ["outcomes.jsonl"]


def test_table() -> None:
    pytest.importorskip("transformers")
    text = survey_table.as_markdown(OUTCOMES)
    assert "Tried: 6 of the" in text
    assert "Of 5 attentions in 2 families, 4 are found; 1 families have all of theirs found." in text
    assert "| bert | BertModel | input_ids | all | 130.0 dB | 2/2 | yes |  |  |" in text
    assert "| t5 | T5Model | input_ids | (2, 12) | 120.0 dB | 2/3 | yes |  | a\\|b |" in text
    for title, row in {
        "## Wrong result": "| off |",
        "## Refused by fxpress": "| view |",
        "## Refused by torch.export": "| odd |",
        "## Not tried": "| none |",
    }.items():
        assert row in text.partition(title)[2].split("##")[0]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        survey_table.write(tmp_path / "missing" / "families.md", [])


# --- families --------------------------------------------------------------------------------------------------


def test_sizes_become_small() -> None:
    pytest.importorskip("transformers")
    from fxpress.compiler.survey_models import tiny_config

    llama = tiny_config("llama")
    assert (llama.hidden_size, llama.num_hidden_layers, llama.num_attention_heads, llama.vocab_size) == (32, 2, 4, 99)
    assert llama.num_key_value_heads == 4  # ungrouped as by default
    assert tiny_config("mistral").num_key_value_heads == 2
    assert tiny_config("clip").vision_config.hidden_size == 32
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}


def test_unknown_family() -> None:
    pytest.importorskip("transformers")
    from fxpress.compiler.survey_models import check_names

    with pytest.raises(InputError, match="did you mean 'bert'"):
        check_names(["brt"])


@pytest.mark.slow
def test_survey(tmp_path: Path) -> None:
    """Text, images with text, a mixture of experts, and one that needs a package: through the survey's processes."""
    pytest.importorskip("transformers")
    record = tmp_path / "outcomes.jsonl"
    found = {outcome.family: outcome for outcome in survey.run(["bert", "clip", "qwen3_moe", "dinat"], record)}
    assert found == survey.recorded(record)
    for family, attentions in {"bert": 2, "clip": 4, "qwen3_moe": 2}.items():
        outcome = found[family]
        assert (outcome.stage, outcome.reason, tuple(outcome.sizes)) == ("ok", "", survey.SIZES)
        assert outcome.present == outcome.found == attentions
    assert found["clip"].inputs == ("input_ids", "attention_mask", "pixel_values")
    assert found["dinat"].stage == "model" and "natten" in found["dinat"].reason
