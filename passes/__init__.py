"""Rewrite passes, one a file; a pass's file name is its name on the command line."""

from .canonicalize import Canonicalize
from .extend_positions import ExtendPositions
from .fold import Fold
from .fuse import Fuse
from .integer_only import IntegerOnly
from .mask_weights import MaskWeights
from .quantize import Quantize
from .remove_padding import RemovePadding
from .replace_attention import ReplaceAttention

__all__ = [
    "Canonicalize",
    "ExtendPositions",
    "Fold",
    "Fuse",
    "IntegerOnly",
    "MaskWeights",
    "Quantize",
    "RemovePadding",
    "ReplaceAttention",
]
