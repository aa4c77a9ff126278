"""Every candidate by its name."""

from __future__ import annotations

from candidates import FLOAT32, Candidate
from peers_int8 import QUANTIZED
from points import OUR_POINTS

CANDIDATES: dict[str, Candidate] = {**FLOAT32, **QUANTIZED, **OUR_POINTS}
