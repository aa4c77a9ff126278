"""What the points of our curve are meant to reach."""

from __future__ import annotations

from collections.abc import Iterator

from measure import Results
from targets import Target, loss, speed
from workloads import (
    BF16,
    DYNAMIC,
    DYNAMIC_23,
    DYNAMIC_OPTIMIZED,
    EAGER,
    INT4,
    INT4_NEAREST,
    INT8,
    INT8_CLOSE,
    INT8_OPENVINO,
)

PEERS = (DYNAMIC, DYNAMIC_23, DYNAMIC_OPTIMIZED)


def targets(results: Results) -> Iterator[Target]:
    """Every target, in the order of the points."""
    yield faster(results, INT8, 1.4, (DYNAMIC,))
    yield faster(results, INT8, 1.4, PEERS)
    yield closeness(results, INT8, "token_mean", 0.995)
    yield closeness(results, INT8, "pooled_mean", 0.997)
    yield from losses(results, INT8, 0.005)
    yield faster(results, INT8_OPENVINO, 1.4, (DYNAMIC,))
    yield faster(results, INT8_OPENVINO, 1.4, PEERS)
    yield closeness(results, INT8_OPENVINO, "token_mean", 0.995)
    yield closeness(results, INT8_OPENVINO, "pooled_mean", 0.997)
    yield from losses(results, INT8_OPENVINO, 0.005)
    yield faster(results, INT8_CLOSE, 1.0, PEERS)
    yield closeness(results, INT8_CLOSE, "pooled_mean", 0.999)
    yield closeness(results, INT8_CLOSE, "token_min", 0.99)
    yield from losses(results, INT8_CLOSE, 0.005)
    yield faster(results, BF16, 1.0, PEERS)
    yield from losses(results, BF16, 0.005)
    yield size(results, INT4, 0.25)
    yield from losses(results, INT4, 0.02)
    yield nearer(results, INT4, INT4_NEAREST)


def faster(results: Results, point: str, wanted: float, against: tuple[str, ...]) -> Target:
    """Times as fast as the fastest of some peers."""
    peer = DYNAMIC if against == (DYNAMIC,) else f"the fastest variant of {DYNAMIC}"
    wish = f"at least {wanted:.1f}x the speed of {peer}" if wanted > 1 else f"faster than {peer}"
    return speed(results, point, wanted, against, wish)


def closeness(results: Results, point: str, kind: str, wanted: float) -> Target:
    """A cosine with fp32."""
    texts = {"token_mean": "token cosine, mean", "token_min": "token cosine, smallest", "pooled_mean": "pooled, mean"}
    wish = f"{texts[kind]}: at least {wanted}"
    near = results.quality[point].closeness if point in results.quality else None
    if near is None:
        return Target(point, wish, "", None)
    value = getattr(near, kind)
    return Target(point, wish, f"{value:.5f}", value >= wanted)


def losses(results: Results, point: str, most: float) -> Iterator[Target]:
    """What the embeddings lose of their use."""
    kinds = {"Spearman of pairwise similarities": "spearman", "nearest neighbours": "overlap", "retrieval MRR": "mrr"}
    for text, kind in kinds.items():
        yield loss(results, point, text, kind, most)


def size(results: Results, point: str, most: float) -> Target:
    """The share of fp32's weights on disk."""
    wish = f"file: at most {most}x fp32's"
    if point not in results.quality or results.quality[point].usefulness is None:
        return Target(point, wish, "", None)
    share = results.quality[point].megabytes / results.quality[EAGER].megabytes
    return Target(point, wish, f"{share:.3f}x", share <= most)


def nearer(results: Results, point: str, other: str) -> Target:
    """Nearer to fp32 than another, by the mean cosines of tokens and of embeddings."""
    wish = f"nearer to fp32 than {other}"
    ours, theirs = (results.quality[name].closeness if name in results.quality else None for name in (point, other))
    if ours is None or theirs is None:
        return Target(point, wish, "", None)
    found = f"1 - token cosine {1 - ours.token_mean:.1e} and {1 - theirs.token_mean:.1e}"
    return Target(point, wish, found, ours.token_mean > theirs.token_mean and ours.pooled_mean > theirs.pooled_mean)
