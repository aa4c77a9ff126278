"""The pass pipeline: which passes run, the checks around each, and what each one did."""

from __future__ import annotations

import ast
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import passes as pass_folder
from ..ir.equality import compare, sqnr_db
from ..ir.errors import FxpressError, InputError, RewriteError, VerifyError, nearest
from ..ir.graph import Program
from ..ir.rewrite import Context, Pass
from ..ir.verify import verify
from .report import PassReport

PASSES: dict[str, type[Pass]] = {
    kind.pass_name(): kind for kind in (getattr(pass_folder, name) for name in pass_folder.__all__)
}


def parse_passes(given: Any) -> list[Pass]:
    """The pass list that a user means, canonical spelling first.

    `None` is exact optimisation only; a list of Pass objects and texts, or one text such as `"fuse"` or
    `"quantize(int8, skip=['head']), fuse"`, is itself.

    Raises:
        InputError: an unknown pass or option, with the nearest valid name.
    """
    if given is None:
        given = "fuse"
    if isinstance(given, str | Pass):
        given = [given]
    if not isinstance(given, Sequence):
        raise InputError(f"passes must be a list of passes or a text, found a {type(given).__name__}")
    found: list[Pass] = []
    for item in given:
        if isinstance(item, Pass):
            found.append(item)
        elif isinstance(item, str):
            found += _parse_text(item)
        else:
            hint = f"write {item.__name__}()" if isinstance(item, type) else "see fxpress.passes"
            raise InputError(f"{item!r} is no pass; {hint}")
    if found and not isinstance(found[0], PASSES["canonicalize"]):
        found.insert(0, PASSES["canonicalize"]())
    return found


def _parse_text(text: str) -> list[Pass]:
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"cannot read the passes {text[:80]!r}; write them as 'name(option=value), name'") from error
    if not isinstance(tree, ast.List):
        raise InputError(f"cannot read the passes {text[:80]!r}; write them as 'name(option=value), name'")
    return [_parse_one(item, text) for item in tree.elts]


def check_name(name: str) -> None:
    """Refuse a name that no pass has.

    Raises:
        InputError: with the nearest valid name.
    """
    if name not in PASSES:
        raise InputError(f"unknown pass {name!r}: {nearest(name, PASSES)}")


def _parse_one(item: ast.expr, text: str) -> Pass:
    call = item if isinstance(item, ast.Call) else ast.Call(item, [], [])
    if not isinstance(call.func, ast.Name):
        raise InputError(f"cannot read the passes {text!r}; write them as 'name(option=value), name'")
    name = call.func.id
    check_name(name)
    kind = PASSES[name]
    options = [entry.name for entry in dataclasses.fields(kind)]
    if len(call.args) > len(options):
        raise InputError(f"pass {name!r} takes {len(options)} options, found {len(call.args)} in {text!r}")
    values = {option: _literal(value, text) for option, value in zip(options, call.args, strict=False)}
    for keyword in call.keywords:
        if keyword.arg not in options:
            raise InputError(f"unknown option {keyword.arg!r} of pass {name!r}: {nearest(str(keyword.arg), options)}")
        values[keyword.arg] = _literal(keyword.value, text)
    return kind(**values)


def _literal(value: ast.expr, text: str) -> Any:
    """A literal; a bare word is a text."""
    if isinstance(value, ast.Name):
        return value.id
    try:
        return ast.literal_eval(value)
    except ValueError as error:
        raise InputError(f"an option in {text!r} is no literal value") from error


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    expected: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> list[PassReport]:
    """Run passes on a program in place, verified before and after each.

    Args:
        context: with the example inputs on which the error of each pass is measured.
        expected: the model's outputs on them, and those in fp64; None: errors are not measured.

    Raises:
        RewriteError, VerifyError: name the pass and those before it; VerifyError also when a pass that is exact
            changed the result (`max_rewrites` finds the rewrite).
    """
    reports: list[PassReport] = []
    verify(program)
    before = _run(program, context.inputs) if expected else None
    for index, rewrite in enumerate(passes):
        start = time.perf_counter()
        try:
            result = rewrite.apply(program, context)
            verify(program)
            after = _run(program, context.inputs) if expected else None
        except (FxpressError, RuntimeError) as error:
            kind = type(error) if isinstance(error, FxpressError) else RewriteError
            raise kind(f"{_place(passes, index)}: {error}") from error
        seconds = time.perf_counter() - start
        if expected and after is not None and rewrite.exact and all(item.exact for item in passes[:index]):
            verdict = compare(after, *expected, program.signature.outputs)
            if not verdict.equal:
                raise VerifyError(
                    f"{_place(passes, index)}: the result changed: {verdict.reasons[0]}; "
                    f"find the rewrite by lowering max_rewrites from {context.rewrites}"
                )
        reports.append(
            PassReport(
                name=str(rewrite),
                changes=result.changes,
                rewrites=dict(result.rewrites),
                refusals=[{"rule": item.rule, "node": item.node, "reason": item.reason} for item in result.refusals],
                matches=[dataclasses.asdict(item) for item in result.matches],
                seconds=seconds,
                sqnr_db=_introduced(after, before),
            )
        )
        before = after
    return reports


def _place(passes: Sequence[Pass], index: int) -> str:
    earlier = f" (after {', '.join(map(str, passes[:index]))})" if index else ""
    return f"pass {passes[index]}{earlier}"


def _run(program: Program, inputs: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return list(program.run(inputs))


def _introduced(after: Sequence[Any] | None, before: Sequence[Any] | None) -> float | None:
    if after is None or before is None:
        return None
    pairs = [(a, b) for a, b in zip(after, before, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    return min((sqnr_db(a, b) for a, b in pairs), default=None)
