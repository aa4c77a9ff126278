"""Decoders as steps: what transformers' models compute with a cache, as modules whose inputs and outputs are tensors.

A step takes N new tokens and the keys and values of the P tokens before them, and gives the logits of the last one with
the keys and values of all P + N. P may be 0, so the prompt and what follows it are calls of one program. A model with
an encoder is two programs: the encoder runs once, and gives keys and values of the source, which every step attends to.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import InputError, TraceError, one_line
from ..ir.graph import Program
from ..ir.signature import describe
from . import hf
from .sizes import right_at, with_lows

IDS, MASK, POSITIONS, PAST = "input_ids", "attention_mask", "position_ids", "past"
DECODER_IDS, CROSS, STATES = "decoder_input_ids", "cross", "states"
SOURCES = (IDS, "input_features", "input_values", "pixel_values")  # of an encoder: text, sound, pictures
LOGITS = "logits"
CACHES = f"{PAST}."  # starts the paths of a cache's tensors
LAST_ONLY = "logits_to_keep"
LEAST = 4  # tokens of an example: two for the cache and two new ones, since torch.export fixes sizes 0 and 1
Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class Step(torch.nn.Module):
    """What the classes of steps are, which are mixed into a model's own."""


class DecoderStep(Step):
    """Mixed into a decoder's class: its forward with the cache as plain tensors."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Any, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """One step.

        Args:
            input_ids: [B, N], the new tokens.
            attention_mask: [B, P + N], 0 at padding, that of the cache included.
            past: for each layer, keys and values [B, H, P, D].
            position_ids: [B, N], for models that take them.

        Returns:
            logits [B, 1, V], those of the last token; past: for each layer keys and values [B, H, P + N, D].
        """
        given = {IDS: input_ids, MASK: attention_mask, **({} if position_ids is None else {POSITIONS: position_ids})}
        found = _forward(super().forward, _cache_of(past), given)
        return {LOGITS: found.logits[:, -1:], PAST: _pairs(found.past_key_values)}


class SourceStep(Step):
    """Mixed into the class of a model with an encoder: its decoder's forward, with all keys and values as tensors."""

    def forward(
        self, decoder_input_ids: Tensor, past: Any, cross: Any, attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """One step.

        Args:
            decoder_input_ids: [B, N], the new tokens.
            past: for each layer, keys and values of the P tokens before, [B, H, P, D].
            cross: for each layer, keys and values of the source, [B, H, S, D], as the encoder gives them.
            attention_mask: that of the encoder, for models that take one.

        Returns:
            logits [B, 1, V], those of the last token; past: for each layer keys and values [B, H, P + N, D].
        """
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        cache = EncoderDecoderCache(_cache_of(past), _cache_of(cross))
        cache.is_updated = dict.fromkeys(range(len(cross)), True)
        first = cross[0][0]
        # Of the encoder's states batch and length alone are read; a model that read more would fail at this width.
        states = first.new_zeros(first.shape[0], first.shape[2], 1)
        given = {DECODER_IDS: decoder_input_ids, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        found = _forward(super().forward, cache, given | ({} if attention_mask is None else {MASK: attention_mask}))
        return {LOGITS: found.logits[:, -1:], PAST: _pairs(found.past_key_values.self_attention_cache)}


class Encoder(torch.nn.Module):
    """Mixed into the class of a model with an encoder: the encoder, and what the decoder makes of its states."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Any]:
        """The source, read once.

        Args:
            input_ids, input_features, input_values, pixel_values: whichever of them the model reads.
            attention_mask: 0 at padding, for models that take one.

        Returns:
            states [B, S, E], those of the encoder; cross: for each layer of the decoder keys and values [B, H, S, D].
        """
        sources = (input_ids, input_features, input_values, pixel_values)
        given = {name: value for name, value in zip(SOURCES, sources, strict=True) if value is not None}
        first = next(iter(given.values()))
        given[DECODER_IDS] = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)
        found = _forward(
            super().forward, _no_cross(), given | ({} if attention_mask is None else {MASK: attention_mask})
        )
        return {STATES: found.encoder_last_hidden_state, CROSS: _pairs(found.past_key_values.cross_attention_cache)}


def _forward(forward: Callable[..., Any], cache: Any, given: Mapping[str, Any]) -> Any:
    """A model's own forward with a cache, with the last token's logits alone where it can give them."""
    last = {LAST_ONLY: 1} if LAST_ONLY in inspect.signature(forward).parameters else {}
    return forward(**given, past_key_values=cache, use_cache=True, return_dict=True, **last)


def _no_cross() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _cache_of(pairs: Any) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer)
    return cache


def _pairs(cache: Any) -> Pairs:
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- of a model --------------------------------------------------------------------------------------------------


def check_generates(model: Any) -> None:
    """Refuse what has no step.

    Raises:
        InputError: the model is none of transformers that generates.
    """
    transformers = hf.import_transformers()
    if not isinstance(model, transformers.PreTrainedModel) or not model.can_generate():
        raise InputError(f"cache=True is for models of transformers that generate(), found a {type(model).__name__}")


def has_encoder(model: Any) -> bool:
    """Whether a model reads a source with an encoder before it writes."""
    return bool(model.config.is_encoder_decoder)


def step_of(model: Any) -> torch.nn.Module:
    """The model with a step's forward; its weights and its config are the model's own.

    Raises:
        InputError: the model is none of transformers that generates.
    """
    check_generates(model)
    return _mixed(model, SourceStep if has_encoder(model) else DecoderStep)


def encoder_of(model: Any) -> torch.nn.Module:
    """The model with `Encoder`'s forward."""
    return _mixed(model, Encoder)


def _mixed(model: Any, kind: type) -> torch.nn.Module:
    found = copy.copy(model)
    found.__class__ = type(type(model).__name__, (kind, type(model)), {"__module__": type(model).__module__})
    return found  # type: ignore[no-any-return]


def elsewhere(model: Any) -> list[str]:
    """The names that passes may be given though the program has no such layer: those of the other program of a model.

    Encoder and decoder are each a program of a model that has the modules of both.
    """
    return [name for name, _ in model.named_modules()] if isinstance(model, Encoder | SourceStep) else []


def encoder_inputs(model: Any, prompt: Any) -> dict[str, Tensor]:
    """What the encoder takes of a prompt.

    Raises:
        InputError: nothing that it reads, or an input that it does not know.
    """
    if not isinstance(prompt, Mapping) or not any(isinstance(prompt.get(name), Tensor) for name in SOURCES):
        raise InputError(
            f"cache=True needs what {type(model).__name__} reads, a dict with {', '.join(SOURCES[:-1])} or "
            f"{SOURCES[-1]}, found {describe(prompt)}"
        )
    _check_known(prompt, (*SOURCES, MASK, DECODER_IDS))
    return {name: value for name, value in prompt.items() if name != DECODER_IDS}


def sources(model: Any, prompts: Iterable[Any]) -> list[dict[str, Tensor]]:
    """What the encoder takes of prompts; inputs of steps have nothing for it."""
    return [encoder_inputs(model, prompt) for prompt in prompts if not (isinstance(prompt, Mapping) and PAST in prompt)]


def step_inputs(model: Any, prompt: Any, past: int | None = None) -> dict[str, Any]:
    """What a step takes, from a prompt of which the first tokens are in the cache.

    Args:
        model: the decoder itself.
        prompt: input_ids [B, N] and, if there is padding, attention_mask [B, N]. With an encoder: what that reads, and
            decoder_input_ids [B, N], which may be left out where no data are wanted but an example.
        past: how many tokens are in the cache; None: half of them.

    Raises:
        InputError: no such prompt, one of fewer than 4 tokens, or a cache of another kind than keys and values.
    """
    if has_encoder(model):
        return _source_inputs(model, prompt, past)
    ids, mask = _checked(prompt)
    if past is None:
        past = ids.shape[1] // 2
    given = {IDS: ids, POSITIONS: positions(mask)}
    if POSITIONS not in inspect.signature(model.forward).parameters:
        del given[POSITIONS]
    found = _run(model, {name: value[:, : max(past, 1)] for name, value in {**given, MASK: mask}.items()})
    cache = _kept(model, getattr(found, "past_key_values", None))
    return {**{name: value[:, past:] for name, value in given.items()}, MASK: mask, PAST: _cut(cache, past)}


def _source_inputs(model: Any, prompt: Any, past: int | None) -> dict[str, Any]:
    source = encoder_inputs(model, prompt)
    ids = prompt.get(DECODER_IDS)
    if ids is None:
        start = next(iter(source.values())).new_full((), _start(model), dtype=torch.int64)
        ids = start.expand(next(iter(source.values())).shape[0], LEAST)
    _check_length(DECODER_IDS, ids, ids)
    if past is None:
        past = ids.shape[1] // 2
    found = _run(model, {**source, DECODER_IDS: ids[:, : max(past, 1)]}, _no_cross())
    cache = getattr(found, "past_key_values", None)
    own, cross = (_kept(model, getattr(cache, f"{kind}_attention_cache", None)) for kind in ("self", "cross"))
    given = {DECODER_IDS: ids[:, past:], PAST: _cut(own, past), CROSS: cross}
    return given | ({MASK: source[MASK]} if MASK in source else {})


def _start(model: Any) -> int:
    """A token to begin with."""
    names = ("decoder_start_token_id", "bos_token_id")
    return next((found for name in names if isinstance(found := getattr(model.generation_config, name), int)), 0)


def _checked(prompt: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(prompt, Mapping) or not isinstance(prompt.get(IDS), Tensor):
        raise InputError(f"cache=True needs prompts as example: a dict with {IDS}, found {describe(prompt)}")
    ids, mask = prompt[IDS], prompt.get(MASK)
    mask = torch.ones_like(ids) if mask is None else mask
    _check_known(prompt, (IDS, MASK, POSITIONS))
    _check_length(f"{IDS} and {MASK}", ids, mask)
    return ids, mask


def _check_known(prompt: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted({*prompt} - {*known})
    if unknown:
        others = f"{', '.join(known[:-1])} and {known[-1]}"
        raise InputError(f"input {unknown[0]!r} has no place beside a cache: it takes {others}")


def _check_length(names: str, ids: Tensor, mask: Tensor) -> None:
    fits = isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.dim() == 2 and mask.shape == ids.shape
    if not fits or ids.shape[1] < LEAST:
        found = " and ".join(describe(item) for item in ((ids,) if mask is ids else (ids, mask)))
        raise InputError(f"{names} of a prompt must be [batch, length] with a length of {LEAST} or more, found {found}")


def _run(model: Any, given: Mapping[str, Tensor], cache: Any = None) -> Any:
    """What the model itself gives, its cache included."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    try:
        usual = DynamicCache(config=model.config)
    except Exception as error:
        raise InputError(f"transformers makes no cache for {type(model).__name__}: {one_line(error)}") from error
    _check_layers(model, usual.layers, (DynamicLayer, DynamicSlidingWindowLayer))
    try:
        with torch.no_grad():
            return _forward(model.forward, DynamicCache() if cache is None else cache, given)
    except Exception as error:
        raise InputError(f"the model itself fails on the prompt with an empty cache: {one_line(error)}") from error


def _kept(model: Any, cache: Any) -> Pairs:
    """Keys and values in a cache, which holds nothing else."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", [])
    _check_layers(model, layers, (DynamicLayer,))
    if not layers:
        raise InputError(f"cache=True is for caches of keys and values alone; {type(model).__name__} keeps nothing")
    return [(layer.keys, layer.values) for layer in layers]


def _cut(cache: Pairs, length: int) -> Pairs:
    return [(keys[:, :, :length], values[:, :, :length]) for keys, values in cache]


def _check_layers(model: Any, layers: Sequence[Any], kinds: tuple[type, ...]) -> None:
    """Refuse a cache with layers of other kinds."""
    others = sorted({type(layer).__name__ for layer in layers if type(layer) not in kinds})
    if others:
        name = type(model).__name__
        raise InputError(f"cache=True is for caches of keys and values alone; {name} keeps {', '.join(others)}")


def positions(mask: Tensor) -> Tensor:
    """The position of each token among those that are no padding, [B, N], as transformers counts them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


# --- sizes -------------------------------------------------------------------------------------------------------

_AXES = {  # of each input: which sizes are one
    **dict.fromkeys((IDS, POSITIONS, DECODER_IDS), ("batch", "new")),
    PAST: ("batch", "", "past", ""),
    CROSS: ("batch", "", "source", ""),
}
_NEEDED = ({"new": 1}, {"past": 0}, {"new": 1, "past": 1}, {"batch": 1}, {"batch": 1, "new": 1, "past": 0})
_SAID = {"batch": "batch", "new": "new tokens", "past": "tokens in the cache"}
_ONE_SOURCE = {"source": 1, "mask": 1}  # which some encoders cannot read


def admit(program: Program, model: Step, tensors: Sequence[Tensor]) -> Program:
    """Extend a step's ranges to single sequences and tokens and to an empty cache, where torch.export starts at 2.

    Raises:
        TraceError: the graph is not the model's there.
    """
    axes = {**_AXES, MASK: ("batch", "mask" if isinstance(model, SourceStep) else "all")}
    names: dict[str, set[str]] = {}
    example: dict[str, int] = {}
    for item, tensor in zip(program.signature.inputs, tensors, strict=True):
        for kind, name, size in zip(axes[item.path.split(".")[0]], item.shape, tensor.shape, strict=True):
            if kind and isinstance(name, str):
                names.setdefault(kind, set()).add(name)
                example[kind] = size

    def right(least: Mapping[str, int]) -> bool:
        sizes = {**example, **least}
        sizes["all"] = sizes.get("new", 0) + sizes.get("past", 0)
        return right_at(program, model, tensors, {name: sizes[kind] for kind in names for name in names[kind]})

    for least in _NEEDED:
        if not right(least):
            text = ", ".join(f"{_SAID[kind]} {size}" for kind, size in least.items())
            raise TraceError(
                f"torch.export's graph of {type(model).__name__} is no step of generation: it does not give what the "
                f"model gives ({text}); compile it without its cache"
            )
    lows = {"batch": 1, "new": 1, "past": 0, "all": 1}
    alike = "source" in example and example["source"] == example.get("mask", example["source"])
    if alike and right(_ONE_SOURCE) and right({**_NEEDED[-1], **_ONE_SOURCE}):
        lows |= _ONE_SOURCE
    return with_lows(program, {name: lows[kind] for kind in names if kind in lows for name in names[kind]})


# --- for compile() -----------------------------------------------------------------------------------------------


def prepare(model: Any, example: Any, calibration: Iterable[Any]) -> tuple[torch.nn.Module, Any, list[Any]]:
    """A model, its example and its calibration, as those of a step."""
    step = step_of(model)
    if example is None:
        raise InputError("cache=True needs example_inputs, a prompt to trace with")
    return step, step_inputs(model, example), prompts(model, calibration)


def prompts(model: Any, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Prompts as inputs of a step with an empty cache, for calibration: the first tokens are unlike all others.

    Raises:
        InputError: no prompts, or with an encoder none of what the decoder is to write.
    """
    found = []
    for index, batch in enumerate(batches):
        if has_encoder(model) and not (isinstance(batch, Mapping) and isinstance(batch.get(DECODER_IDS), Tensor)):
            raise InputError(
                f"calibration batch {index} has no {DECODER_IDS}: the decoder needs tokens as it is to write them, "
                "such as the model's own generate() gives"
            )
        found.append(step_inputs(model, batch, past=0))
    return found
