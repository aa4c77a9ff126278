"""Generation: transformers' `generate()` with every step computed by a compiled program.

Decoding itself (greedy, beams, sampling, stopping) is transformers'; a step is one call of the program, with the cache
as plain tensors (steps.py).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import ArtifactError, InputError, one_line
from ..ir.signature import Signature, TensorInput, describe
from . import hf
from .artifact import CONFIG, GENERATION
from .steps import (
    CROSS,
    DECODER_IDS,
    IDS,
    LAST_ONLY,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    SOURCES,
    STATES,
    Pairs,
    positions,
)

Run = Callable[..., Any]  # a compiled program
DECODER_POSITIONS = "decoder_position_ids"
_IGNORED = ("use_cache", "return_dict", "cache_position")  # what a step does anyway, or computes itself


class _Writing:
    """A compiled step as the forward of a transformers model, called by its `generate`."""

    def __init__(self, run: Run, signature: Signature) -> None:
        self._run = run
        self._paths = {item.path: item for item in signature.inputs}
        self._past = _layers(self._paths, PAST)

    def _tensors(self, cache: Any, batch: int) -> list[tuple[Tensor, ...]]:
        """Keys and values in a cache of transformers; without tokens in it, empty ones."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

        if type(cache) is EncoderDecoderCache:
            cache = cache.self_attention_cache
        if cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0):
            return [tuple(_empty(item, batch) for item in pair) for pair in self._past]
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise InputError(f"the compiled step takes a DynamicCache() of whole layers, found {describe(cache)}")
        return [(layer.keys, layer.values) for layer in cache.layers]


class Decoding(_Writing):
    """A decoder's."""

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """A step with transformers' arguments.

        Raises:
            InputError: an argument that the step does not take, such as one for the logits of more tokens.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        _check(options)
        past = self._tensors(past_key_values, input_ids.shape[0])
        length = past[0][0].shape[2] + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], length)
        if attention_mask.shape[-1] != length:
            raise InputError(
                f"{MASK} is of {attention_mask.shape[-1]} tokens, those of the cache and the new ones are {length}"
            )
        given = {IDS: input_ids, MASK: attention_mask.to(torch.int64), PAST: past}
        if POSITIONS in self._paths:
            given[POSITIONS] = positions(attention_mask)[:, -input_ids.shape[1] :]
            if position_ids is not None:
                given[POSITIONS] = position_ids.expand_as(input_ids)
        found = self._run(**given)
        return CausalLMOutputWithPast(logits=found[LOGITS], past_key_values=_filled(past_key_values, found[PAST]))


class SourceDecoding(_Writing):
    """That of a model with an encoder."""

    def __init__(self, run: Run, signature: Signature, encode: Encoding) -> None:
        super().__init__(run, signature)
        self._encode = encode
        self._cross = [
            f"{CROSS}.{layer}.{part}" for layer in range(len(_layers(self._paths, CROSS))) for part in (0, 1)
        ]

    def __call__(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        decoder_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """A step with transformers' arguments.

        Raises:
            InputError: an argument that the step does not take, padding among the decoder's tokens, or states of
                another encoder.
        """
        from transformers.modeling_outputs import Seq2SeqLMOutput

        source = {name: options.pop(name) for name in SOURCES if name in options}
        past = self._tensors(past_key_values, decoder_input_ids.shape[0])
        if _follow(options.get(DECODER_POSITIONS), past[0][0].shape[2], decoder_input_ids.shape[1]):
            del options[DECODER_POSITIONS]
        _check(options)
        if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            raise InputError(
                "the compiled step takes no padding among the decoder's tokens; give prompts of one length"
            )
        if encoder_outputs is None:
            encoder_outputs = self._encode(**source, **({} if attention_mask is None else {MASK: attention_mask}))
        if any(name not in encoder_outputs for name in self._cross):
            raise InputError("encoder_outputs must be those of the compiled encoder; leave them out")
        flat = [encoder_outputs[name] for name in self._cross]
        cross = list(zip(flat[::2], flat[1::2], strict=True))
        given = {DECODER_IDS: decoder_input_ids, PAST: past, CROSS: cross}
        if MASK in self._paths:
            given[MASK] = (encoder_outputs[MASK] if attention_mask is None else attention_mask).to(torch.int64)
        found = self._run(**given)
        return Seq2SeqLMOutput(
            logits=found[LOGITS],
            past_key_values=_filled(past_key_values, found[PAST], cross),
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
        )


class Encoding:
    """A compiled encoder in the place of a model's own, as `generate` calls it: before the first step."""

    main_input_name: str

    def __init__(self, run: Run, signature: Signature, encoder: Any) -> None:
        self._run = run
        self._names = [item.path for item in signature.inputs]
        self.main_input_name = next(name for name in SOURCES if name in self._names)
        self.forward = functools.wraps(encoder.forward)(lambda **given: self(**given))  # whose parameters are read

    def __call__(self, **given: Any) -> Any:
        """States, and beside them, for the steps, keys and values of each layer of the decoder."""
        from transformers.modeling_outputs import BaseModelOutput

        if MASK in self._names and given.get(MASK) is None:
            ids = given[self.main_input_name]
            given[MASK] = torch.ones(ids.shape[:2], dtype=torch.int64, device=ids.device)
        _check({name: value for name, value in given.items() if name not in (*SOURCES, MASK)})
        found = self._run(**{name: given[name] for name in self._names if given.get(name) is not None})
        states = BaseModelOutput(last_hidden_state=found[STATES])
        if MASK in self._names:
            states[MASK] = given[MASK]  # the source's own length may be another than that of its states
        for layer, pair in enumerate(found[CROSS]):
            for part, tensor in enumerate(pair):
                states[f"{CROSS}.{layer}.{part}"] = tensor  # generate() repeats them for beams, as it does the states
        return states


def _follow(places: Any, past: int, new: int) -> bool:
    """Whether positions are those of new tokens behind a cache, which a step counts itself."""
    return isinstance(places, Tensor) and bool((places == torch.arange(past, past + new, device=places.device)).all())


def _check(options: Mapping[str, Any]) -> None:
    """Refuse arguments of a model's forward that mean more than a step computes."""
    for name, value in options.items():
        if name == LAST_ONLY and (isinstance(value, Tensor) or value not in (0, 1)):
            raise InputError("the compiled step gives the last token's logits alone; generate without assistance")
        empty = value is None or value is False or (isinstance(value, Mapping) and not value)
        if name not in (*_IGNORED, LAST_ONLY) and not empty:
            raise InputError(f"the compiled step does not take {name!r}; generate with the model itself")


def _layers(paths: Mapping[str, TensorInput], name: str) -> list[list[TensorInput]]:
    """The inputs that are keys and values, a pair for each layer."""
    count = sum(path.startswith(f"{name}.") for path in paths) // 2
    return [[paths[f"{name}.{layer}.{part}"] for part in (0, 1)] for layer in range(count)]


def _empty(item: TensorInput, batch: int) -> Tensor:
    return torch.empty(batch, int(item.shape[1]), 0, int(item.shape[3]), dtype=getattr(torch, item.dtype))


def _filled(cache: Any, past: Pairs, cross: Pairs | None = None) -> Any:
    """The cache that was given, or a new one, with these keys and values: models too fill that of their caller."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = DynamicCache() if cache is None else cache
    if cross is None:
        _fill(cache, past)
        return cache
    both = cache if type(cache) is EncoderDecoderCache else EncoderDecoderCache(cache, DynamicCache())
    _fill(both.self_attention_cache, past)
    _fill(both.cross_attention_cache, cross)
    both.is_updated = dict.fromkeys(range(len(cross)), True)
    for layer in both.cross_attention_cache.layers:
        layer.reorder_cache = _stays
    return both


def _fill(cache: Any, pairs: Pairs) -> None:
    from transformers.cache_utils import DynamicLayer

    cache.layers.clear()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)


def _stays(beams: Tensor) -> None:
    """The source is the same for all beams of a sample: copies in another order would be the same."""


def generate(model: Any, step: Any, encoder: Any = None) -> Callable[..., Any]:
    """The `generate` of a model, with a compiled step in place of its forward.

    Args:
        model: of transformers, with or without weights; None: the step is none.
        step, encoder: compiled or loaded; the encoder is that of a model that has one.

    Raises:
        InputError: the step was not compiled with a cache.
    """
    if model is None:
        raise InputError("the model was compiled without its cache: give compile() cache=True to generate with it")
    writer = copy.copy(model)
    forward: _Writing
    if encoder is None:
        forward = Decoding(step, step.signature)
    else:
        encode = Encoding(encoder, encoder.signature, model.get_encoder())
        forward = SourceDecoding(step, step.signature, encode)
        writer.get_encoder = lambda *args, **options: encode
    writer.forward = functools.wraps(model.forward)(forward)

    def write(*args: Any, **options: Any) -> Any:
        if not options.setdefault("use_cache", True):  # whatever the model's config says
            raise InputError("the compiled step writes with its cache; leave out use_cache=False")
        return writer.generate(*args, **options)

    return write


# --- without the model -------------------------------------------------------------------------------------------


def config_files(model: Any) -> dict[str, str]:
    """The files by which `from_folder` knows a decoder: transformers' own, as text."""
    if model is None:
        return {}
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return {CONFIG: config.to_json_string(), GENERATION: model.generation_config.to_json_string()}


def from_folder(folder: Path) -> Any:
    """A decoder without weights, to generate with a compiled step; only transformers' own classes are made.

    Raises:
        ArtifactError: the files name no decoder that the installed transformers has.
    """
    transformers = hf.import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, config.architectures[0])
        if not issubclass(kind, transformers.PreTrainedModel):
            raise ValueError(f"{kind.__name__} is no model")
        options = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = kind(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"cannot generate with {str(folder)!r}: {one_line(error)}") from error
    model.generation_config = options
    model.__class__ = type(kind.__name__, (_OnCpu, kind), {"__module__": kind.__module__})
    return model.eval()


class _OnCpu:
    """Mixed into the class of a decoder without weights: where its step is computed."""

    device = torch.device("cpu")
