"""Generation: a decoder with its growing key/value cache as one program, and transformers' `generate()` on top of it.

A step of a decoder takes N new tokens and the keys and values of the P tokens before them, and gives the logits of the
last one with the keys and values of all P + N. The cache is plain tensors there, a pair for each layer; P may be 0, so
the prompt and what follows it are calls of one program. Decoding itself (greedy, beams, sampling, stopping) is
transformers'.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import ArtifactError, InputError, TraceError, one_line
from ..ir.graph import Program
from ..ir.signature import Signature, describe
from . import hf
from .artifact import CONFIG, GENERATION
from .sizes import right_at, with_lows

IDS, MASK, POSITIONS, PAST = "input_ids", "attention_mask", "position_ids", "past"
LOGITS = "logits"
CACHES = f"{PAST}."  # starts the paths of a cache's tensors
_LAST_ONLY = "logits_to_keep"
_IGNORED = ("use_cache", "return_dict", "cache_position")  # what a step does anyway, or computes itself
LEAST = 4  # tokens of an example: two for the cache and two new ones, since torch.export fixes sizes 0 and 1


class Step:
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
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        given = {} if position_ids is None else {POSITIONS: position_ids}
        found = _forward(super().forward, input_ids, attention_mask, cache, given)  # type: ignore[misc]
        kept = [(layer.keys, layer.values) for layer in found.past_key_values.layers]
        return {LOGITS: found.logits[:, -1:], PAST: kept}


def _forward(forward: Callable[..., Any], ids: Tensor, mask: Tensor, cache: Any, given: Mapping[str, Tensor]) -> Any:
    """A decoder's own forward with a cache, with the last token's logits alone where it can give them."""
    last = {_LAST_ONLY: 1} if _LAST_ONLY in inspect.signature(forward).parameters else {}
    return forward(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **last, **given
    )


def step_of(model: Any) -> torch.nn.Module:
    """The model with `Step`'s forward; its weights and its config are the model's own.

    Raises:
        InputError: the model is no decoder of transformers that generates.
    """
    transformers = hf.import_transformers()
    if not isinstance(model, transformers.PreTrainedModel) or not model.can_generate():
        raise InputError(f"cache=True is for decoders of transformers that generate(), found a {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise InputError(
            f"cache=True is for decoders; {type(model).__name__} has an encoder, whose keys and values are no part of "
            "a growing cache: compile it without, or torch.compile(model.forward, backend='fxpress')"
        )
    step = copy.copy(model)
    step.__class__ = type(type(model).__name__, (Step, type(model)), {"__module__": type(model).__module__})
    return step  # type: ignore[no-any-return]


def step_inputs(model: Any, prompt: Any, past: int | None = None) -> dict[str, Any]:
    """What a step takes, from a prompt of which the first tokens are in the cache.

    Args:
        model: the decoder itself.
        prompt: input_ids [B, N] and, if there is padding, attention_mask [B, N].
        past: how many tokens are in the cache; None: half of them.

    Raises:
        InputError: no such prompt, one of fewer than 4 tokens, or a cache of another kind than keys and values.
    """
    ids, mask = _checked(prompt)
    if past is None:
        past = ids.shape[1] // 2
    given = {IDS: ids, POSITIONS: positions(mask)}
    if POSITIONS not in inspect.signature(model.forward).parameters:
        del given[POSITIONS]
    cache = _cache(model, {name: value[:, : max(past, 1)] for name, value in {**given, MASK: mask}.items()})
    return {
        **{name: value[:, past:] for name, value in given.items()},
        MASK: mask,
        PAST: [(keys[:, :, :past], values[:, :, :past]) for keys, values in cache],
    }


def _checked(prompt: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(prompt, Mapping) or not isinstance(prompt.get(IDS), Tensor):
        raise InputError(f"cache=True needs prompts as example: a dict with {IDS}, found {describe(prompt)}")
    ids, mask = prompt[IDS], prompt.get(MASK)
    mask = torch.ones_like(ids) if mask is None else mask
    unknown = sorted({*prompt} - {IDS, MASK, POSITIONS})
    if unknown:
        raise InputError(f"input {unknown[0]!r} has no place beside a cache: it takes {IDS}, {MASK} and {POSITIONS}")
    if ids.dim() != 2 or mask.shape != ids.shape or ids.shape[1] < LEAST:
        raise InputError(
            f"{IDS} and {MASK} of a prompt must both be [batch, length] with a length of {LEAST} or more, found "
            f"{list(ids.shape)} and {list(mask.shape)}"
        )
    return ids, mask


def _cache(model: Any, given: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of tokens, as the model computes them, a pair for each layer."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    _check_layers(model, DynamicCache(config=model.config).layers, (DynamicLayer, DynamicSlidingWindowLayer))
    ids, mask = given[IDS], given[MASK]
    rest = {name: value for name, value in given.items() if name not in (IDS, MASK)}
    try:
        with torch.no_grad():
            found = _forward(model.forward, ids, mask, DynamicCache(), rest)
    except Exception as error:
        raise InputError(f"the model itself fails on the prompt with an empty cache: {one_line(error)}") from error
    layers = getattr(getattr(found, "past_key_values", None), "layers", [])
    _check_layers(model, layers, (DynamicLayer,))
    if not layers:
        raise InputError(f"cache=True is for caches of keys and values alone; {type(model).__name__} keeps nothing")
    return [(layer.keys, layer.values) for layer in layers]


def _check_layers(model: Any, layers: Sequence[Any], kinds: tuple[type, ...]) -> None:
    """Refuse a cache with layers of other kinds."""
    others = sorted({type(layer).__name__ for layer in layers if type(layer) not in kinds})
    if others:
        name = type(model).__name__
        raise InputError(f"cache=True is for caches of keys and values alone; {name} keeps {', '.join(others)}")


def positions(mask: Tensor) -> Tensor:
    """The position of each token among those that are no padding, [B, N], as transformers counts them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def admit(program: Program, model: torch.nn.Module, tensors: Sequence[Tensor]) -> Program:
    """Extend a step's ranges to single sequences and tokens and to an empty cache, where torch.export starts at 2.

    Raises:
        TraceError: the graph is not the model's there.
    """
    axes = {IDS: ("batch", "new"), POSITIONS: ("batch", "new"), MASK: ("batch", "all"), PAST: ("batch", "", "past", "")}
    names: dict[str, set[str]] = {"batch": set(), "new": set(), "past": set(), "all": set()}
    example: dict[str, int] = {}
    for item, tensor in zip(program.signature.inputs, tensors, strict=True):
        for kind, name, size in zip(axes[item.path.split(".")[0]], item.shape, tensor.shape, strict=True):
            example[kind] = size
            if kind and isinstance(name, str):
                names[kind].add(name)
    for least in ({"new": 1}, {"past": 0}, {"new": 1, "past": 1}, {"batch": 1}, {"batch": 1, "new": 1, "past": 0}):
        sizes = example | least
        sizes["all"] = sizes["new"] + sizes["past"]
        if not right_at(program, model, tensors, {name: sizes[kind] for kind in names for name in names[kind]}):
            text = ", ".join(f"{kind} {size}" for kind, size in least.items())
            raise TraceError(
                f"torch.export's graph of {type(model).__name__} is no step of generation: it is not the model's where "
                f"sizes are {text}; compile it without its cache"
            )
    lows = {"batch": 1, "new": 1, "past": 0, "all": 1}
    return with_lows(program, {name: lows[kind] for kind in names for name in names[kind]})


def prepare(model: Any, example: Any, calibration: Iterable[Any]) -> tuple[torch.nn.Module, Any, list[Any]]:
    """A decoder, its example and its calibration, as those of a step."""
    step = step_of(model)
    if example is None:
        raise InputError("cache=True needs example_inputs, a prompt to trace with")
    return step, step_inputs(model, example), prompts(model, calibration)


def prompts(model: Any, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Prompts as inputs of a step with an empty cache, for calibration: the first tokens are unlike all others."""
    return [step_inputs(model, batch, past=0) for batch in batches]


# --- generate ----------------------------------------------------------------------------------------------------


class Decoding:
    """A compiled step as the forward of a transformers model, called by its `generate`."""

    def __init__(self, run: Callable[..., Any], signature: Signature) -> None:
        self._run = run
        paths = {item.path: item for item in signature.inputs}
        self._positions = POSITIONS in paths
        layers = sum(path.startswith(CACHES) for path in paths) // 2
        pairs = [[paths[f"{CACHES}{layer}.{part}"] for part in (0, 1)] for layer in range(layers)]
        self._past = [[(int(item.shape[1]), int(item.shape[3]), item.dtype) for item in pair] for pair in pairs]

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

        self._check(options)
        past = self._tensors(past_key_values, input_ids.shape[0])
        length = past[0][0].shape[2] + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], length)
        if attention_mask.shape[-1] != length:
            raise InputError(
                f"{MASK} is of {attention_mask.shape[-1]} tokens, those of the cache and the new ones are {length}"
            )
        given = {IDS: input_ids, MASK: attention_mask.to(torch.int64), PAST: past}
        if self._positions:
            given[POSITIONS] = positions(attention_mask)[:, -input_ids.shape[1] :]
            if position_ids is not None:
                given[POSITIONS] = position_ids.expand_as(input_ids)
        found = self._run(**given)
        return CausalLMOutputWithPast(logits=found[LOGITS], past_key_values=_filled(found[PAST]))

    def _check(self, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            if name == _LAST_ONLY and (isinstance(value, Tensor) or value not in (0, 1)):
                raise InputError("the compiled step gives the last token's logits alone; generate without assistance")
            empty = value is None or value is False or (isinstance(value, Mapping) and not value)
            if name not in (*_IGNORED, _LAST_ONLY) and not empty:
                raise InputError(f"the compiled step does not take {name!r}; generate with the model itself")

    def _tensors(self, cache: Any, batch: int) -> list[tuple[Tensor, ...]]:
        """Keys and values in a cache of transformers; without tokens in it, empty ones."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        if cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0):
            return [
                tuple(torch.empty(batch, heads, 0, size, dtype=getattr(torch, dtype)) for heads, size, dtype in pair)
                for pair in self._past
            ]
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise InputError(f"the compiled step takes a DynamicCache() of whole layers, found {describe(cache)}")
        return [(layer.keys, layer.values) for layer in cache.layers]


def _filled(past: Iterable[tuple[Tensor, Tensor]]) -> Any:
    """A cache of transformers with these keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def generate(model: Any, run: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """The `generate` of a decoder, with a compiled step in place of its forward.

    Raises:
        InputError: the step was not compiled with a cache.
    """
    if model is None:
        raise InputError("the model was compiled without its cache: give compile() cache=True to generate with it")
    writer = copy.copy(model)
    writer.forward = functools.wraps(model.forward)(Decoding(run, signature))

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
