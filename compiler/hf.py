"""What fxpress knows about the transformers library: its caches as pytrees, its model folders. Imported lazily."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ir.errors import ArtifactError, InputError, one_line


def register_caches() -> None:
    """Make transformers' key/value caches known to torch.export, if transformers is loaded. Safe to call again."""
    if "transformers" not in sys.modules:
        return
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    if EncoderDecoderCache in pytree.SUPPORTED_NODES:
        return
    parts = ("self_attention_cache", "cross_attention_cache")
    pytree.register_pytree_node(
        EncoderDecoderCache,
        lambda cache: ([getattr(cache, part) for part in parts], None),
        lambda values, _: EncoderDecoderCache(*values),
        serialized_type_name="transformers.cache_utils.EncoderDecoderCache",
        flatten_with_keys_fn=lambda cache: (
            [(pytree.GetAttrKey(part), getattr(cache, part)) for part in parts],
            None,
        ),
    )


@contextlib.contextmanager
def traceable_experts() -> Iterator[None]:
    """Within it, transformers' mixtures of experts run every expert on every token.

    Their usual way sorts the tokens by expert and cuts them where the routing says, which depends on values: no graph
    can hold it. The result is the same to rounding; the cost grows by all experts over chosen ones.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS["grouped_mm"] = _all_experts
    try:
        yield
    finally:
        del ALL_EXPERTS_FUNCTIONS["grouped_mm"]  # transformers' own shows again


@contextlib.contextmanager
def broadcast_masks() -> Iterator[None]:
    """Within it, transformers computes the masks of models with mask functions of their own by broadcasting.

    Their usual way, torch.vmap, leaves calls in a graph that cannot be replayed. A mask function of indices gives the
    same both ways; one that does not is found out when the graph is compared with the model.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    replaced = ("_vmap_expansion_sdpa", "TransformGetItemToIndex")
    if not all(hasattr(masking, name) for name in (*replaced, "_non_vmap_expansion_sdpa")):
        yield  # not loaded, or a version that has other names for them: those models are refused as before
        return
    usual = {name: getattr(masking, name) for name in replaced}

    def expansion(mask_function: Any) -> Any:
        def expanded(*indices: torch.Tensor) -> torch.Tensor:
            mask: torch.Tensor = mask_function(*masking._non_vmap_expansion_sdpa(*indices))
            return mask.expand([index.shape[0] for index in indices])

        return expanded

    masking._vmap_expansion_sdpa = expansion
    masking.TransformGetItemToIndex = contextlib.nullcontext  # what makes indexing fit for vmap
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(masking, name, value)


def _all_experts(experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A mixture of E experts: hidden [S, H], the K experts chosen for each token [S, K] and their weights [S, K]."""

    def project(name: str, value: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)
        result = torch.bmm(value, weight if experts.is_transposed else weight.transpose(1, 2))
        return result + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else result

    each = project("gate_up_proj" if experts.has_gate else "up_proj", hidden.expand(experts.num_experts, -1, -1))
    each = project("down_proj", experts._apply_gate(each) if experts.has_gate else experts.act_fn(each))
    if experts.has_post_expert_norm:
        each = experts.post_expert_norm(each)
    shares = weights.new_zeros(hidden.shape[0], experts.num_experts).scatter_add(1, chosen, weights).t()[:, :, None]
    each = torch.where(shares != 0, each * shares, 0.0)  # what is not chosen counts for nothing, even if it overflows
    return each.sum(0).to(hidden.dtype)


def load_model(folder: Path) -> torch.nn.Module:
    """A pretrained model from a folder with config.json and model.safetensors; nothing else is read or run.

    Raises:
        InputError: transformers is missing, or the folder holds no such model.
        ArtifactError: it cannot be loaded, or not all of its weights are there: transformers would make random ones.
    """
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no directory; give a folder with config.json and model.safetensors")
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise InputError(f"{str(folder)!r} is no model: it has no {' and no '.join(missing)}")
    transformers = import_transformers()
    quiet(transformers)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = _model_class(transformers, config)
        model, found = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # what transformers raises for a config that is none of its own is of many classes
        if type(error).__name__ == "SafetensorError":
            raise ArtifactError(f"the weights in {str(folder)!r} are truncated or altered: {error}") from error
        raise ArtifactError(f"cannot load the model in {str(folder)!r}: {one_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ArtifactError(
            f"the weights in {str(folder)!r} lack {len(missing)} of {type(model).__name__}, {missing[0]} first; "
            "give a folder that has them, or load the model yourself and use fxpress.compile()"
        )
    return model.eval()  # type: ignore[no-any-return]


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the folder's config names, if transformers has it; else the base model of its family."""
    named = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, named, None) if named.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: if there is none.
    """
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{str(folder)!r} has no tokenizer that loads: {one_line(error)}") from error


def import_transformers() -> Any:
    """The transformers module.

    Raises:
        InputError: if it is not installed, with the command that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("this needs transformers: pip install 'fxpress[transformers]'") from error
    return transformers


def quiet(transformers: Any) -> None:
    """Keep transformers' warnings and progress bars off the command line's output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def example_inputs(model: torch.nn.Module, batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Random inputs of the kind the model takes, with padding in the last row: for the command line.

    Text models get `input_ids`, `attention_mask` (and decoder ids), vision models `pixel_values`, speech models
    `input_features`.

    Raises:
        InputError: if the model's main input is of no known kind.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        sides = getattr(config, "image_size", 224)  # convolutions take any; pictures mostly come in this size
        size = sides if isinstance(sides, int) else sides[0]
        shape = (batch, getattr(config, "num_channels", 3), size, size)
        return {main: torch.randn(shape, generator=generator)}
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        inputs[main] = torch.randn((batch, config.num_mel_bins, config.max_source_positions * 2), generator=generator)
    elif main == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        inputs[main] = torch.randint(vocabulary // 4, vocabulary, (batch, length), generator=generator)
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, length - length // 3 :] = 0  # a row of one or two tokens has none to spare
        inputs["attention_mask"] = mask
    else:
        raise InputError(f"the model's main input is {main!r}; give example inputs through the Python API")
    if getattr(config, "is_encoder_decoder", False):
        vocabulary = config.get_text_config(decoder=True).vocab_size
        inputs["decoder_input_ids"] = torch.randint(3, vocabulary, (batch, length // 2 + 1), generator=generator)
    return inputs
