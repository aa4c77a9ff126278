"""The corpus as tokens: what is calibrated on, what quality is judged on, and what each shape is run on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from corpus import CALIBRATION, EVALUATION, read_corpus
from workloads import Inputs, Shape, model_folder, padding

EVALUATION_SHAPE = (8, 128)  # texts of the evaluation are cut or padded to it
CALIBRATION_LENGTH = 128
SAMPLES = 16  # rows of each shape, or 4 batches if that is more


@cache
def tokenizer() -> Any:
    from fxpress.compiler.hf import load_tokenizer

    return load_tokenizer(model_folder())


def encode(texts: Sequence[str], length: int | None = None) -> Inputs:
    """Token ids and mask, padded to `length` or else to the longest of the texts (CALIBRATION_LENGTH at most)."""
    found = tokenizer()(
        list(texts),
        truncation=True,
        max_length=length or CALIBRATION_LENGTH,
        padding="max_length" if length else "longest",
        return_tensors="np",
    )
    return {name: found[name].astype(numpy.int64) for name in ("input_ids", "attention_mask")}


def calibration(count: int = CALIBRATION) -> list[Inputs]:
    """Batches of 8 texts, shortest first, so that there is little padding.

    Texts beyond those that the corpus has for it are the last that no part has; `samples` takes the first.
    """
    corpus = read_corpus()
    chosen = [*corpus.calibration, *corpus.rest[len(corpus.rest) - (count - CALIBRATION) :]]
    texts = sorted(chosen, key=lambda text: int(encode([text])["attention_mask"].sum()))
    return [encode(texts[start : start + 8]) for start in range(0, len(texts), 8)]


def evaluation(count: int = EVALUATION) -> list[Inputs]:
    """The docstrings of so many pairs and then their sources, in batches of EVALUATION_SHAPE."""
    pairs = read_corpus().evaluation[:count]
    texts = [pair.docstring for pair in pairs] + [pair.source for pair in pairs]
    batch, length = EVALUATION_SHAPE
    assert len(texts) % batch == 0
    return [encode(texts[start : start + batch], length) for start in range(0, len(texts), batch)]


def samples(shape: Shape) -> list[Inputs]:
    """Batches of a shape; each row is a text that is long enough, cut to size."""
    batch, length = shape
    mask = padding(shape)
    texts = iter(read_corpus().rest)

    def row(size: int) -> Any:
        for text in texts:
            found = encode([text], size)  # cut, with the separator at its end
            if found["attention_mask"].all():
                return numpy.pad(found["input_ids"][0], (0, length - size), constant_values=tokenizer().pad_token_id)
        raise SystemExit(f"the standard library has too few functions of {size} tokens")

    sizes = [int(size) for size in mask.sum(1)]
    rows = [numpy.stack([row(size) for size in sizes]) for _ in range(max(SAMPLES // batch, 4))]
    return [{"input_ids": ids, "attention_mask": mask} for ids in rows]


def save(file: Path, batches: list[Inputs]) -> None:
    """Batches of any sizes as one .npz file."""
    numpy.savez(
        file, **{f"{index}.{name}": array for index, batch in enumerate(batches) for name, array in batch.items()}
    )


def load(file: Path) -> list[Inputs]:
    """What `save` wrote."""
    batches: dict[str, Inputs] = {}
    with numpy.load(file) as arrays:
        for key in arrays.files:
            index, name = key.split(".")
            batches.setdefault(index, {})[name] = arrays[key]
    return list(batches.values())
