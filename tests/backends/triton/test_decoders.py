"""Decoders with their caches through generated kernels, in the interpreter: they write what their models write."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kernels_agree import poisoned

import fxpress
from fxpress.backends.triton.machine_code import Code
from fxpress.backends.triton.runner import TritonRunner

_SIZES = {"vocab_size": 60, "eos_token_id": None, "pad_token_id": 0}


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, **_SIZES)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **_SIZES
    )
    return transformers.T5ForConditionalGeneration(config)


def prompt(padded_first: bool = True) -> dict[str, torch.Tensor]:
    """Two rows, one of them with three tokens of padding, which decoders take in front."""
    ids = torch.randint(2, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(3) if padded_first else slice(5, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def made(kind: Any, passes: Any = None) -> tuple[Any, dict[str, torch.Tensor], fxpress.Compiled]:
    torch.manual_seed(0)
    model, given = kind().eval(), prompt(kind is not t5)
    return model, given, fxpress.compile(model, passes, given, backend="triton", cache=True)


@pytest.mark.parametrize("kind", [gpt2, llama, pytest.param(t5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_writes_what_its_model_writes(kind: Any, beams: int) -> None:
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    with poisoned():
        model, given, compiled = made(kind)
        assert compiled.report.equal
        assert torch.equal(compiled.generate(**given, **options), model.generate(**given, **options))


@pytest.mark.slow
def test_a_quantized_decoder_writes_what_its_program_writes() -> None:
    _, given, compiled = made(llama, "quantize(int8, granularity=token), fuse")
    in_eager = compiled.then("", backend="eager")
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(compiled.generate(**given, **options), in_eager.generate(**given, **options))


def test_a_saved_decoder_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With machine code that no GPU would run, which the interpreter does not need."""
    _, given, compiled = made(gpt2)
    code = {90: {"0123abcd" * 8: Code('{"name": "kernel"}', b"\x7fELF")}}
    monkeypatch.setattr(TritonRunner, "machine_code", lambda *_: code)
    compiled.save(tmp_path / "writer", archs=[90])
    options = {"max_new_tokens": 5, "do_sample": False}
    found = fxpress.load(tmp_path / "writer").generate(**given, **options)
    assert torch.equal(found, compiled.generate(**given, **options))
