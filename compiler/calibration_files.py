"""Calibration data from a file, for the command line: texts through the model's tokenizer, or tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..ir.errors import InputError, one_line
from . import hf
from .calibration import track

ROWS = 16  # of a batch
TOKENS = 2048  # of a text, where neither the model nor its tokenizer has a limit
KINDS = (".txt", ".safetensors")


@dataclass(frozen=True)
class Batches:
    """Inputs by name, batch by batch, and one line that says what they are made of."""

    batches: list[dict[str, Tensor]]
    summary: str


@dataclass(frozen=True)
class CalibrationFile:
    """What a file holds: texts, or tensors by name whose first axis counts samples."""

    path: Path
    texts: Sequence[str] = ()
    tensors: Mapping[str, Tensor] | None = None

    def batches(self, folder: Path, model: torch.nn.Module, example: Mapping[str, Tensor]) -> Batches:
        """Batches of 16 samples, the last with what is left.

        Args:
            folder: of the model, which has its tokenizer, too.
            example: the inputs by name that the model is compiled for; the batches have the same names.

        Raises:
            InputError: the model's folder has no tokenizer or the model reads more than texts; the tensors have other
                names.
        """
        if self.tensors is not None:
            return self._of_tensors(self.tensors, example)
        return self._of_texts(folder, model, example)

    def _of_tensors(self, tensors: Mapping[str, Tensor], example: Mapping[str, Tensor]) -> Batches:
        if set(tensors) != set(example):
            raise InputError(
                f"{str(self.path)!r} holds {', '.join(sorted(tensors))}; the model reads {', '.join(sorted(example))}"
            )
        rows = len(next(iter(tensors.values())))
        made = [
            {name: tensors[name][start : start + ROWS].clone() for name in example} for start in range(0, rows, ROWS)
        ]
        return Batches(made, f"{rows} samples in batches of {min(rows, ROWS)}")

    def _of_texts(self, folder: Path, model: torch.nn.Module, example: Mapping[str, Tensor]) -> Batches:
        unknown = sorted(set(example) - {"input_ids", "attention_mask"})
        if unknown:
            raise InputError(f"the model reads {', '.join(unknown)}, which no text gives; give a .safetensors file")
        tokenizer = hf.load_tokenizer(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # any: the mask hides it
        config: Any = model.config
        longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", TOKENS), TOKENS)
        vocabulary = config.get_text_config().vocab_size
        made, cut, tokens = [], 0, 0
        parts = [self.texts[start : start + ROWS] for start in range(0, len(self.texts), ROWS)]
        for part in track(parts, "reading the calibration data"):
            whole = self._tokens(tokenizer, part)
            cut += sum(len(row) > longest for row in whole)
            rows = self._tokens(tokenizer, part, truncation=True, max_length=longest)
            tokens += sum(map(len, rows))
            if max(map(max, rows)) >= vocabulary:
                raise InputError(
                    f"the tokenizer in {str(folder)!r} has numbers up to {max(map(max, rows))}, "
                    f"the model's vocabulary has {vocabulary}: it is another model's"
                )
            batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            made.append({name: batch[name] for name in example})
        cut_text = f", {cut} of them cut to {longest} tokens" if cut else ""
        return Batches(made, f"{len(self.texts)} texts{cut_text}; {tokens} tokens in batches of {len(parts[0])}")

    def _tokens(self, tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(list(texts), verbose=False, **options)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise InputError(f"{str(self.path)!r}: the tokenizer makes nothing of {text!r}")
        return rows


def read(path: Path) -> CalibrationFile:
    """Read a file and check what can be checked without the model.

    A `.txt` file has one text a line, in UTF-8; empty lines are left out. A `.safetensors` file has a tensor for each
    input of the model, by its name.

    Raises:
        InputError: no such file, another kind of file, nothing in it, damaged, samples that do not go together, NaN or
            infinity.
    """
    name = repr(str(path))
    if path.suffix not in KINDS:
        raise InputError(f"calibration data must end in {' or '.join(KINDS)}, found {name}")
    if not path.is_file():
        raise InputError(f"there is no file {name}")
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # other separators are part of a text
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {name}: {one_line(error)}") from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise InputError(f"{name} has no text; give one a line")
        return CalibrationFile(path, texts)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {name}: {one_line(error)}") from error
    if not tensors:
        raise InputError(f"{name} holds no tensor; give one for each input of the model")
    for key, value in tensors.items():
        if value.numel() == 0 or value.dim() == 0:
            raise InputError(f"{name}: {key!r} has no samples: shape {list(value.shape)}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{name}: {key!r} has NaN or infinity")
    counts = {key: len(value) for key, value in tensors.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{name}: the tensors have {counts} samples, expected equally many of each")
    return CalibrationFile(path, (), tensors)
