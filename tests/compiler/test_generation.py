"""compile(cache=True): a step of a decoder equals its model, and generate() writes what the model writes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
import transformers
from torch import nn

import fxpress
from fxpress import Compiled
from fxpress.compiler.generation import Decoding
from fxpress.compiler.steps import step_inputs
from fxpress.compiler.survey_models import tiny_config
from fxpress.ir.errors import ArtifactError, InputError, RewriteError, TraceError
from fxpress.ir.graph import arguments
from fxpress.ir.ops.attention import attention

VOCABULARY = 60
_IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


def decoder(kind: str) -> Any:
    """A tiny decoder: learned positions (gpt2), rotary ones and grouped heads, a window of 4, no positions (bloom)."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_IDS)
    elif kind == "bloom":
        config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_IDS)
    elif kind == "gpt_neox":
        rest = {name: _LLAMA[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        config = transformers.GPTNeoXConfig(num_attention_heads=4, max_position_embeddings=64, **rest, **_IDS)
    elif kind == "mistral":
        config = transformers.MistralConfig(sliding_window=4, **_LLAMA, **_IDS)
    elif kind == "gemma3":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
        config = transformers.Gemma3TextConfig(**_LLAMA, **layers, **_IDS)
    else:
        config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[kind](**_LLAMA, **_IDS)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompt(batch: int = 2, length: int = 8, padding: int = 3) -> dict[str, torch.Tensor]:
    """Token ids of which the first row's first ones are padding."""
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compiled(kind: str, passes: Any = None, backend: str = "eager", **options: Any) -> tuple[Any, Compiled]:
    model = decoder(kind)
    return model, fxpress.compile(model, passes, prompt(), backend=backend, cache=True, threads=1, **options)


@pytest.fixture(scope="module")
def gpt2() -> tuple[Any, Compiled]:
    return compiled("gpt2", backend="onnx")


def writes_alike(model: Any, compiled: Any, tokens: int = 8, **options: Any) -> bool:
    """Whether both continue two prompts alike, one padded, and one of a single token."""
    pairs = []
    for given in (prompt(), prompt(1, 1, 0)):
        for written in (model, compiled):
            torch.manual_seed(0)
            pairs.append(written.generate(**given, max_new_tokens=tokens, **{"do_sample": False, **options}))
    return all(torch.equal(*pair) for pair in (pairs[:2], pairs[2:]))


KINDS = [
    "llama",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mistral", "bloom")),
    *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("gemma3", "gpt_neox", "qwen3")),
]


@functools.cache
def in_eager(kind: str) -> tuple[Any, Compiled]:
    return compiled(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_writes_what_its_model_writes(kind: str) -> None:
    assert writes_alike(*in_eager(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_is_found_and_its_band_starts_behind_the_cache(kind: str) -> None:
    model, step = in_eager(kind)
    found = step.program.calls(attention)
    assert len(found) == model.config.num_hidden_layers
    assert all(isinstance(arguments(node)["right"], torch.fx.Node) for node in found)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param("llama", "onnx", marks=pytest.mark.exhaustive),
        pytest.param("mistral", "onnx", marks=pytest.mark.exhaustive),
        pytest.param("gpt2", "openvino", marks=pytest.mark.slow),
        pytest.param("llama", "openvino", marks=pytest.mark.exhaustive),
        pytest.param("bloom", "onnx", marks=pytest.mark.exhaustive),
    ],
)
def test_backends(kind: str, backend: str) -> None:
    assert writes_alike(*compiled(kind, backend=backend))


def test_greedy(gpt2: tuple[Any, Compiled]) -> None:
    assert writes_alike(*gpt2)


def test_beams(gpt2: tuple[Any, Compiled]) -> None:
    assert writes_alike(*gpt2, num_beams=3)


def test_a_model_whose_config_says_no_cache() -> None:
    model, step = compiled("gpt2", verify=False)
    model.config.use_cache = model.generation_config.use_cache = False
    assert writes_alike(model, step)


def test_a_mask_of_other_tokens_than_the_cache_and_the_new_ones(gpt2: tuple[Any, Compiled]) -> None:
    with pytest.raises(InputError, match="attention_mask is of 7 tokens, those of the cache and the new ones are 8"):
        Decoding(gpt2[1], gpt2[1].signature)(prompt()["input_ids"], torch.ones(2, 7, dtype=torch.int64))


def test_sampling(gpt2: tuple[Any, Compiled]) -> None:
    assert writes_alike(*gpt2, do_sample=True, top_k=20, temperature=0.7)


@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 1), (1, 1, 1), (1, 9, 1), (3, 0, 5), (2, 4, 3), (3, 7, 1)])
def test_a_step_equals_the_model_at_every_size(gpt2: tuple[Any, Compiled], batch: int, past: int, new: int) -> None:
    model, step = gpt2
    whole = prompt(batch, max(past + new, 4), 1)
    inputs = step_inputs(model, whole, past)
    cut = max(past + new, 4) - past - new  # tokens more than asked for
    inputs = {**inputs, "input_ids": inputs["input_ids"][:, cut:], "position_ids": inputs["position_ids"][:, cut:]}
    inputs["attention_mask"] = inputs["attention_mask"][:, cut:]
    assert step.verify(inputs).equal


def test_the_cache_is_given_and_taken_as_tensors(gpt2: tuple[Any, Compiled]) -> None:
    model, step = gpt2
    inputs = step_inputs(model, prompt(), past=5)
    found = step(**inputs)
    with torch.no_grad():
        want = model(
            **prompt(), position_ids=inputs["position_ids"].new_tensor([[0, 0, 0, 0, 1, 2, 3, 4], [*range(8)]])
        )
    assert found["logits"].shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(found["logits"][:, 0], want.logits[:, -1])
    for (keys, values), layer in zip(found["past"], want.past_key_values.layers, strict=True):
        torch.testing.assert_close(keys[:, :, 3:], layer.keys[:, :, 3:])
        torch.testing.assert_close(values[:, :, 3:], layer.values[:, :, 3:])


def test_a_cache_of_the_caller_is_filled(gpt2: tuple[Any, Compiled]) -> None:
    caches = [transformers.DynamicCache() for _ in gpt2]
    for writer, cache in zip(gpt2, caches, strict=True):
        writer.generate(**prompt(), max_new_tokens=3, do_sample=False, past_key_values=cache)
    want, found = (torch.stack([layer.keys for layer in cache.layers]) for cache in caches)
    assert found.shape == want.shape == (2, 2, 4, 10, 8)
    torch.testing.assert_close(found[..., 3:, :], want[..., 3:, :])


def test_the_report_says_from_where_sizes_hold(gpt2: tuple[Any, Compiled]) -> None:
    signature = gpt2[1].program.signature
    lows = {item.path: [signature.ranges[size][0] for size in item.shape if isinstance(size, str)]
            for item in signature.inputs}  # fmt: skip
    assert lows["input_ids"] == [1, 1] and lows["attention_mask"][-1] == 1 and lows["past.1.1"][-1] == 0


def test_the_model_is_not_changed(gpt2: tuple[Any, Compiled]) -> None:
    model = gpt2[0]
    assert type(model) is transformers.GPT2LMHeadModel and "forward" not in vars(model)
    with torch.no_grad():
        assert model(**prompt()).logits.shape == (2, 8, VOCABULARY)


# --- passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param("quantize(int8, granularity=token), fuse", id="int8"),
        pytest.param("quantize(int8, mode=static), fuse", id="static", marks=pytest.mark.exhaustive),
        pytest.param("quantize(int4, group_size=16), fuse", id="int4", marks=pytest.mark.slow),
        pytest.param("mask_weights(0.3, 'wanda', 'heads+neurons'), fuse", id="pruned", marks=pytest.mark.exhaustive),
    ],
)
def test_passes(passes: str) -> None:
    """A lossy step is the same integers in ONNX Runtime as in the reference, so both write the same."""
    batches = [prompt(), prompt(3, 6, 2)]
    _, reference = compiled("gpt2", passes, calibration=batches)
    step = compiled("gpt2", passes, "onnx", calibration=batches)[1]
    assert step.report.sqnr_db > 5 and any(item.changes for item in step.report.passes)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reference.generate(**prompt(), **options), step.generate(**prompt(), **options))


def test_half_precision() -> None:
    batches = [prompt()]
    model, step = compiled("llama", "quantize(int8, mode=static)", dtype="bfloat16", calibration=batches)
    assert {item.dtype for item in step.program.signature.inputs if item.path.startswith("past")} == {"bfloat16"}
    assert step.generate(**prompt(), max_new_tokens=3, do_sample=False).shape == (2, 11)
    assert model.dtype == torch.float32


def test_more_passes_in_half_precision() -> None:
    _, step = compiled("gpt2", dtype="bfloat16")
    coarse = step.then("quantize(int8, mode=static)", backend="eager", calibration=[prompt()])
    assert coarse.verify(prompt()).errors and coarse.generate(**prompt(), max_new_tokens=2).shape == (2, 10)


def test_padding_is_not_removed_from_a_cache() -> None:
    with pytest.raises(RewriteError, match="no attention among tokens has a key mask"):
        compiled("gpt2", "remove_padding, fuse")


def test_calibration_starts_with_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    usual = fxpress.passes.Quantize.apply

    def apply(self: Any, program: Any, context: Any) -> Any:
        seen.extend(context.calibration)
        return usual(self, program, context)

    monkeypatch.setattr(fxpress.passes.Quantize, "apply", apply)
    compiled("gpt2", "quantize(int8, mode=static)", calibration=[prompt(2, 7)], verify=False)
    shapes = [list(tensor.shape) for tensor in seen[0]]
    assert [2, 7] in shapes and [2, 4, 0, 8] in shapes


def test_more_passes(gpt2: tuple[Any, Compiled]) -> None:
    coarse = gpt2[1].then("quantize(int8, mode=static), fuse", backend="eager", calibration=[prompt()])
    assert coarse.generate(**prompt(), max_new_tokens=2, do_sample=False).shape == (2, 10)


# --- saved and loaded --------------------------------------------------------------------------------------------


def test_loaded(gpt2: tuple[Any, Compiled], tmp_path: Path) -> None:
    model, step = gpt2
    step.save(tmp_path / "writer")
    loaded = fxpress.load(tmp_path / "writer", threads=1)
    assert writes_alike(model, loaded)
    file = tmp_path / "writer" / "config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("GPT2LMHeadModel", "GPT2LMHeadMadel"), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"config\.json is altered"):
        fxpress.load(tmp_path / "writer")


def test_loaded_without_torch(gpt2: tuple[Any, Compiled], tmp_path: Path) -> None:
    """A greedy loop in numpy writes what the model writes."""
    model, step = gpt2
    step.save(tmp_path / "writer")
    given = prompt(padding=0)
    numpy.save(tmp_path / "ids.npy", given["input_ids"].numpy())
    code = f"""
import sys, numpy, fxpress
step = fxpress.load({str(tmp_path / "writer")!r})
ids = numpy.load({str(tmp_path / "ids.npy")!r})
past, new = [[numpy.zeros((2, 4, 0, 8), "float32")] * 2] * 2, ids
for _ in range(5):
    positions = numpy.arange(ids.shape[1])[None, -new.shape[1]:].repeat(2, 0)
    found = step(input_ids=new, attention_mask=numpy.ones_like(ids), position_ids=positions, past=past)
    past = [[found[f"past.{{layer}}.{{part}}"] for part in (0, 1)] for layer in (0, 1)]
    new = found.logits[:, -1].argmax(-1)[:, None]
    ids = numpy.concatenate([ids, new], 1)
assert "torch" not in sys.modules
print(ids.tolist())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == model.generate(**given, max_new_tokens=5, do_sample=False).tolist()


def test_a_model_that_transformers_does_not_know(gpt2: tuple[Any, Compiled], tmp_path: Path) -> None:
    from fxpress.compiler.generation import from_folder

    config = {**gpt2[0].config.to_dict(), "architectures": ["GPT2LMHeadMadel"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot generate with"):
        from_folder(tmp_path)


# --- refusals ----------------------------------------------------------------------------------------------------


def mamba() -> Any:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **_IDS)
    return transformers.MambaForCausalLM(config).eval()


def blt() -> Any:
    return transformers.AutoModelForCausalLM.from_config(tiny_config("blt")).eval()


def bamba() -> Any:
    return transformers.AutoModelForCausalLM.from_config(tiny_config("bamba")).eval()


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda: nn.Linear(2, 2).eval(), prompt(), "models of transformers that generate.*found a Linear"),
        (tiny.bert, prompt(), "models of transformers that generate.*found a BertModel"),
        (mamba, prompt(), "caches of keys and values alone; MambaForCausalLM keeps"),
        (bamba, prompt(), "caches of keys and values alone; BambaForCausalLM keeps .*Linear"),
        (blt, prompt(), "transformers makes no cache for BltForCausalLM: 'BltConfig' object has no attribute"),
        (lambda: decoder("gpt2"), None, "needs example_inputs, a prompt"),
        (lambda: decoder("gpt2"), (prompt()["input_ids"],), "a dict with input_ids, found a tuple"),
        (lambda: decoder("gpt2"), prompt(length=3), r"a length of 4 or more, found a tensor int64\[2, 3\]"),
        (lambda: decoder("gpt2"), {**prompt(), "labels": torch.ones(2)}, "input 'labels' has no place beside a cache"),
    ],
)
def test_what_has_no_growing_cache_is_refused(model: Any, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxpress.compile(model(), None, example, backend="eager", cache=True)


@pytest.mark.slow
def test_a_graph_that_is_no_step_is_refused() -> None:
    """CpmAnt puts tokens of its own in front where the cache is empty; traced with some in it, the graph does not."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("cpmant")).eval()
    message = r"no step of generation: it does not give what the model gives \(tokens in the cache 0\)"
    with pytest.raises(TraceError, match=message):
        fxpress.compile(model, None, prompt(), backend="eager", cache=True)


def test_a_model_that_was_compiled_without_its_cache() -> None:
    plain = fxpress.compile(decoder("gpt2"), [], prompt(), backend="eager", verify=False)
    with pytest.raises(InputError, match="without its cache"):
        plain.generate(**prompt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "generate without assistance"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "does not take 'output_attentions'"),
        ({"cache_implementation": "static"}, "a DynamicCache"),
        ({"use_cache": False}, "leave out use_cache=False"),
    ],
)
def test_what_a_step_cannot_give_is_refused(gpt2: tuple[Any, Compiled], options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpt2[1].generate(**prompt(1, 6, 0), max_new_tokens=4, do_sample=False, **options)
