"""The survey's tables in Markdown: docs/families.md."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from ..ir.errors import InputError
from . import survey_models
from .report import decibels
from .survey import SIZES, Outcome

_INTRODUCTION = """# Model families

Written by `make survey` (`fxpress families --all --write docs/families.md`) with {versions}.

Tried: {total} of the {known} families that transformers' `AutoConfig` knows, each as a tiny random model. {compiled}
compile to ONNX and equal eager PyTorch at every size tried ({attending} of them have attention); {refused} are refused
by torch.export, {ours} by fxpress; {wrong} give a wrong result; {missing} cannot be made tiny, or fed, here.

- *Equal*: as in [design.md](design.md), at batch and length {sizes}, the last row padded in
  its last third where the model takes a mask; sizes that the model itself refuses are left out, and inputs without a
  length vary in batch only.
- *Attentions*: found / present. Present is counted without the compiler, while the eager model runs: attention kernels
  of torch, and softmaxes over the last axis between two products of computed tensors.
- *Mask read*: yes where the mask of every attention is read as an expression over batch, head, query and key, which is
  worth what the graph computes at every index, at (2, 12) and (3, 17). *Tensor*: read, but no argument of the operator
  says it (a mask that depends on the user's values for query and key, blocks, a mask added to a mask), so it stays one.
- *Inputs*: what the model was given. Models of several parts get the fewest inputs that they run on, which may leave a
  part out; the parts are mostly families of their own.
"""


def as_markdown(outcomes: Iterable[Outcome]) -> str:
    """The whole document."""
    by_stage: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in sorted(outcomes, key=lambda item: item.family):
        by_stage[_group(outcome)].append(outcome)
    compiled = by_stage["compiled"]
    introduction = _INTRODUCTION.format(
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime")),
        known=len(survey_models.families()),
        total=sum(map(len, by_stage.values())),
        compiled=len(compiled),
        attending=sum(item.present > 0 for item in compiled),
        refused=len(by_stage["export"]),
        ours=len(by_stage["ours"]),
        wrong=len(by_stage["wrong"]),
        missing=len(by_stage["missing"]),
        sizes=", ".join(map(str, SIZES)),
    )
    parts = [introduction, "## Compiled\n", _totals(compiled), _table(_HEADER, map(_cells, compiled))]
    for group, title in _FAILURES.items():
        if by_stage[group]:
            rows = ([item.family, item.model, _escaped(item.reason)] for item in by_stage[group])
            parts += [f"## {title}\n", _table(("family", "model", "reason"), rows)]
    return "\n".join(parts)


_FAILURES = {
    "wrong": "Wrong result",
    "ours": "Refused by fxpress",
    "export": "Refused by torch.export",
    "missing": "Not tried: no tiny model, or no inputs for it",
}


def _group(outcome: Outcome) -> str:
    if outcome.stage in ("model", "inputs"):
        return "missing"
    if outcome.stage == "trace":
        return "export" if outcome.reason.startswith("cannot trace") else "ours"
    return {"ok": "compiled", "equal": "wrong"}.get(outcome.stage, "ours")


def _totals(compiled: Sequence[Outcome]) -> str:
    attending = [item for item in compiled if item.present]
    complete = sum(item.found >= item.present for item in attending)
    masks = Counter(re.split("[:;]", _mask_read(item))[0] for item in attending if item.found)
    return (
        f"Of {sum(item.present for item in attending)} attentions in {len(attending)} families, "
        f"{sum(min(item.found, item.present) for item in attending)} are found; {complete} families have all of theirs "
        f"found. Masks read: {', '.join(f'{key} {count}' for key, count in sorted(masks.items()))}.\n"
    )


_HEADER = ("family", "model", "inputs", "equal at", "worst error", "attentions", "mask read", "fused", "notes")


def _cells(outcome: Outcome) -> list[str]:
    fused = ", ".join(f"{count} {rule}" for rule, count in sorted((outcome.fused or {}).items()))
    everywhere = [tuple(size) for size in outcome.sizes] == list(SIZES)
    notes = [*outcome.refused, *outcome.misses]
    return [
        outcome.family,
        outcome.model,
        ", ".join(outcome.inputs),
        "all" if everywhere else ", ".join(f"({batch}, {length})" for batch, length in outcome.sizes),
        decibels(outcome.sqnr_db),
        f"{outcome.found}/{outcome.present}",
        _mask_read(outcome) if outcome.found else "-",
        fused,
        _escaped("; ".join(notes)),
    ]


def _mask_read(outcome: Outcome) -> str:
    if outcome.unread:
        return f"no: {_escaped('; '.join(outcome.unread))}"
    return f"yes; tensor: {_escaped('; '.join(outcome.tensors))}" if outcome.tensors else "yes"


def _escaped(text: str) -> str:
    """Text for a cell: one line, without the bars that separate cells."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")[:300]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the document; it appears whole.

    Raises:
        InputError: if the folder does not exist.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(as_markdown(outcomes), encoding="utf-8")
    os.replace(temporary, path)
