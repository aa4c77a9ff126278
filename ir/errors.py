"""The errors fxpress raises. Every one is a single line: the cause, the place, the next step.

This module must stay importable without torch: loading an ONNX artefact needs it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxpressError(Exception):
    """Base of every error that fxpress raises on purpose."""


class InputError(FxpressError, ValueError):
    """What the user passed is wrong: an unknown pass or option, example inputs of the wrong kind, a bad path."""


class TraceError(FxpressError):
    """The model cannot be traced to a graph."""


class RewriteError(FxpressError):
    """A pass could not do its work."""


class VerifyError(FxpressError):
    """A program is ill-formed, or computes something else than it should."""


class LoweringError(FxpressError):
    """A backend cannot take the program."""


class ArtifactError(FxpressError):
    """A saved artefact is missing, truncated, altered or of another kind."""


def nearest(name: object, valid: Iterable[str]) -> str:
    """Say what `name` could have meant: `did you mean 'fuse'? (valid: canonicalize, fuse)`."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(valid: {', '.join(names)})"


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first meaningful line of another library's error, shortened to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
