"""What candidates do on the corpus, as a table."""

from __future__ import annotations

from batches import EVALUATION_SHAPE
from corpus import EVALUATION
from measure import Results
from quality import NEIGHBOURS, Closeness
from report import cell
from workloads import EAGER


def cosines(near: Closeness | None) -> str:
    """Four cells."""
    if near is None:
        return "- | - | - | -"
    return f"{near.token_mean:.5f} | {near.token_min:.4f} | {near.pooled_mean:.5f} | {near.pooled_min:.4f}"


def quality_table(results: Results) -> list[str]:
    """What each candidate does on the corpus."""
    truth = results.quality[EAGER]
    assert truth.usefulness is not None
    lines = [
        "### Quality on the corpus",
        "",
        f"{EVALUATION} pairs in batches of {EVALUATION_SHAPE[0]}. Spearman: of all pairwise similarities, with fp32's; "
        f"top {NEIGHBOURS}: nearest neighbours that are fp32's too; MRR: finding a function among {EVALUATION} by its "
        "docstring, and what it loses of fp32's. Files: model and weights on disk, and their share of fp32's weights.",
        "",
        f"| candidate | token cosine | smallest | pooled cosine | smallest | Spearman | top {NEIGHBOURS} | MRR | loss "
        "| MB | of fp32 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.quality.items():
        if found.usefulness is None:
            lines.append(f"| {name} | failed: {cell(found.failure or 'not run')} | | | | | | | | | |")
            continue
        use = found.usefulness
        lines.append(
            f"| {name} | {cosines(found.closeness)} | {use.spearman:.4f} | {use.overlap:.1%} | {use.mrr:.4f} "
            f"| {1 - use.mrr / truth.usefulness.mrr:.2%} | {found.megabytes:.1f} "
            f"| {found.megabytes / truth.megabytes:.2f} |"
        )
    return [*lines, ""]
