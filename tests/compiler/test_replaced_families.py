"""Attention is replaced in real model families, a kind a layer; ONNX Runtime gives what the rewritten program does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from build import rewritten
from sampled import sampled
from sites import BITING, applicable
from torch import Tensor, nn

import fxpress
from fxpress.compiler.families import families, text
from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.replacement.kind import Kind
from fxpress.ir.replacement.kinds.graph import Graph
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize, ReplaceAttention

transformers = pytest.importorskip("transformers")

SIZES = ((2, 12), (3, 37), (4, 5), (1, 1), (2, 2))
ENCODER = [kind for kind in applicable(BITING, False) if not (isinstance(kind, Graph) and kind.adjacency)]
CAUSAL = [kind for kind in applicable(BITING, True) if not isinstance(kind, Graph)]


def some(kinds: Sequence[Kind], first: bool) -> list[Kind]:
    """Of each name the first, or the others."""
    firsts = {kind.kind_name(): str(kind) for kind in reversed(kinds)}
    return [kind for kind in kinds if (str(kind) == firsts[kind.kind_name()]) == first]


def replace(kind: Kind, layer: str) -> ReplaceAttention:
    own = {entry.name: getattr(kind, entry.name) for entry in dataclasses.fields(kind)}
    if "steps" in own:
        own["steps"] = 2
    return ReplaceAttention(kind.kind_name(), layers=[layer], force=True, **own)


def images(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(batch))}


@functools.cache
def config(layers: int) -> dict[str, Any]:
    return {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4,
            "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip


def bert(layers: int) -> nn.Module:
    made: nn.Module = transformers.BertModel(transformers.BertConfig(**config(layers)), add_pooling_layer=False)
    return made


def distilbert(layers: int) -> nn.Module:
    sizes = {"vocab_size": 99, "dim": 16, "n_layers": layers, "n_heads": 4, "hidden_dim": 24}
    made: nn.Module = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes, initializer_range=0.3))
    return made


def vit(layers: int) -> nn.Module:
    sizes = {name: size for name, size in config(layers).items() if not name.startswith(("vocab", "max"))}
    made: nn.Module = transformers.ViTModel(
        transformers.ViTConfig(**sizes, image_size=24, patch_size=8), add_pooling_layer=False
    )
    return made


def gpt2(layers: int) -> nn.Module:
    made: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_embd=16, n_layer=layers, n_head=4, n_positions=64, initializer_range=0.3
        )
    )
    return made


def llama(layers: int) -> nn.Module:
    """With two heads of queries to one of keys."""
    made: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config(layers), num_key_value_heads=2))
    return made


FAMILIES = {
    "bert": (bert, "encoder.layer.{}", some(ENCODER, True), text),
    "distilbert": (distilbert, "transformer.layer.{}", some(ENCODER, False), text),
    "vit": (vit, "*layer*.{}", some(ENCODER, True), images),
    "gpt2": (gpt2, "transformer.h.{}", some(CAUSAL, False), text),
    "llama": (llama, "model.layers.{}", some(CAUSAL, True), text),
}


def outputs(result: Any) -> list[Tensor]:
    """Every tensor of a model's result, caches too."""
    return [item for item in torch.utils._pytree.tree_leaves(result) if isinstance(item, Tensor)]


def close(found: Any, expected: Any) -> None:
    for one, other in zip(outputs(found), outputs(expected), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)


def test_every_kind_is_in_some_family() -> None:
    assert {kind.kind_name() for kind in FAMILIES["bert"][2]} == set(BITING)
    assert {str(kind) for name in ("bert", "distilbert") for kind in FAMILIES[name][2]} == {*map(str, ENCODER)}
    assert {str(kind) for name in ("gpt2", "llama") for kind in FAMILIES[name][2]} == {*map(str, CAUSAL)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(FAMILIES, few=("bert", "gpt2")))
def test_onnx_gives_what_the_program_does(name: str, tmp_path: Path) -> None:
    """At other batches and lengths than the example's, with padding, and of one token; saved with all that it draws."""
    model, layer, kinds, inputs = FAMILIES[name]
    torch.manual_seed(0)
    made = model(len(kinds)).eval()
    passes = [replace(kind, layer.format(index)) for index, kind in enumerate(kinds)]
    data = [inputs(3, 20)]
    compiled = fxpress.compile(made, passes, inputs(2, 12), backend="onnx", calibration=data, verify=False)
    assert [item.rewrites for item in compiled.report.passes[1:]] == [{kind.kind_name(): 1} for kind in kinds]
    for size in SIZES:
        given = inputs(*size)
        close(compiled(**given), compiled.program(**given))
    compiled.save(tmp_path / "saved")  # projections, rotations, taps and seeds are in it
    loaded, given = fxpress.load(tmp_path / "saved"), inputs(3, 29)
    found, expected = outputs(loaded(**given)), outputs(compiled(**given))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- t5 --------------------------------------------------------------------------------------------------------


@functools.cache
def t5() -> Program:
    """Canonical; not to be changed."""
    family = next(item for item in families() if item.name == "t5")
    return fxpress.compile(family.model().eval(), [Canonicalize()], family.inputs(2, 12), "auto", "eager").program


@pytest.mark.slow
@pytest.mark.parametrize("name", BITING)
def test_t5_is_refused_for_its_bias(name: str) -> None:
    """Some kinds could take the decoder's attention to the encoder, which has none."""
    rewrite = ReplaceAttention(name, layers=["encoder"])
    with pytest.raises(
        RewriteError, match=f"encoder.*: its scores have a bias for each pair, which {name} cannot take"
    ):
        rewritten(t5(), rewrite, Context(calibration=[[]]))
