"""Tiny random models of the families that transformers knows: configurations, model classes, inputs.

A family is a key of transformers' CONFIG_MAPPING. One rule makes every configuration small: each field whose name is in
`SIZES` gets the smaller of its default and the value there, nested configurations likewise. `OVERRIDES` holds, as data,
what the rule gets wrong.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..ir.errors import InputError, nearest, one_line
from . import hf

_VOCABULARY = 99
_WIDTH = 32

# A size-like field of a configuration -> the largest value it keeps.
SIZES: dict[str, int] = {
    **dict.fromkeys((
        "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size", "embedding_dim",
        "projection_dim", "projection_size", "out_hidden_size", "hidden_dim", "encoder_hidden_size",
        "decoder_hidden_size", "encoder_hidden_dim", "backbone_hidden_size", "projector_hidden_size",
        "text_hidden_size", "output_hidden_size", "output_dim", "image_text_hidden_size", "fusion_hidden_size",
        "head_hidden_size", "reassemble_hidden_size", "fpn_hidden_size", "word_embed_proj_dim",
        "attention_hidden_size", "pooler_output_size", "pooler_hidden_size", "conv_hidden_size",
        "classifier_proj_size", "codevector_dim", "proj_codevector_dim", "vision_output_dim", "hidden_size_global",
        "memory_attention_hidden_size", "memory_encoder_hidden_size", "memory_fuser_embed_dim", "output_channels",
        "iou_head_hidden_dim", "mask_feature_size", "feature_size", "mask_downsampler_embed_dim", "text_embed_dim",
        "image_embed_dim", "lang_embed_dim", "spkr_embed_dim", "unit_embed_dim", "adapter_out_dim",
        "xvector_output_dim", "base_channels", "latent_channels", "quantization_dim", "encoder_embed_dim",
        "decoder_embed_dim", "query_dim_model", "speech_decoder_postnet_units", "duration_predictor_channels",
        "hidden_size_per_layer_input", "neck_hidden_size", "encoder_hidden", "rel_embed_dim", "d_embed",
        "bottleneck_dim", "conv_out_channels", "subsampling_conv_channels", "memory_encoder_output_channels",
    ), _WIDTH),
    **dict.fromkeys((
        "intermediate_size", "d_ff", "d_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner",
        "ffn_hidden_size", "mlp_dim", "dim_feedforward", "encoder_feedforward_dim", "dim_ff",
        "feed_forward_hidden_size", "feedforward_size", "decoder_intermediate_size", "shared_intermediate_size",
        "shared_expert_intermediate_size", "mlp_hidden_size", "memory_attention_feed_forward_hidden_size",
        "memory_fuser_intermediate_dim", "speech_encoder_intermediate_size", "t2u_encoder_ffn_dim",
        "t2u_decoder_ffn_dim", "intermediate_size_mlp", "encoder_intermediate_size",
    ), 48),
    **dict.fromkeys((
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
        "layers", "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
        "num_blocks", "num_feat_extract_layers_total", "memory_attention_num_layers", "memory_fuser_num_layers",
        "resampler_depth", "speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers", "num_layers_per_block",
        "num_block", "l_layers", "x_layers", "r_layers", "num_hidden_layers_encoder", "num_conv_layers",
        "num_residual_layers", "num_stacks", "aligner_num_add_layers", "num_trans_layers", "resampler_n_layers",
        "num_global_layers", "encoder_num_layers", "decoder_num_layers", "block_num", "perceiver_depth",
        "num_self_attends_per_block",
    ), 2),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads", "swa_num_attention_heads",
        "speech_encoder_attention_heads", "t2u_encoder_attention_heads", "t2u_decoder_attention_heads",
        "decoder_self_attention_heads", "decoder_cross_attention_heads", "linear_num_heads",
        "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "resampler_n_heads",
        "resampler_heads", "memory_attention_num_attention_heads", "ssm_num_heads", "num_self_attention_heads",
        "num_cross_attention_heads", "num_register_tokens",
    ), 4),
    **dict.fromkeys((
        "num_key_value_heads", "num_kv_heads", "n_kv_heads", "encoder_num_key_value_heads",
        "decoder_num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_global_key_value_heads",
    ), 2),
    **dict.fromkeys((
        "head_dim", "d_kv", "d_head", "dim_head", "kv_channels", "global_head_dim", "swa_head_dim",
        "attention_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim",
        "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "resampler_head_dim", "resampler_dim_head",
        "rotary_dim", "decoder_head_dim",
    ), 8),
    **dict.fromkeys((
        "q_lora_rank", "kv_lora_rank", "o_lora_rank", "moe_intermediate_size", "state_size", "time_step_rank",
        "mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size", "qk_head_dim", "mamba_d_head",
        "mamba_head_dim", "mamba_dt_rank", "expert_ffn_hidden_size", "moe_ffn_hidden_size",
    ), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys((
        "n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "n_shared_experts",
        "num_shared_experts", "num_dense_layers", "first_k_dense_replace", "num_nextn_predict_layers",
        "attn_layer_period", "attn_layer_offset", "moe_num_shared_experts",
    ), 1),
    **dict.fromkeys((
        "vocab_size", "char_vocab_size", "vocab_size_per_layer_input", "n_words", "t2u_vocab_size",
        "unit_hifi_gan_vocab_size", "entity_vocab_size", "tgt_vocab_size", "src_vocab_size",
    ), _VOCABULARY),
    **dict.fromkeys((
        "max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "model_max_length",
        "max_2d_position_embeddings", "t2u_max_position_embeddings", "n_ctx", "max_sequence_length",
    ), 64),
    "max_source_positions": 32, "image_size": 64, "pretrain_image_size": 64, "crop_size": 64, "input_size": 64,
    "patch_size": 16, "num_mel_bins": 16, "num_queries": 6, "num_query_tokens": 4, "latent_query_num": 4,
    "sliding_window": 8, "local_attention": 8, "num_position_embeddings": 16, "num_frames": 2, "resampler_n_latents": 4,
    "num_latents": 8, "d_latents": 32, "num_input_codes": 8, "resampler_num_latents": 4, "codebook_size": 16,
    "codebook_dim": 8, "num_filters": 8, "num_denoising": 2, "num_embeddings": 16, "upsample_initial_channel": 32,
    "attention_chunk_size": 8, "index_topk": 4, "index_n_heads": 16, "mm_tokens_per_image": 4, "num_codebooks": 2,
}  # fmt: skip

# Fields whose default is one number a stage -> the first number; the others keep their ratio to it.
STAGES: dict[str, int] = {
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim", "hidden_size", "dims", "encoder_hidden_sizes"), 16),
    **dict.fromkeys(
        (
            "depths",
            "depth",
            "num_layers",
            "layers_per_stage",
            "num_block_repeats",
            "stage_num_blocks",
        ),
        1,
    ),
    **dict.fromkeys(("conv_dim", "conv_channels"), 32),
}
_TOKEN = ("_token_id", "_token_index", "_token")

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_parameters": {**_ROTARY, "mrope_section": [2, 1, 1]}}
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
           "out_features": ["stage4"]}  # fmt: skip
_SERIES = {"prediction_length": 4, "context_length": 8}
_SHIFTED_WINDOWS = {"embed_dim": 48, "window_size": 2}
_NO_TIMM = {"use_timm_backbone": False, "backbone_config": _RESNET}

# What the rules above get wrong, by the configuration's `model_type`; nested configurations too.
OVERRIDES: dict[str, dict[str, Any]] = {
    # fields that depend on one another
    "bit": {"num_groups": 8},
    "donut-swin": _SHIFTED_WINDOWS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_encoder": {"context_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "maskformer-swin": _SHIFTED_WINDOWS,
    "mimi": {"upsample_groups": 32},
    "mobilevit": {"hidden_sizes": [16, 32, 48]},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 32},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"],
                 "attention_head_size": 8, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "swin": _SHIFTED_WINDOWS,
    "swin2sr": _SHIFTED_WINDOWS,
    "swinv2": _SHIFTED_WINDOWS,
    # no default where the model needs one
    "autoformer": _SERIES,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": _VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "informer": _SERIES,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "time_series_transformer": _SERIES,
    "xmod": {"default_language": "en_XX"},
    # sections of the rotary angles, which models otherwise take to be those of heads of 128
    "glm4v_moe_text": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "glm4v_text": _SECTIONS,
    "glm_image_text": _SECTIONS,
    "glm_ocr_text": _SECTIONS,
    "paddleocr_vl_text": _SECTIONS,
    "qwen2_5_omni_talker": _SECTIONS,
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    # widths scaled by a factor
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.25},
    "blt": {"encoder_hash_byte_group_vocab": _VOCABULARY},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25},
    # a backbone that needs no timm
    "conditional_detr": _NO_TIMM,
    "dab-detr": _NO_TIMM,
    "deformable_detr": _NO_TIMM,
    "detr": _NO_TIMM,
    "table-transformer": _NO_TIMM,
    # sizes of their own
    "audio-spectrogram-transformer": {"max_length": 64},
    "chameleon": {"vocabulary_map": {"<image>": 95, "IMGIMGA": 10}},
    "emu3": {"vocabulary_map": {"<image>": 95}},
}  # fmt: skip

_PART = re.compile(r"[_-](vision|text|audio|image|encoder|decoder|model|qformer|vq|vqgan|talker|thinker|code2wav|dit)")
_MAPPINGS = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_CAUSAL_LM", "MODEL")


def families() -> list[str]:
    """The keys of CONFIG_MAPPING; models before their parts."""
    return sorted(hf.import_transformers().CONFIG_MAPPING, key=lambda name: (bool(_PART.search(name)), name))


def check_names(wanted: Sequence[str]) -> None:
    """Refuse a name that no family has.

    Raises:
        InputError: with the nearest valid name.
    """
    known = families()
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown family {name!r}: {nearest(name, known)}")


def tiny_config(family: str) -> Any:
    """The smallest configuration of a family that keeps its architecture.

    Raises:
        InputError: the configuration cannot be made, with transformers' reason.
    """
    kind = hf.import_transformers().CONFIG_MAPPING[family]
    try:
        return _shrunk(kind())
    except Exception as error:
        raise InputError(f"{kind.__name__}: {one_line(error)}") from error


def _shrunk(default: Any) -> Any:
    """A configuration of the same class with every size made small."""
    from transformers import PreTrainedConfig

    chosen, overrides = dict[str, Any](), OVERRIDES.get(default.model_type, {})
    layers = vars(default).get("num_hidden_layers")
    tokens = itertools.count(_VOCABULARY - 1, -1)
    for field in dataclasses.fields(default):
        name, value = field.name, vars(default).get(field.name, field.default)
        if name in overrides or not field.init:
            continue
        if isinstance(value, PreTrainedConfig):
            chosen[name] = _shrunk(value)
        elif isinstance(value, list | tuple) and "layer" in name and len(value) == layers and len(value) > 2:
            chosen[name] = type(value)(_two_kinds(value))
        elif isinstance(value, list | tuple) and value and name in STAGES and isinstance(value[0], int | float):
            chosen[name] = type(value)(max(1, round(item / value[0] * STAGES[name])) if name not in _DEPTHS else 1
                                       for item in value)  # fmt: skip
        elif name.endswith(_TOKEN) and isinstance(value, int) and value >= _VOCABULARY:
            chosen[name] = next(tokens)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and field.default is not None:
            chosen[name] = min(value, SIZES[name])
        elif name == "use_cache":
            chosen[name] = False
        elif name == "rope_parameters" and isinstance(value, dict):
            chosen[name] = _rotary(value)
    if (
        "num_key_value_heads" in chosen
        and vars(default).get("num_attention_heads") == vars(default)["num_key_value_heads"]
    ):
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]  # ungrouped heads stay so
    return type(default)(**chosen, **overrides)


_DEPTHS = ("depths", "depth", "num_layers", "layers_per_stage", "num_block_repeats", "stage_num_blocks")


def _two_kinds(values: Any) -> list[Any]:
    """Two layers of a per-layer list, of different kinds if there are any."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return [*kinds, values[0]][:2]


def _rotary(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections fit a head of 8."""
    small = {key: _rotary(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    if "mrope_section" in small:
        small["mrope_section"] = [2, 1, 1]
    return small


def model_class(family: str) -> Any:
    """The class that stands for a family: with a language head if it decodes, else the base model.

    Raises:
        InputError: transformers has no model for this configuration.
    """
    transformers = hf.import_transformers()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    config = transformers.CONFIG_MAPPING[family]
    no_decoder = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.sub_configs
    others = sorted(name.removesuffix("_MAPPING_NAMES") for name in dir(auto)
                    if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES"))  # fmt: skip
    for mapping in (*_MAPPINGS, *others):
        if mapping == "MODEL_FOR_CAUSAL_LM" and no_decoder:
            continue  # an encoder that transformers can also run as a decoder, or a model of several parts
        found = getattr(auto, f"{mapping}_MAPPING_NAMES").get(family)
        found = found if found is None or isinstance(found, str) else found[0]
        if found and hasattr(transformers, found):
            return getattr(transformers, found)
    return _class_of_part(config)


def _class_of_part(config: Any) -> Any:
    """The model of a part of another family: the first class of its module that takes this configuration."""
    name = config.__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{one_line(error)}") from error
    for item in vars(module).values():
        is_model = inspect.isclass(item) and issubclass(item, torch.nn.Module) and item.__module__ == name
        if is_model and "PreTrainedModel" not in item.__name__ and getattr(item, "config_class", None) is config:
            return item
    raise InputError(f"no model takes {config.__name__}")


def tiny_model(family: str) -> torch.nn.Module:
    """A tiny random model of a family, in evaluation mode.

    Raises:
        InputError: it cannot be made, with transformers' reason.
    """
    config, kind = tiny_config(family), model_class(family)
    torch.manual_seed(0)
    try:
        model: torch.nn.Module = kind(config).eval()
    except Exception as error:
        raise InputError(f"{kind.__name__}: {one_line(error)}") from error
    size = sum(weight.numel() for weight in model.parameters())
    if size > 30_000_000:
        raise InputError(f"{kind.__name__}: the tiny configuration has {size:,} weights")
    _break_ties(model)
    return model


def _break_ties(model: torch.nn.Module) -> None:
    """Random numbers for matrices of zeros: a router of zeros gives all experts one score, and topk may take any."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.is_floating_point() and not weight.any():
                weight.normal_(std=0.02)
