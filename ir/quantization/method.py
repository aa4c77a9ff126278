"""The words of Quantize's `method`: kinds of range, and what fits weights to calibration data."""

from __future__ import annotations

from ..checks import of_kind, one_of
from ..errors import InputError

RANGES = ("minmax", "average", "percentile", "entropy", "mse")
IMPROVEMENTS = ("smoothquant", "awq", "gptq", "bias")  # these need calibration data


def words_of(method: str) -> list[str]:
    """The words of a method."""
    return [word.strip() for word in method.split("+")]


def check_method(method: str) -> None:
    """Refuse words that there are not, or that exclude one another."""
    of_kind("method", method, str)
    words = words_of(method)
    for word in words:
        one_of("method", word, ("auto", *RANGES, *IMPROVEMENTS))
    if "auto" in words and len(words) > 1:
        raise InputError(f"method 'auto' chooses all words itself, found {method!r}; leave 'auto' out")
    ranges = [word for word in words if word in RANGES]
    if len(ranges) > 1:
        raise InputError(f"method has two kinds of range, {ranges[0]!r} and {ranges[1]!r}; give one")


def check_use(method: str, level: str, mode: str) -> None:
    """Refuse words that would do nothing.

    Args:
        level: of activations, "float" for weights alone.
        mode: how their ranges are found.
    """
    words = words_of(method)
    found = next((word for word in words if word in RANGES), "minmax")
    if (mode == "dynamic" or level in ("float", "float8")) and found != "minmax":
        raise InputError(f"method {found!r} is a static range of activations; give mode='static' too")
    if level == "float" and "smoothquant" in words:
        raise InputError("method 'smoothquant' is for activations of 8 bits; for weights alone give 'awq'")
    if level != "float" and "awq" in words:
        raise InputError("method 'awq' is for weights alone; give activations=None, or 'smoothquant'")
