"""save_pretrained: what a config can express is read back and equal; the rest is refused and leaves nothing behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from fxpress import compile
from fxpress.compiler.driver import Compiled
from fxpress.ir.errors import InputError

NEURONS = "mask_weights(0.5, pattern='neurons', scope='layer')"
HEADS = "mask_weights(0.5, pattern='heads', scope='layer')"
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}


def bert(kind: Any = transformers.BertModel) -> Any:
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=32)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, **TOKENS)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, **SIZES, **TOKENS, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def text() -> dict[str, Any]:
    return {**tiny.text(), "use_cache": False}


def compiled(model: Any, *passes: str, given: Any = None, **options: Any) -> Compiled:
    found = compile(
        model, list(passes), given or tiny.text(), **{"backend": "eager", "dynamic_shapes": None, **options}
    )
    assert isinstance(found, Compiled)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A new path; nothing may stay beside it."""
    yield tmp_path / "model"
    assert {file.name for file in tmp_path.iterdir()} <= {"model"}


def written(model: Any, found: Compiled, folder: Path, given: Any = None) -> Any:
    """The model read back, which gives what the compiled model gives; the model itself is as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, seed = model.config.to_dict(), torch.random.get_rng_state()
    found.save_pretrained(folder)
    assert model.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    new = type(model).from_pretrained(folder).eval()
    given = given or tiny.text()
    with torch.no_grad():
        assert torch.allclose(new(**given)[0], found(**given)[0], rtol=1e-4, atol=1e-5)
    return new


def refusal(found: Compiled, folder: Path) -> str:
    with pytest.raises(InputError) as error:
        found.save_pretrained(folder)
    assert not folder.exists()
    message = str(error.value)
    assert "\n" not in message
    return message


# --- what is written --------------------------------------------------------------------------------------------


def test_the_files(folder: Path) -> None:
    compiled(bert(), NEURONS, dynamic_shapes="auto", backend="onnx").save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 16
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert list(weights.get_slice("encoder.layer.1.intermediate.dense.weight").get_shape()) == [16, 32]
    assert isinstance(transformers.AutoModel.from_pretrained(folder), transformers.BertModel)


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_neurons_of_bert(method: str, folder: Path) -> None:
    model = bert(transformers.BertForMaskedLM)
    found = compiled(model, NEURONS.replace("0.5", f"0.5, method={method!r}"))
    new = written(model, found, folder)
    assert new.config.intermediate_size == 16
    assert new.cls.predictions.decoder.weight is new.bert.embeddings.word_embeddings.weight


def test_neurons_of_gpt2(folder: Path) -> None:
    model = gpt2()
    new = written(model, compiled(model, NEURONS), folder)
    assert new.config.n_inner == 64
    assert new.generation_config.eos_token_id == 2


def test_neurons_and_heads_of_llama(folder: Path) -> None:
    model = llama()
    config = written(model, compiled(model, NEURONS.replace("neurons", "heads+neurons")), folder).config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (16, 4, 2)
    assert config.head_dim == 8


def test_the_size_of_heads_is_stated_where_the_class_reads_it(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, **SIZES, **TOKENS}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()
    config = written(model, compiled(model, HEADS), folder).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 8)


def test_packed_projections_have_fewer_heads(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, **SIZES, **TOKENS}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).eval()
    config = written(model, compiled(model, HEADS), folder).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_fewer_layers(make: Any, folder: Path) -> None:
    model = make()
    found = compiled(model, "mask_weights(0.5, pattern='layers', method='random')", given=text())
    assert written(model, found, folder, text()).config.num_hidden_layers == 1


def test_lists_by_layer_become_shorter(folder: Path) -> None:
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"]
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, **SIZES, **TOKENS}
    config = transformers.Qwen2Config(**sizes, layer_types=kinds, use_sliding_window=True, sliding_window=3)
    model = transformers.Qwen2ForCausalLM(config).eval()
    drop = "mask_weights(1.0, pattern='layers', method='random', layers=['model.layers.0'])"
    config = written(model, compiled(model, drop, given=text()), folder, text()).config
    assert config.layer_types == ["sliding_attention"]


def test_layers_of_encoder_and_decoder(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    given = {**text(), "decoder_input_ids": torch.tensor([[3, 4, 5]] * 2)}
    drop = "mask_weights(1.0, pattern='layers', method='random', layers=['encoder.block.1', 'decoder.block.1'])"
    config = written(model, compiled(model, drop, given=given), folder, given).config
    assert (config.num_layers, config.num_decoder_layers) == (1, 1)


@pytest.mark.parametrize("fold", [True, False])
def test_zeros_stay_and_the_config_too(fold: bool, folder: Path) -> None:
    model = bert()
    new = written(model, compiled(model, f"mask_weights(0.75, fold={fold})"), folder)
    assert new.config.intermediate_size == 32
    assert float((new.encoder.layer[0].output.dense.weight == 0).float().mean()) == 0.75


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_what_fuse_packs_is_cut_apart(make: Any, folder: Path) -> None:
    model = make()
    found = compiled(model, NEURONS, "fuse", dynamic_shapes="auto", verify=False)
    assert written(model, found, folder).num_parameters() < model.num_parameters()


def test_masks_that_are_cut_later(folder: Path) -> None:
    model = llama()
    found = compiled(model, NEURONS[:-1] + ", fold=False)").then("fold", backend="eager")
    assert written(model, found, folder).config.intermediate_size == 16


def test_half_precision(folder: Path) -> None:
    model = llama().to(torch.bfloat16)
    found = compiled(model, NEURONS)
    found.save_pretrained(folder)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


class Sequence(transformers.BertModel):  # type: ignore[misc]
    """BERT without what its pooler gives."""

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids)[:1]


def test_weights_that_nothing_reads_are_the_models(folder: Path) -> None:
    model = Sequence(bert().config).eval()
    found = compiled(model, NEURONS, given={"input_ids": tiny.text()["input_ids"]})
    assert not [name for name, _ in found.program.module.named_parameters() if "pooler" in name]
    found.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert torch.equal(weights.get_tensor("pooler.dense.weight"), model.pooler.dense.weight)


# --- what is refused --------------------------------------------------------------------------------------------


def test_heads_that_are_tied_to_the_width(folder: Path) -> None:
    for model in (bert(), gpt2()):
        message = refusal(compiled(model, HEADS), folder)
        assert message.startswith(type(model.config).__name__)
        assert "ties the size of heads to their number and has no place for 2 heads of 8" in message


def test_the_configs_own_reason(folder: Path) -> None:
    message = refusal(compiled(llama(), HEADS.replace("0.5", "0.25")), folder)
    assert (
        "LlamaConfig: ValueError: The hidden size (32) is not a multiple of the number of attention heads (6)"
        in message
    )


def test_layers_of_different_sizes(folder: Path) -> None:
    model = bert()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(9)
    message = refusal(compiled(model, NEURONS.replace("layer", "global")), folder)
    assert message.startswith("BertConfig has one intermediate_size: encoder.layer.0.intermediate.dense.weight needs ")
    assert "encoder.layer.1.intermediate.dense.weight needs " in message
    assert "scope='layer'" in message


def test_a_layer_of_which_the_norms_stay(folder: Path) -> None:
    """BERT norms sums, so that a dropped layer is two norms, not nothing."""
    message = refusal(compiled(bert(), "mask_weights(0.5, pattern='layers', method='random')"), folder)
    assert message.startswith("BertConfig has no layer without attention.self.query.weight")
    assert "LayerNorm" in message


def test_a_branch(folder: Path) -> None:
    found = compiled(gpt2(), "mask_weights(0.2, pattern='branches', method='random')", given=text())
    assert "GPT2Config has no layer without" in refusal(found, folder)


def test_sizes_that_the_class_computes(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4, **TOKENS)
    message = refusal(compiled(transformers.BloomForCausalLM(config).eval(), NEURONS), folder)
    assert "BloomConfig has no number by which transformer.h.0.mlp.dense_h_to_4h.weight would be [64, 32]" in message


def test_a_quantized_program(folder: Path) -> None:
    for passes in ("quantize(int8, mode='dynamic')", "quantize(int8, mode='dynamic', fold=False)"):
        assert "the program is quantized" in refusal(compiled(bert(), passes), folder)


def test_pruned_after_fuse(folder: Path) -> None:
    message = refusal(compiled(bert(), "fuse", NEURONS), folder)
    assert "_packed is no weight of BertModel any more; compile without 'fuse' or with it as the last pass" in message


def test_a_result_that_is_not_the_programs(folder: Path) -> None:
    torch.manual_seed(0)
    options = {"scale_attn_by_inverse_layer_idx": True, **TOKENS}
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, **options)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.mul_(20)
    drop = "mask_weights(1.0, pattern='layers', method='random', layers=['transformer.h.0'])"
    message = refusal(compiled(model, drop, given=text()), folder)
    assert "GPT2Config cannot express this program" in message
    assert "logits has RMSE" in message


def test_a_plain_module(folder: Path) -> None:
    found = compiled(tiny.encoder(), given=tiny.inputs())
    assert "Encoder is no model of transformers" in refusal(found, folder)


def test_a_model_that_is_not_compiled_yet(folder: Path) -> None:
    assert "not compiled yet" in refusal(compile(bert()), folder)


class Nested(transformers.BertModel):  # type: ignore[misc]
    """BERT that takes a dict."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return super().forward(**batch)


def test_nested_inputs(folder: Path) -> None:
    found = compiled(Nested(bert().config).eval(), given={"batch": tiny.text()})
    assert "cannot be compared on the nested input 'batch.input_ids'" in refusal(found, folder)


def test_a_folder_that_exists(folder: Path) -> None:
    folder.mkdir()
    (folder / "kept").write_text("")
    with pytest.raises(InputError, match="exists already"):
        compiled(bert()).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    assert "is no directory" in refusal(compiled(bert()), folder / "inner")
