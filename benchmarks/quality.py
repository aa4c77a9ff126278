"""What a change of the model's numbers does to what it is used for, judged by what the fp32 model gives.

Token states are last_hidden_state [rows, length, hidden] with its attention mask [rows, length]; a text's embedding is
the mean of its states where the mask is 1, as sentence encoders of this kind take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy

Inputs = dict[str, Any]  # by name: numpy arrays
NEIGHBOURS = 10


@dataclass(frozen=True)
class Closeness:
    """Cosines with fp32: of the states of tokens that are not padding, and of pooled embeddings."""

    token_mean: float
    token_min: float
    pooled_mean: float
    pooled_min: float


@dataclass(frozen=True)
class Usefulness:
    """What embeddings are good for. For fp32 itself `spearman` and `overlap` are 1."""

    spearman: float  # of all pairwise similarities, with those of fp32
    overlap: float  # share of each text's nearest neighbours that are the same ones with fp32
    mrr: float  # mean reciprocal rank of a function's source among all sources, asked for by its docstring


def states_of(call: Callable[[Inputs], Any], batches: Iterable[Inputs]) -> tuple[Any, Any]:
    """Token states and masks of batches of one shape, the rows of all batches together."""
    states, masks = [], []
    for batch in batches:
        states.append(numpy.array(call(batch), numpy.float32))
        masks.append(batch["attention_mask"])
    return numpy.concatenate(states), numpy.concatenate(masks)


def pooled(states: Any, mask: Any) -> Any:
    """Embeddings [rows, hidden] of length 1: means over what is not padding."""
    valid = mask[:, :, None].astype(bool)
    return normalised(numpy.where(valid, states, 0).sum(1, dtype=numpy.float64) / valid.sum(1))


def closeness(states: Any, truth: Any, mask: Any) -> Closeness:
    """How near token states and embeddings are to fp32's; NaN counts as -1."""
    valid = mask.astype(bool)
    tokens = cosines(normalised(states[valid]), normalised(truth[valid]))
    embeddings = cosines(pooled(states, mask), pooled(truth, mask))
    return Closeness(*(float(value) for item in (tokens, embeddings) for value in (item.mean(), item.min())))


def usefulness(embeddings: Any, truth: Any) -> Usefulness:
    """Embeddings [2 N, hidden] of N docstrings and then their N sources, and those of fp32."""
    count = len(embeddings) // 2
    pairs = numpy.triu_indices(2 * count, 1)
    ours, theirs = embeddings @ embeddings.T, truth @ truth.T
    ranks = numpy.corrcoef(ranked(ours[pairs]), ranked(theirs[pairs]))[0, 1]
    same = [len({*a} & {*b}) for a, b in zip(neighbours(ours), neighbours(theirs), strict=True)]
    found = embeddings[:count] @ embeddings[count:].T
    places = (~(found < numpy.diag(found)[:, None])).sum(1)  # itself counted; ties and NaN are places lost
    return Usefulness(float(ranks), sum(same) / (NEIGHBOURS * len(same)), float((1 / places).mean()))


def neighbours(similarities: Any) -> Any:
    """The NEIGHBOURS nearest others of each row."""
    others = similarities.copy()
    numpy.fill_diagonal(others, -numpy.inf)
    return numpy.argpartition(-others, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def ranked(values: Any) -> Any:
    """The rank of each value; equal ones, which hardly occur among floats, in the order they stand."""
    ranks = numpy.empty(len(values))
    ranks[numpy.argsort(values, kind="stable")] = numpy.arange(len(values))
    return ranks


def normalised(rows: Any) -> Any:
    """Rows of length 1, in fp64."""
    rows = rows.astype(numpy.float64)
    return rows / numpy.linalg.norm(rows, axis=-1, keepdims=True)


def cosines(ours: Any, theirs: Any) -> Any:
    return numpy.nan_to_num((ours * theirs).sum(-1), nan=-1.0)
