"""Inputs for any model: from what its forward takes, the first combination of known tensors that the model accepts."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import InputError, one_line
from .trace import plain_attention

Maker = Callable[[Any, int, int], Tensor]
_ATTEMPTS = 40


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _ids(_: Any, batch: int, length: int) -> Tensor:
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))


def _decoder_ids(config: Any, batch: int, length: int) -> Tensor:
    return _ids(config, batch, length // 2 + 1)


def _mask(_: Any, batch: int, length: int) -> Tensor:
    """All ones but the last third of the last row: padding on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return mask


def _positions(_: Any, batch: int, length: int) -> Tensor:
    return torch.arange(length).expand(batch, length).contiguous()


def _boxes(_: Any, batch: int, length: int) -> Tensor:
    corner = torch.randint(0, 30, (batch, length, 2), generator=torch.Generator().manual_seed(length))
    return torch.cat([corner, corner + 5], -1)


def _image(config: Any, batch: int, _: int) -> Tensor:
    side = find(config, "image_size", 64)
    height, width = (side, side) if isinstance(side, int) else side
    return _random(batch, int(find(config, "num_channels", 3)), int(height), int(width))


def _patches(config: Any, batch: int, _: int) -> Tensor:
    """The patches of images of 4 x 4 patches, one after the other, flat."""
    frames, side = find(config, "temporal_patch_size", 1), find(config, "patch_size", 16)
    return _random(16 * batch, int(frames * find(config, "in_channels", 3) * side * side))


def _grids(_: Any, batch: int, __: int) -> Tensor:
    """Frames, rows and columns of the patches of each image."""
    return torch.tensor([[1, 4, 4]] * batch)


def _video(config: Any, batch: int, length: int) -> Tensor:
    return _image(config, batch, length)[:, None].repeat(1, int(find(config, "num_frames", 2)), 1, 1, 1)


def _channels_first_video(config: Any, batch: int, length: int) -> Tensor:
    return _video(config, batch, length).transpose(1, 2).contiguous()


_MEL = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_dim")


def _bins(config: Any) -> int:
    return int(next((value for name in _MEL if isinstance(value := find(config, name, None), int)), 16))


def _fixed_mel(config: Any, batch: int, _: int) -> Tensor:
    """[B, bins, frames], with the only number of frames that a Whisper encoder takes."""
    return _random(batch, _bins(config), 2 * int(find(config, "max_source_positions", 32)))


def _mel(config: Any, batch: int, length: int) -> Tensor:
    return _random(batch, 8 * length, _bins(config))


def _mel_of_length(config: Any, batch: int, length: int) -> Tensor:
    return _random(batch, length, _bins(config))


def _mel_of_fixed_length(config: Any, batch: int, _: int) -> Tensor:
    return _random(batch, int(find(config, "max_length", 64)), _bins(config))


def _wave(_: Any, batch: int, length: int) -> Tensor:
    return _random(batch, 400 + 320 * (length - 1))


def _wave_mask(config: Any, batch: int, length: int) -> Tensor:
    return _mask(config, batch, 400 + 320 * (length - 1))


def _wave_with_channel(config: Any, batch: int, length: int) -> Tensor:
    return _wave(config, batch, length)[:, None]


def _mel_mask(config: Any, batch: int, length: int) -> Tensor:
    return _mask(config, batch, 8 * length)


def _states(config: Any, batch: int, length: int) -> Tensor:
    return _random(batch, length, int(find(config, "hidden_size", 0) or find(config, "d_model", 32)))


def _series(config: Any, batch: int, _: int) -> Tensor:
    shape = (int(find(config, "context_length", 32)), int(find(config, "num_input_channels", 1)))
    return _random(batch, *shape)


# What an argument of forward may be, the likeliest first.
MAKERS: dict[str, tuple[Maker, ...]] = {
    "input_ids": (_ids,),
    "attention_mask": (_mask, _wave_mask, _mel_mask),
    "decoder_input_ids": (_decoder_ids,),
    "pixel_values": (_image, _video, _channels_first_video, _patches),
    "pixel_values_videos": (_video, _channels_first_video),
    "input_features": (_fixed_mel, _mel, _mel_of_length),
    "input_values": (_wave, _wave_with_channel, _mel_of_length, _mel_of_fixed_length),
    "inputs_embeds": (_states,),
    "hidden_states": (_states, _patches),
    "grid_thw": (_grids,),
    "encoder_hidden_states": (_states,),
    "query_embeds": (_states,),
    "past_values": (_series,),
    "bbox": (_boxes,),
    "position_ids": (_positions,),
}
_MASKED = ("input_ids", "input_features", "input_values", "inputs_embeds")
_EXTRA = ("pixel_values", "bbox", "input_features", "input_values", "decoder_input_ids")


def find(config: Any, name: str, default: Any) -> Any:
    """A field of a configuration or of one nested in it."""
    own = vars(config)
    if own.get(name) is not None:
        return own[name]
    for value in own.values():
        if hasattr(value, "model_type"):
            found = find(value, name, None)
            if found is not None:
                return found
    return default


def maker(model: torch.nn.Module, batch: int, length: int) -> Callable[[int, int], dict[str, Tensor]]:
    """What makes inputs of any size: the first combination that the model runs on at this size.

    Raises:
        InputError: none does; with the first failure.
    """
    failure = ""
    config = model.config
    for makers in itertools.islice(_combinations(model), _ATTEMPTS):
        try:
            inputs = {name: make(config, batch, length) for name, make in makers.items()}
        except (TypeError, ValueError, RuntimeError):  # what this maker reads has another meaning in this configuration
            continue
        failed = failure_of(model, inputs)
        if not failed:
            return lambda batch, length, makers=makers: {  # type: ignore[misc]
                name: make(config, batch, length) for name, make in makers.items()
            }
        failure = failure or failed
    raise InputError(failure or f"no input known for {', '.join(_required(model))}")


def failure_of(model: torch.nn.Module, inputs: dict[str, Tensor]) -> str:
    """Why the model cannot run on some inputs, or nothing."""
    try:
        with torch.no_grad(), plain_attention():
            model(**inputs)
    except Exception as error:  # noqa: BLE001  # a model's own code may raise anything
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


def _required(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]  # fmt: skip


def _combinations(model: torch.nn.Module) -> Iterator[dict[str, Maker]]:
    """Arguments and how to make them: first few arguments, then more; each with every way to make it."""
    taken = inspect.signature(model.forward).parameters
    required = _required(model)
    if any(name not in MAKERS for name in required):
        return
    main = [name for name in (getattr(model, "main_input_name", "input_ids"),) if name in taken and name in MAKERS]
    base = list(dict.fromkeys([*main, *required]))
    masked = base + [name for name in ("attention_mask",) if name in taken and any(item in _MASKED for item in base)]
    decodes = ["decoder_input_ids"] if getattr(model.config, "is_encoder_decoder", False) else []
    extras = [name for name in _EXTRA if name in taken]
    choices = [masked + decodes, *([*masked, *decodes, extra] for extra in extras), base + decodes, masked,
               *(masked + list(pair) for pair in itertools.combinations(extras, 2))]  # fmt: skip
    for names in choices:
        unique = [name for name in dict.fromkeys(names) if name in taken]
        if unique:
            for makers in itertools.product(*(MAKERS[name] for name in unique)):
                yield dict(zip(unique, makers, strict=True))
