"""The table of model families: tiny random models compiled, and compared with eager PyTorch at several sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..ir.errors import FxpressError, InputError, nearest
from . import hf
from .driver import compile
from .report import decibels

EXAMPLE = (2, 12)  # batch and length of the example that is traced
SIZES = ((2, 12), (3, 17), (1, 9), (1, 1))


@dataclass(frozen=True)
class Family:
    """A family: `model()` makes a tiny random one, `inputs(batch, length)` what it takes, padded where it can be.

    `shortest` is the least length that the architecture's traced graph is valid for.
    """

    name: str
    model: Callable[[], torch.nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    shortest: int = 1


@dataclass(frozen=True)
class FamilyResult:
    """What came of one family."""

    name: str
    fused: dict[str, int]
    sizes: tuple[tuple[int, int], ...]
    equal: bool
    sqnr_db: float
    seconds: float
    failure: str = ""


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids and a mask whose last row is padded on the right in its last third."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=generator), "attention_mask": mask}


def _seq2seq(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length), "decoder_input_ids": text(batch, length // 2 + 1)["input_ids"]}


def _pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


def _speech(batch: int, length: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 8, 64, generator=torch.Generator().manual_seed(batch))
    return {"input_features": features, "decoder_input_ids": text(batch, length)["input_ids"]}


def _translation(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    padded = torch.zeros(batch, length, dtype=torch.bool)
    padded[-1, length - length // 3 :] = True
    return {
        "source": torch.randn(batch, length, 512, generator=generator),
        "target": torch.randn(batch, length // 2 + 1, 512, generator=generator),
        "padded": padded,
    }


class Translator(torch.nn.Module):
    """A plain nn.Transformer encoder-decoder with a projection, as in "Attention is all you need" (base)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = torch.nn.Transformer(512, 8, 6, 6, batch_first=True)
        self.projection = torch.nn.Linear(512, 99)

    def forward(self, source: Tensor, target: Tensor, padded: Tensor) -> Tensor:
        """Logits [B, M, 99] of source [B, N, 512], target [B, M, 512], padded [B, N] (True: a padding token)."""
        causal = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        hidden = self.transformer(
            source, target, tgt_mask=causal, src_key_padding_mask=padded, memory_key_padding_mask=padded
        )
        logits: Tensor = self.projection(hidden)
        return logits


def families() -> list[Family]:
    """All families of the table. Needs transformers, except for the last."""
    t = hf.import_transformers()
    hf.quiet(t)
    size: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                            "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
    grouped = {**size, "num_key_value_heads": 2}
    vision = {key: size[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                         "intermediate_size")}  # fmt: skip

    def made(kind: str, config: Any) -> Callable[[], torch.nn.Module]:
        return lambda: getattr(t, kind)(config)

    return [
        Family("bert", made("BertModel", t.BertConfig(**size)), text),
        Family("distilbert", made("DistilBertModel", t.DistilBertConfig(
            vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64)), text),
        Family("roberta", made("RobertaModel", t.RobertaConfig(**size)), text),
        Family("gpt2", made("GPT2LMHeadModel", t.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)), text),
        Family("llama", made("LlamaForCausalLM", t.LlamaConfig(**grouped)), text),
        Family("qwen2", made("Qwen2ForCausalLM", t.Qwen2Config(**grouped)), text),
        Family("mistral", made("MistralForCausalLM", t.MistralConfig(**grouped, sliding_window=8)), text, shortest=7),
        Family("t5", made("T5ForConditionalGeneration", t.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)), _seq2seq),
        Family("vit", made("ViTModel", t.ViTConfig(**vision, image_size=32, patch_size=8)), _pixels),
        Family("whisper", made("WhisperForConditionalGeneration", t.WhisperConfig(
            vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
            max_source_positions=32, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1)), _speech),
        Family("nn.Transformer", Translator, _translation),
    ]  # fmt: skip


def try_family(family: Family, backend: str = "onnx") -> FamilyResult:
    """Compile a family's model with `passes=None` and compare it with eager at every size."""
    torch.manual_seed(0)
    model = family.model().eval()
    start = time.perf_counter()
    try:
        compiled = compile(model, example_inputs=family.inputs(*EXAMPLE), backend=backend)
        seconds = time.perf_counter() - start
        sizes = tuple((batch, max(length, family.shortest)) for batch, length in SIZES)
        verdicts = [compiled.verify(family.inputs(*size)) for size in sizes]
    except FxpressError as error:
        return FamilyResult(family.name, {}, (), False, float("nan"), time.perf_counter() - start, str(error))
    fused = {rule: count for item in compiled.report.passes for rule, count in item.rewrites.items()}
    reasons = [reason for verdict in verdicts for reason in verdict.reasons]
    worst = min(verdict.sqnr_db for verdict in verdicts)
    return FamilyResult(family.name, fused, sizes, not reasons, worst, seconds, "; ".join(reasons))


def names(wanted: Sequence[str]) -> list[str]:
    """The named families, or all, in the table's order."""
    return [family.name for family in families() if not wanted or family.name in wanted]


def check_names(wanted: Sequence[str]) -> None:
    """Refuse a name that no family has.

    Raises:
        InputError: with the nearest valid name.
    """
    known = names([])
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown family {name!r}: {nearest(name, known)}")


def try_named(name: str) -> FamilyResult:
    """`try_family` of the family with this name."""
    return try_family(next(family for family in families() if family.name == name))


_HEADER = ("family", "ONNX", "equal to eager", "sizes (batch, length)", "worst error", "attentions fused",
           "projections packed", "norms fused", "activations fused")  # fmt: skip


def _cells(result: FamilyResult) -> list[str]:
    fused = result.fused
    norms = fused.get("add_layer_norm", 0) + fused.get("add_rms_norm", 0)
    activations = sum(count for rule, count in fused.items() if rule.startswith("linear_") or rule == "gated_linear")
    compiled = bool(result.sizes)
    return [
        result.name,
        "yes" if compiled else f"no: {result.failure}",
        "yes" if result.equal else f"no: {result.failure}" if compiled else "-",
        ", ".join(f"({batch}, {length})" for batch, length in result.sizes),
        decibels(result.sqnr_db) if compiled else "-",
        *(str(count) for count in (fused.get("attention", 0), fused.get("pack_projections", 0), norms, activations)),
    ]


def as_table(results: list[FamilyResult]) -> Table:
    """The results for the terminal."""
    table = Table(*_HEADER, title="model families on the ONNX backend", title_justify="left")
    for result in results:
        table.add_row(*_cells(result))
    return table


def as_markdown(results: list[FamilyResult]) -> str:
    """The results for the README."""
    rows = [list(_HEADER), ["---"] * len(_HEADER), *map(_cells, results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_BEGIN, _END = "<!-- families: written by `make families` -->", "<!-- end of families -->"


def write_readme(path: Path, results: list[FamilyResult]) -> None:
    """Replace the table between the two markers of a README.

    Raises:
        InputError: if there is no such file, or it has no such place.
    """
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _BEGIN not in old or _END not in old:
        raise InputError(f"{str(path)!r} has no place for the table: {_BEGIN} ... {_END}")
    head, _, rest = old.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text(f"{head}{_BEGIN}\n{as_markdown(results)}\n{_END}{tail}", encoding="utf-8")
    os.replace(temporary, path)
