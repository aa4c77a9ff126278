"""What errors say."""

from __future__ import annotations

import pytest

from fxpress.ir.errors import nearest, one_line


def test_nearest() -> None:
    assert nearest("fuze", ["fuse", "canonicalize"]) == "did you mean 'fuse'? (valid: canonicalize, fuse)"


def test_nothing_near() -> None:
    assert nearest("x", ["fuse"]) == "(valid: fuse)"


@pytest.mark.parametrize(
    "text, line", [("\n  first \nsecond", "first"), ("", "ValueError"), ("x" * 20, "x" * 7 + "...")]
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(ValueError(text), limit=10) == line
