"""compile(cache=True) of models with an encoder: two programs, and generate() writes what the model writes."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

import fxpress
from fxpress import Compiled
from fxpress.compiler.generation import Encoding, SourceDecoding
from fxpress.compiler.steps import CROSS, PAST, step_inputs
from fxpress.compiler.survey_models import tiny_config
from fxpress.ir.errors import ArtifactError, InputError
from fxpress.ir.layers import name_of
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.quantize import int8_linear
from fxpress.passes import Quantize

VOCABULARY = 60
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}


def model_of(kind: str) -> Any:
    """Tiny: t5 (distances as a bias), bart (learned positions), whisper (reads sound), speech_to_text (shortens it)."""
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, **_IDS)
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "bart":
        sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
                 for name, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
        config = transformers.BartConfig(
            d_model=16, max_position_embeddings=32, forced_eos_token_id=None, **sizes, **_IDS
        )
        model = transformers.BartForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForSpeechSeq2Seq.from_config(tiny_config(kind))
    model.generation_config.eos_token_id = None
    return model.eval()


def source(kind: str, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """What the encoder reads; the first row of a text ends in padding."""
    random = torch.Generator().manual_seed(length)
    if kind == "whisper":
        config = tiny_config(kind)
        return {
            "input_features": torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=random)
        }
    if kind == "speech_to_text":
        sound = torch.randn(batch, 40, tiny_config(kind).input_feat_per_channel, generator=random)
        mask = torch.ones(batch, 40, dtype=torch.int64)
        mask[0, 24:] = 0
        return {"input_features": sound, "attention_mask": mask}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=random)
    mask = torch.ones_like(ids)
    mask[0, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compiled(kind: str, passes: Any = None, backend: str = "eager", **options: Any) -> tuple[Any, Compiled]:
    model = model_of(kind)
    return model, fxpress.compile(model, passes, source(kind), backend=backend, cache=True, threads=1, **options)


in_eager = functools.cache(compiled)


@pytest.fixture(scope="module")
def t5() -> tuple[Any, Compiled]:
    return compiled("t5", backend="onnx")


def writes_alike(kind: str, model: Any, compiled: Any, **options: Any) -> bool:
    """Whether both write the same of two sources, and of a single one of another length."""
    pairs = []
    for given in (source(kind), source(kind, 1, 5)):
        for writer in (model, compiled):
            torch.manual_seed(0)
            pairs.append(writer.generate(**given, **{"max_new_tokens": 6, "do_sample": False, **options}))
    return all(torch.equal(*pair) for pair in (pairs[:2], pairs[2:]))


KINDS = ["t5", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bart", "whisper", "speech_to_text"))]


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_what_its_model_writes(kind: str) -> None:
    assert writes_alike(kind, *in_eager(kind))


def test_a_pass_may_name_what_one_of_the_two_programs_has() -> None:
    _, step = compiled("t5", [Quantize(skip=["lm_head", "encoder"])])
    assert step.encoder is not None
    heads = [node for node in step.program.calls(torch.ops.aten.linear.default) if name_of(node) == "lm_head"]
    assert len(heads) == 1 and step.program.calls(int8_linear)
    with pytest.raises(InputError, match="no layer is named 'lm_heed'"):
        compiled("t5", [Quantize(skip=["lm_heed"])])


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_is_found(kind: str) -> None:
    model, step = in_eager(kind)
    config = model.config
    layers = {"t5": (2, 2), "bart": (1, 1)}.get(kind) or (config.encoder_layers, config.decoder_layers)
    assert step.encoder is not None
    assert len(step.encoder.program.calls(attention)) == layers[0]
    assert len(step.program.calls(attention)) == 2 * layers[1]  # of its own tokens and of the source


def test_in_onnx_runtime(t5: tuple[Any, Compiled]) -> None:
    assert writes_alike("t5", *t5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20, "temperature": 0.7}])
def test_beams_and_samples(t5: tuple[Any, Compiled], options: dict[str, Any]) -> None:
    assert writes_alike("t5", *t5, **options)


@pytest.mark.parametrize("kind", ["t5", pytest.param("speech_to_text", marks=pytest.mark.slow)])
def test_a_mask_that_is_left_out_is_one_of_no_padding(kind: str) -> None:
    """In calls of a step too, whose source may be longer than the states that the encoder makes of it."""
    model, step = in_eager(kind)
    given = source(kind)
    given["attention_mask"][:] = 1
    ids = torch.full((2, 3), 2)
    assert step.encoder is not None
    encode = Encoding(step.encoder, step.encoder.signature, model.get_encoder())
    decode = SourceDecoding(step, step.signature, encode)
    with torch.no_grad():
        want = model(**given, decoder_input_ids=ids).logits[:, -1:]
    del given["attention_mask"]
    torch.testing.assert_close(decode(ids, **given).logits, want)


def test_positions_that_are_given_follow_the_cache(t5: tuple[Any, Compiled]) -> None:
    model, step = t5
    assert step.encoder is not None
    decode = SourceDecoding(step, step.signature, Encoding(step.encoder, step.encoder.signature, model.get_encoder()))
    given = {**source("t5"), "decoder_input_ids": torch.full((2, 3), 2)}
    found = decode(**given, decoder_position_ids=torch.arange(3)[None].expand(2, 3))
    assert torch.equal(found.logits, decode(**given).logits)
    with pytest.raises(InputError, match="does not take 'decoder_position_ids'"):
        decode(**given, past_key_values=found.past_key_values, decoder_position_ids=torch.arange(3)[None])


def test_the_decoder_may_be_given_a_beginning(t5: tuple[Any, Compiled]) -> None:
    given = {**source("t5"), "decoder_input_ids": torch.tensor([[2, 7, 9], [2, 8, 8]])}
    texts = [writer.generate(**given, max_new_tokens=4, do_sample=False) for writer in t5]
    assert torch.equal(*texts)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_of_the_caller_is_filled(t5: tuple[Any, Compiled], beams: int) -> None:
    caches = [transformers.EncoderDecoderCache(*(transformers.DynamicCache() for _ in range(2))) for _ in t5]
    for writer, cache in zip(t5, caches, strict=True):
        writer.generate(**source("t5"), max_new_tokens=3, do_sample=False, past_key_values=cache, num_beams=beams)
    for kind in ("self_attention_cache", "cross_attention_cache"):
        want, found = ([layer.keys for layer in getattr(cache, kind).layers] for cache in caches)
        torch.testing.assert_close(found, want)


@pytest.mark.slow
def test_whisper_gives_scores_beside_the_text() -> None:
    """It takes the cache that comes with them apart, sample by sample."""
    model, step = in_eager("whisper")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    want, found = (writer.generate(**source("whisper"), **options) for writer in (model, step))
    torch.testing.assert_close(found.scores, want.scores)


def test_each_program_has_its_own_half_of_the_weights(t5: tuple[Any, Compiled]) -> None:
    step = t5[1]
    assert step.encoder is not None
    both = [{name for name, _ in item.traced.module.named_parameters()} for item in (step.encoder, step)]
    assert not any(name.startswith("encoder") for name in both[1])
    assert not any(name.startswith("decoder") and "EncDecAttention" not in name for name in both[0])
    assert {name.split(".")[-2] for name in both[0] if name.startswith("decoder")} == {"k", "v"}  # of the source
    assert not any("EncDecAttention.k" in name or "EncDecAttention.v" in name for name in both[1])


def decoded(past: int, new: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, max(past + new, 4)), generator=torch.Generator().manual_seed(past))
    return {**source("t5", batch, length), "decoder_input_ids": ids}


@pytest.mark.parametrize(
    ("batch", "length", "past", "new"), [(1, 1, 0, 1), (1, 5, 0, 4), (1, 9, 1, 1), (3, 4, 6, 1), (2, 8, 3, 3)]
)
def test_a_step_equals_the_model_at_every_size(
    t5: tuple[Any, Compiled], batch: int, length: int, past: int, new: int
) -> None:
    model, step = t5
    inputs = step_inputs(model, decoded(past, new, batch, length), past)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :new]
    assert step.verify(inputs).equal
    assert step.encoder is not None and step.encoder.verify(source("t5", batch, length)).equal


def test_keys_and_values_are_tensors(t5: tuple[Any, Compiled]) -> None:
    model, step = t5
    given = decoded(2, 3, 2, 7)
    assert step.encoder is not None
    read = step.encoder(**source("t5"))
    inputs = {**step_inputs(model, given, 2), CROSS: read[CROSS]}
    with torch.no_grad():
        want = model(**given)
    torch.testing.assert_close(read["states"], want.encoder_last_hidden_state)
    found = step(**inputs)
    torch.testing.assert_close(found["logits"][:, 0], want.logits[:, -1])
    for (keys, values), layer in zip(found[PAST], want.past_key_values.self_attention_cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys)
        torch.testing.assert_close(values, layer.values)


def test_the_model_is_not_changed(t5: tuple[Any, Compiled]) -> None:
    model = t5[0]
    assert (
        type(model) is transformers.T5ForConditionalGeneration and not {"forward", "get_encoder"} & vars(model).keys()
    )


# --- passes ------------------------------------------------------------------------------------------------------


def calibration() -> list[dict[str, torch.Tensor]]:
    return [decoded(0, 5, 2, 7), decoded(1, 5, 3, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["quantize(int8, granularity=token), fuse", "quantize(int4, group_size=16), fuse"])
def test_passes(passes: str) -> None:
    """Lossy programs are the same integers in ONNX Runtime as in the reference, so both write the same."""
    _, reference = compiled("t5", passes, calibration=calibration())
    step = compiled("t5", passes, "onnx", calibration=calibration())[1]
    for item in (step, step.encoder):
        assert item is not None and any(found.changes for found in item.report.passes)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reference.generate(**source("t5"), **options), step.generate(**source("t5"), **options))


def test_more_passes_go_to_both(t5: tuple[Any, Compiled]) -> None:
    coarse = t5[1].then("quantize(int8, mode=static), fuse", backend="eager", calibration=calibration())
    assert coarse.encoder is not None
    assert all(item.program.calls(int8_linear) for item in (coarse, coarse.encoder))
    assert coarse.generate(**source("t5"), max_new_tokens=2, do_sample=False).shape == (2, 3)


@pytest.mark.parametrize("batch", [source("t5"), (source("t5")["input_ids"],)])
def test_calibration_needs_what_the_decoder_is_to_write(batch: Any) -> None:
    with pytest.raises(InputError, match="calibration batch 0 has no decoder_input_ids"):
        compiled("t5", "quantize(int8, mode=static)", calibration=[batch])


# --- saved and loaded --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(t5: tuple[Any, Compiled], tmp_path: Path) -> Path:
    t5[1].save(tmp_path / "translator")
    return tmp_path / "translator"


def test_loaded(t5: tuple[Any, Compiled], saved: Path) -> None:
    assert sorted(item.name for item in saved.iterdir()) == ["decoder", "encoder"]
    assert writes_alike("t5", t5[0], fxpress.load(saved, threads=1), num_beams=2)


def test_loaded_without_torch(t5: tuple[Any, Compiled], saved: Path, tmp_path: Path) -> None:
    """A greedy loop in numpy writes what the model writes."""
    given = source("t5")
    numpy.savez(tmp_path / "source.npz", **{name: value.numpy() for name, value in given.items()})
    code = f"""
import sys, numpy, fxpress
step = fxpress.load({str(saved)!r})
given = dict(numpy.load({str(tmp_path / "source.npz")!r}))
read = step.encoder(**given)
cross = [[read[f"cross.{{layer}}.{{part}}"] for part in (0, 1)] for layer in (0, 1)]
past, new, ids = [[numpy.zeros((2, 4, 0, 4), "float32")] * 2] * 2, numpy.full((2, 1), 2), []
for _ in range(5):
    found = step(decoder_input_ids=new, past=past, cross=cross, attention_mask=given["attention_mask"])
    past = [[found[f"past.{{layer}}.{{part}}"] for part in (0, 1)] for layer in (0, 1)]
    new = found.logits[:, -1].argmax(-1)[:, None]
    ids.append(new)
assert "torch" not in sys.modules
print(numpy.concatenate(ids, 1).tolist())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == t5[0].generate(**given, max_new_tokens=5, do_sample=False)[:, 1:].tolist()


def test_a_folder_without_its_encoder(saved: Path) -> None:
    shutil.rmtree(saved / "encoder")
    with pytest.raises(ArtifactError, match="encoder' is no directory"):
        fxpress.load(saved)


def test_an_encoder_of_another_model(saved: Path, tmp_path: Path) -> None:
    _, other = compiled("t5", "fold", backend="onnx", verify=False)
    other.save(tmp_path / "other")
    shutil.rmtree(saved / "encoder")
    shutil.copytree(tmp_path / "other" / "encoder", saved / "encoder")
    with pytest.raises(ArtifactError, match="translator' were not saved together"):
        fxpress.load(saved)


def test_nothing_is_left_of_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    _, step = in_eager("t5")
    with pytest.raises(InputError, match="the eager backend has nothing to save"):
        step.save(tmp_path / "translator")
    assert not [*tmp_path.iterdir()]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "needs example_inputs"),
        ({"decoder_input_ids": torch.ones(2, 4, dtype=torch.int64)}, "needs what T5ForConditionalGeneration reads"),
        ({**source("t5"), "labels": torch.ones(2, 4)}, "input 'labels' has no place beside a cache"),
        (decoded(0, 4, 2, 7) | {"decoder_input_ids": torch.ones(2, 3, dtype=torch.int64)}, r"a length of 4 or more"),
        (decoded(0, 4, 2, 7) | {"decoder_input_ids": [[1, 2, 3, 4]]}, r"a length of 4 or more, found a list"),
    ],
)
def test_examples_that_are_none(example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxpress.compile(model_of("t5"), None, example, backend="eager", cache=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_attention_mask": torch.tensor([[0, 1]] * 2), "decoder_input_ids": torch.tensor([[2, 7]] * 2)},
         "no padding among the decoder's tokens"),
        ({"encoder_outputs": transformers.modeling_outputs.BaseModelOutput(torch.zeros(2, 7, 16))},
         "must be those of the compiled encoder"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "does not take 'output_attentions'"),
        ({"use_cache": False}, "leave out use_cache=False"),
    ],
)  # fmt: skip
def test_what_a_step_cannot_give_is_refused(t5: tuple[Any, Compiled], options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        t5[1].generate(**source("t5"), max_new_tokens=3, do_sample=False, **options)
