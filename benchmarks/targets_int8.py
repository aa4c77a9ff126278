"""What the points of our curve are meant to reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from candidates import named
from measure import Results
from workloads import DYNAMIC, DYNAMIC_23, DYNAMIC_OPTIMIZED, EAGER, INT4, INT4_NEAREST, INT8, INT8_CLOSE

PEERS = (DYNAMIC, DYNAMIC_23, DYNAMIC_OPTIMIZED)


@dataclass(frozen=True)
class Target:
    """One target of one point; `met` is None where the point was not measured."""

    point: str
    wanted: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "met", False: "**not met**"}[self.met]


def targets(results: Results) -> Iterator[Target]:
    """Every target, in the order of the points."""
    yield speed(results, INT8, 1.4, (DYNAMIC,))
    yield speed(results, INT8, 1.4, PEERS)
    yield closeness(results, INT8, "token_mean", 0.995)
    yield closeness(results, INT8, "pooled_mean", 0.997)
    yield from losses(results, INT8, 0.005)
    yield speed(results, INT8_CLOSE, 1.0, PEERS)
    yield closeness(results, INT8_CLOSE, "pooled_mean", 0.999)
    yield closeness(results, INT8_CLOSE, "token_min", 0.99)
    yield from losses(results, INT8_CLOSE, 0.005)
    yield size(results, INT4, 0.25)
    yield from losses(results, INT4, 0.02)
    yield nearer(results, INT4, INT4_NEAREST)


def speed(results: Results, point: str, wanted: float, against: tuple[str, ...]) -> Target:
    """Times as fast as the fastest of some peers, at every shape."""
    found: dict[str, float] = {}
    for shape, rows in results.rows.items():
        measured = {row.name: row.ms for row in rows if row.measured}
        peers = [measured[name] for name in against if name in measured]
        if point in measured and peers:
            found[named(shape)] = min(peers) / measured[point]
    text = ", ".join(f"{times:.2f} at {shape}" for shape, times in found.items())
    peer = DYNAMIC if against == (DYNAMIC,) else f"the fastest variant of {DYNAMIC}"
    wish = f"at least {wanted:.1f}x the speed of {peer}" if wanted > 1 else f"faster than {peer}"
    whole = len(found) == len(results.rows)
    return Target(point, wish, text, all(t >= wanted and t > 1 for t in found.values()) if whole else None)


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
    use = results.quality[point].usefulness if point in results.quality else None
    truth = results.quality[EAGER].usefulness
    assert truth is not None
    kinds = {"Spearman of pairwise similarities": "spearman", "nearest neighbours": "overlap", "retrieval MRR": "mrr"}
    for text, kind in kinds.items():
        wish = f"{text}: loses at most {most:.1%}"
        if use is None:
            yield Target(point, wish, "", None)
        else:
            loss = 1 - getattr(use, kind) / getattr(truth, kind)
            yield Target(point, wish, f"{loss:.2%}", loss <= most)


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
