"""Tables of many alike: some are tried in every run of the tests, the others by `make exhaustive`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(names: Iterable[str], few: Collection[str] = (), *, many: Collection[str] = ()) -> list[Any]:
    """Parameters of a test: all but the `few` are marked exhaustive, or, where they are fewer, the `many` are."""
    names = list(names)
    unknown = {*few, *many} - {*names}
    assert not unknown and bool(few) != bool(many), f"no such names: {sorted(unknown)}; give few or many"
    left = {*many} or {*names} - {*few}
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in left else name for name in names]
