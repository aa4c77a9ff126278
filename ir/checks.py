"""Checks of options that passes share; each refusal is one line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .errors import InputError, nearest

_DECIBELS = 1000  # what is beyond is no ratio that a float can hold


def one_of(option: str, value: Any, valid: Iterable[str | None]) -> None:
    """Refuse a value that is none of the valid ones."""
    names = list(valid)
    if not isinstance(value, str | None) or value not in names:
        raise InputError(f"unknown {option} {value!r}: {nearest(str(value), map(str, names))}")


def of_kind(option: str, value: Any, *kinds: type | None) -> None:
    """Refuse a value whose type is none of the kinds, None among them where it may be left out."""
    plain = tuple(kind for kind in kinds if kind is not None)
    if not (value is None and None in kinds) and type(value) not in plain:
        names = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
        raise InputError(f"{option} must be {names}, found {value!r}")


def names(option: str, value: Any) -> None:
    """Refuse what is no list of names."""
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{option} must be a list of names, found {value!r}; write {option}=['name']")


def seed(value: Any) -> None:
    """Refuse a seed that random generators do not take."""
    of_kind("seed", value, int)
    if not -(2**63) <= value < 2**63:
        raise InputError(f"seed must be an integer of 64 bits, found {value}")


def threads(value: Any) -> None:
    """Refuse a number of threads that there cannot be; None: as many as the backend takes by itself."""
    of_kind("threads", value, int, None)
    if value is not None and value < 1:
        raise InputError(f"threads must be at least 1, found {value}")


def targets(min_cosine: float | None, min_sqnr_db: float | None) -> None:
    """Refuse targets for outputs that there cannot be."""
    if min_cosine is not None and not 0 < min_cosine < 1:
        raise InputError(f"min_cosine must lie between 0 and 1, found {min_cosine}")
    if min_sqnr_db is not None and not (math.isfinite(min_sqnr_db) and abs(min_sqnr_db) <= _DECIBELS):
        raise InputError(f"min_sqnr_db must lie between -{_DECIBELS} and {_DECIBELS}, found {min_sqnr_db}")
