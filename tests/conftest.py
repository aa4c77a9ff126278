"""What every test has: the golden fixture, the markers' skips, and settings that make runs repeatable and offline."""

import difflib
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent

# Two test processes share two cores; nothing is fetched from a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's interpreter runs kernels on the CPU; Triton reads this when it is imported. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Of small graphs torch's cache of operators on fake tensors costs more than it saves; torch reads this when imported.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
# Property tests draw the same examples in each run, and the time that one takes on a busy machine is no failure.
settings.register_profile("fxpress", deadline=None, derandomize=True)
settings.load_profile("fxpress")
# Graphs are many small objects that live long: collecting them as often as by default takes a tenth of the time.
gc.set_threshold(200_000, 50, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--exhaustive", action="store_true", help="also run the tests marked exhaustive (with --slow)")
    parser.addoption("--update-golden", action="store_true", help="write the golden texts instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    # Registered, because the hooks of this conftest itself are not asked about the folder above it.
    config.pluginmanager.register(_RootIsNoTestPackage())


class _RootIsNoTestPackage:
    """Keeps pytest from importing the root's __init__.py, under the checkout's name, as a second copy of fxpress."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == TESTS.parent else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        _skip(items, "slow", "slow: run with --slow")
    if not config.getoption("--exhaustive"):
        _skip(items, "exhaustive", "exhaustive: run with --exhaustive")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "gpu: no CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`golden(text)` compares text with tests/golden/<test file>/<test name>.txt; once in a test."""
    parts = request.node.nodeid.split("::", 1)[1]
    name = re.sub(r"[^\w.]+", "-", parts).strip("-")
    path = TESTS / "golden" / request.path.relative_to(TESTS).with_suffix("") / f"{name}.txt"
    shown = path.relative_to(TESTS.parent)
    calls = 0

    def compare(text: str) -> None:
        nonlocal calls
        calls += 1
        assert calls == 1, "golden() has one text for each test: join the parts, or parametrise the test"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        hint = "If the new text is right, run pytest with --update-golden (make golden) and read the diff."
        if not path.is_file():
            pytest.fail(f"There is no {shown}. {hint}\n{text}", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), str(shown), "this run", lineterm="")
            pytest.fail(f"The text differs from {shown}. {hint}\n" + "\n".join(diff), pytrace=False)

    return compare
