"""Measurements of these tests stay out of the user's cache folder; folders of dropped models vanish quietly."""

import shutil
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fxpress.compiler import driver


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache", numbered=True)))
        yield


class _Quiet(TemporaryDirectory[str]):
    @classmethod
    def _cleanup(cls, name: str, *_: Any, **__: Any) -> None:
        shutil.rmtree(name, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _no_resource_warnings() -> Iterator[None]:
    """A Compiled that is dropped leaves its TemporaryDirectory to the collector, which warns in any later test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "TemporaryDirectory", _Quiet, raising=False)
        yield
