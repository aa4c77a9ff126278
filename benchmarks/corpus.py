"""Real text: docstrings and sources of functions of Python's standard library, read with ast and never imported.

A pair is what a function's docstring says and the function's source without it. What there is depends on the Python
that runs this; from there on everything is fixed: modules and functions in the order of their names and lines,
duplicates removed, and a seeded split. No text is in more than one part.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CALIBRATION, EVALUATION = 64, 300  # texts; pairs
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class Pair:
    """A function's docstring and its source without it."""

    docstring: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """The parts: texts to calibrate on, pairs to evaluate on, texts of no other part."""

    calibration: list[str]
    evaluation: list[Pair]
    rest: list[str]


@cache
def read_corpus() -> Corpus:
    """The corpus of this Python."""
    pairs = list(unique_pairs())
    if len(pairs) < 2 * (CALIBRATION + EVALUATION):
        raise SystemExit(f"the standard library's sources are needed; only {len(pairs)} functions were found")
    random.Random(0).shuffle(pairs)
    rest = pairs[EVALUATION:]
    # Docstrings and sources in turn: short and long, sentences and code, as the pairs are.
    chosen = [pair.docstring if index % 2 else pair.source for index, pair in enumerate(rest[:CALIBRATION])]
    others = [text for pair in rest[CALIBRATION:] for text in (pair.docstring, pair.source)]
    return Corpus(chosen, pairs[:EVALUATION], others)


def unique_pairs() -> Iterator[Pair]:
    """Pairs in the order of files and lines; only the first with its docstring or its source."""
    seen: set[str] = set()
    for file in library_files():
        for pair in pairs_of(file.read_text(encoding="utf-8", errors="replace")):
            if seen.isdisjoint((pair.docstring, pair.source)):
                seen |= {pair.docstring, pair.source}
                yield pair


def library_files() -> list[Path]:
    """The standard library's Python files, tests and programs left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sys.stdlib_module_names - LEFT_OUT
    found = [file for name in modules for file in (root / f"{name}.py", *(root / name).rglob("*.py"))]
    return sorted(file for file in found if file.is_file() and LEFT_OUT.isdisjoint(file.relative_to(root).parts))


def pairs_of(text: str) -> Iterator[Pair]:
    """The functions of a file whose docstring is more than a word or two and whose body is more than a line or two."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a file that shows one
        return
    lines = text.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(functions, key=lambda node: node.lineno):
        docstring = ast.get_docstring(node) or ""
        first = node.body[0]
        assert first.end_lineno is not None and node.end_lineno is not None
        head, body = lines[node.lineno - 1 : first.lineno - 1], lines[first.end_lineno : node.end_lineno]
        if len(docstring.split()) >= 6 and head and sum(bool(line.strip()) for line in body) >= 3:
            yield Pair(docstring, "\n".join([*head, *body]))
