"""What our points are meant to reach: the parts that all kinds of points share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from candidates import named
from measure import Results
from workloads import EAGER


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


def speed(results: Results, point: str, wanted: float, against: tuple[str, ...], wish: str) -> Target:
    """Times as fast as the fastest of some others, at every shape; 1 is no speed-up."""
    found: dict[str, float] = {}
    for shape, rows in results.rows.items():
        measured = {row.name: row.ms for row in rows if row.measured}
        others = [measured[name] for name in against if name in measured]
        if point in measured and others:
            found[named(shape)] = min(others) / measured[point]
    text = ", ".join(f"{times:.2f} at {shape}" for shape, times in found.items())
    whole = len(found) == len(results.rows)
    return Target(point, wish, text, all(t >= wanted and t > 1 for t in found.values()) if whole else None)


def loss(results: Results, point: str, text: str, kind: str, most: float) -> Target:
    """What the embeddings lose of their use, as `kind` of Usefulness judges it."""
    wish = f"{text}: loses at most {most:.1%}"
    use = results.quality[point].usefulness if point in results.quality else None
    truth = results.quality[EAGER].usefulness
    assert truth is not None
    if use is None:
        return Target(point, wish, "", None)
    found = 1 - getattr(use, kind) / getattr(truth, kind)
    return Target(point, wish, f"{found:.2%}", found <= most)


def target_table(targets: Iterable[Target], explanation: str) -> list[str]:
    """What our points were meant to reach, what they reach, and whether that is enough."""
    lines = ["### Targets", "", explanation, "", "| point | target | found | met |", "|---|---|---|---|"]
    return [*lines, *(f"| {t.point} | {t.wanted} | {t.found} | {t.verdict} |" for t in targets), ""]
