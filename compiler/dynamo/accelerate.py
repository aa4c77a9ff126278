"""The name `fxpress` for Accelerate, whose list of torch.compile backends is closed: transformers' Trainer asks it."""

from __future__ import annotations

from typing import Any

from ...ir.errors import InputError

NAME = "FXPRESS"


def register_with_accelerate() -> None:
    """Let Accelerate, and so transformers' Trainer, take `torch_compile_backend="fxpress"`. Safe to call again.

    Raises:
        InputError: Accelerate is not installed.
    """
    try:
        from accelerate.utils import DynamoBackend
    except ImportError as error:
        raise InputError("this needs Accelerate: pip install accelerate") from error
    kind: Any = DynamoBackend
    if NAME in kind._member_map_:
        return
    member = str.__new__(kind, NAME)
    member._name_, member._value_ = NAME, NAME
    kind._member_names_.append(NAME)
    kind._member_map_[NAME] = kind._value2member_map_[NAME] = member
