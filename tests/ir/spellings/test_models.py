"""Norms, activations, gates and rotary embeddings of Hugging Face models: all are found, and the models stay equal."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from build import assert_equal, rewritten
from sampled import sampled

from fxpress.compiler.families import text
from fxpress.compiler.trace import bind_example, trace
from fxpress.ir.graph import Program, arguments
from fxpress.ir.ops.attention import attention
from fxpress.ir.ops.linear import mlp
from fxpress.passes import Canonicalize, Fuse

SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2}
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
GPT = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip

# model: (class, options, norms, activations joined with linears, gated linears, rotations)
MODELS: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "llama": ("Llama", GROUPED, 3, 0, 1, 2),
    "mistral": ("Mistral", GROUPED, 3, 0, 1, 2),
    "gemma": ("Gemma", HEADS_OF_8, 3, 0, 1, 2),
    "gemma2": ("Gemma2", HEADS_OF_8, 5, 0, 1, 2),
    "gemma3": ("Gemma3Text", HEADS_OF_8, 7, 0, 1, 2),
    "qwen2": ("Qwen2", GROUPED, 3, 0, 1, 2),
    "qwen3": ("Qwen3", HEADS_OF_8, 5, 0, 1, 2),
    "phi": ("Phi", GROUPED, 2, 1, 0, 2),
    "phi3": ("Phi3", GROUPED, 3, 0, 1, 2),
    "glm": ("Glm", HEADS_OF_8, 3, 0, 1, 2),
    "cohere": ("Cohere", GROUPED, 2, 0, 1, 2),
    "olmo": ("Olmo", GROUPED, 3, 0, 1, 2),
    "olmo2": ("Olmo2", GROUPED, 5, 0, 1, 2),
    "stablelm": ("StableLm", GROUPED, 3, 0, 1, 2),
    "persimmon": ("Persimmon", SIZE, 5, 1, 0, 2),
    "gpt_neox": ("GPTNeoX", SIZE, 3, 1, 0, 2),
    "gpt2": ("GPT2", GPT, 3, 1, 0, 0),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}, 2, 1, 0, 2),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 4}, 2, 1, 0, 2),
    "bloom": ("Bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 4}, 4, 1, 0, 0),
    "modernbert": ("ModernBert", {**SIZE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}, 3, 0, 1, 2),
    "esm": ("Esm", {**SIZE, "position_embedding_type": "rotary", "mask_token_id": 5, "pad_token_id": 1}, 3, 2, 0, 2),
    "roformer": ("RoFormer", SIZE, 3, 1, 0, 2),
    "clip": ("CLIPText", SIZE, 3, 1, 0, 0),
    "t5": ("T5Encoder", T5, 3, 1, 0, 0),
    "t5, gated": ("T5Encoder", {**T5, "feed_forward_proj": "gated-gelu"}, 3, 0, 1, 0),
    "llama4": ("Llama4Text", {**HEADS_OF_8, "attention_chunk_size": 32, "num_local_experts": 1,
                              "intermediate_size_mlp": 48}, 5, 0, 1, 2),
    "gpt_oss": ("GptOss", {**HEADS_OF_8, "num_local_experts": 2, "num_experts_per_tok": 1,
                           "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 3, 0, 0, 2),
}  # fmt: skip
ALIKE = ("mistral", "gemma", "qwen2", "phi3", "cohere", "olmo", "stablelm", "gpt2", "codegen", "esm", "t5, gated")
NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
SPELLED_OUT = {"pow.Tensor_Scalar", "rsqrt.default", "sqrt.default", "var.correction", "erf.default", "neg.default",
               "stack.default", "view_as_complex.default"}  # fmt: skip
LEFT = {"roformer": {"stack.default": 2}}  # its cos and sin, each stated for both columns of a pair


def model(name: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, options = MODELS[name][:2]
    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")(**options)
    config.use_cache = False
    torch.manual_seed(0)
    made: torch.nn.Module = getattr(transformers, f"{kind}Model")(config)
    return made.eval()


def operators(program: Program) -> Counter[str]:
    return Counter(str(node.target).partition(".")[2] for node in program.graph.nodes if node.op == "call_function")


def fused(before: Program) -> Program:
    canonical, _ = rewritten(before, Canonicalize())
    after, _ = rewritten(canonical, Fuse())
    return after


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(MODELS, many=ALIKE))
def test_all_are_found(name: str) -> None:
    tiny = model(name)
    before = trace(tiny, bind_example(tiny, text(2, 12)), "auto")
    after = fused(before)
    found = operators(after)
    norms = sum(found[f"{norm}.default"] for norm in NORMS)
    gated = [arguments(node)["gate_weight"] is not None for node in after.calls(mlp)]
    activations = found["linear_act.default"] + gated.count(False)
    assert (norms, activations, found["gated_linear.default"] + gated.count(True), found["rotary.default"]) == (
        MODELS[name][2:]
    )
    assert {kind: count for kind, count in found.items() if kind in SPELLED_OUT} == LEFT.get(name, {})
    for size in ((2, 12), (3, 17)):
        assert_equal(before, after, before.signature.bind((), text(*size)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_without_padding_need_no_mask(name: str) -> None:
    """transformers looks for several prompts in a row, which positions in order are known not to hold."""
    tiny = model(name)
    before = trace(tiny, bind_example(tiny, {"input_ids": text(2, 12)["input_ids"]}), "auto")
    after = fused(before)
    (found,) = (arguments(node) for node in after.calls(attention))
    assert (found["bias"], found["key_mask"], found["left"], found["right"]) == (None, None, None, 0)
    for size in ((2, 12), (3, 17)):
        assert_equal(before, after, before.signature.bind((), {"input_ids": text(*size)["input_ids"]}))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [
    ("llama", torch.bfloat16), ("llama", torch.float16), ("gemma3", torch.bfloat16), ("olmo2", torch.float16),
    ("t5", torch.float16), ("gptj", torch.float16), ("cohere", torch.bfloat16),
])  # fmt: skip
def test_all_are_found_in_half_precision(name: str, dtype: torch.dtype) -> None:
    tiny = model(name).to(dtype)
    before = trace(tiny, bind_example(tiny, text(2, 12)), "auto")
    after = fused(before)
    found = operators(after)
    assert sum(found[f"{norm}.default"] for norm in NORMS) == MODELS[name][2]
    assert found["rotary.default"] == MODELS[name][5]
    assert_equal(before, after, before.signature.bind((), text(3, 17)))
