"""The table of families: what its columns count."""

from __future__ import annotations

from fxpress.compiler.families import FamilyResult, as_markdown


def test_gated_layers_count_as_activations() -> None:
    fused = {"gated_linear": 2, "linear_gelu": 1, "add_rms_norm": 4, "attention": 5, "pack_projections": 6}
    table = as_markdown([FamilyResult("tiny", fused, ((1, 9),), True, 130.0, 1.0)])
    assert table.splitlines()[-1] == "| tiny | yes | yes | (1, 9) | 130.0 dB | 5 | 6 | 4 | 3 |"
