"""What passes share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from build import normal, program

from fxpress.ir.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class Scaled(Pass):
    by: float = 1.0
    method: str = "all"


def test_pass_prints_the_options_that_are_not_default() -> None:
    name = Scaled.pass_name()
    assert str(Scaled()) == name
    assert str(Scaled(2.0)) == f"{name}(by=2.0)"


def test_pass_without_apply() -> None:
    with pytest.raises(NotImplementedError):
        Pass().apply(program(lambda m, x: x.exp(), normal(2, 3)), Context())


def test_budget() -> None:
    context = Context(max_rewrites=2)
    assert [context.take() for _ in range(3)] == [True, True, False]
    assert context.rewrites == 2


def test_no_budget() -> None:
    assert all(Context().take() for _ in range(3))


def test_changes_are_all_rewrites() -> None:
    result = PassResult()
    result.rewrites.update({"a": 2, "b": 1})
    assert result.changes == 3
