"""Patterns over graphs: what to find, why a near miss was none, and rules that replace what was found.

A pattern is a tree written from the result towards the inputs, with arguments by schema name:

    Call(aten.layer_norm.default,
         input=Call(aten.add.Tensor, commutative=True, self=Any("x"), other=Any("residual")),
         normalized_shape=Any("shape"), weight=Weight("weight"), bias=Weight("bias"), eps=Any("eps"))

An argument that the pattern does not mention must have its schema's default, so that no option of an operator is
ever ignored. A node inside the match that something else reads is refused unless it is marked `shared`.
A mismatch is a near miss, and reported, once the node marked `anchor` has matched, or the root where none is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any as Object

import torch
from torch import fx

from .graph import Program, arguments, source_of


@dataclass(frozen=True)
class Any:
    """Anything: a node, a literal, None. Captured under `name`; the same name twice must be the same thing."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A weight or constant of the program (a `get_attr` node), captured under `name`."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A Python literal (number, flag, text, list of them), captured under `name`; never a node."""

    name: str


class Call:
    """A call of one of `targets`, whose named arguments match.

    Args:
        targets: one operator, or a tuple of interchangeable ones.
        name: capture the node itself under this name.
        commutative: the first two arguments given may be swapped.
        shared: the node may be read from outside the match (it then stays, unless the rule replaces it).
        anchor: the operation that tells this pattern from any other: a mismatch before it is no near miss.
        arguments: patterns or literals by schema name.
    """

    def __init__(
        self,
        targets: Object,
        /,
        *,
        name: str | None = None,
        commutative: bool = False,
        shared: bool = False,
        anchor: bool = False,
        **arguments: Object,
    ) -> None:
        self.targets: tuple[Object, ...] = targets if isinstance(targets, tuple) else (targets,)
        self.name, self.commutative, self.shared, self.anchor = name, commutative, shared, anchor
        self.arguments = arguments

    def variants(self) -> Iterator[dict[str, Object]]:
        """The arguments, and the same with the first two swapped where they commute."""
        yield self.arguments
        if self.commutative:
            (first, a), (second, b), *rest = self.arguments.items()
            yield {first: b, second: a, **dict(rest)}


class OneOf:
    """The first of several patterns that matches."""

    def __init__(self, *patterns: Object) -> None:
        self.patterns = patterns


def optional(wrap: Callable[[Object], Call], inner: Object) -> OneOf:
    """`wrap(inner)` or just `inner`: a node that may be there."""
    return OneOf(wrap(inner), inner)


@dataclass(frozen=True)
class Match:
    """A pattern found: `nodes` are the calls it covers, `root` the one whose value it computes."""

    root: fx.Node
    captures: Mapping[str, Object]
    nodes: frozenset[fx.Node]

    def __getitem__(self, name: str) -> Object:
        return self.captures[name]

    def get(self, name: str, default: Object = None) -> Object:
        """A capture that only some alternatives make."""
        return self.captures.get(name, default)


@dataclass(frozen=True)
class Refusal:
    """Why a rule did not rewrite at a node."""

    reason: str
    rule: str = ""
    node: str = ""


@dataclass(frozen=True)
class _State:
    captures: Mapping[str, Object] = field(default_factory=dict)
    nodes: frozenset[fx.Node] = frozenset()
    shared: frozenset[fx.Node] = frozenset()
    anchored: bool = False

    def capture(self, name: str, value: Object) -> _State | None:
        if name in self.captures:
            known = self.captures[name]
            same = known is value or (
                not isinstance(known, fx.Node) and type(known) is type(value) and bool(known == value)
            )
            return self if same else None
        return replace(self, captures={**self.captures, name: value})


@dataclass
class _Trace:
    """The nearest miss: the mismatch past the anchor, or that reached after the most matched nodes."""

    reached: tuple[bool, int] = (False, 0)
    reason: str = ""

    def note(self, state: _State, reason: str) -> None:
        reached = (state.anchored, len(state.nodes))
        if reached > self.reached:
            self.reached, self.reason = reached, reason


Finder = Callable[[fx.Node], "Match | Refusal | None"]
"""A pattern as a function, for what is easier to follow through the graph than to draw; answers as `match` does."""
Pattern = Call | OneOf | Finder


def match(pattern: Pattern, root: fx.Node) -> Match | Refusal | None:
    """Match a pattern at a node.

    Returns:
        the Match; a Refusal when the root and the anchor fitted but something else did not (a near miss, with the
        reason); None when this is another operation.
    """
    found = search(pattern, lambda _: True, root)
    return found[0] if isinstance(found, tuple) else found


def search(
    pattern: Pattern, condition: Callable[[Match], Object], root: fx.Node
) -> tuple[Match, Object] | Refusal | None:
    """The first way to match a pattern that the condition does not refuse, with the condition's result.

    Returns:
        as `match`; the reason is the condition's own where the pattern matched.
    """
    if not isinstance(pattern, Call | OneOf):
        found = pattern(root)
        if not isinstance(found, Match):
            return found
        outcome = condition(found)
        return outcome if isinstance(outcome, Refusal) else (found, outcome)
    trace = _Trace()
    refused: Refusal | None = None
    for state in _matches(pattern, root, _State(), trace):
        leaked = leak(state.nodes, root, state.shared)
        if leaked is not None:
            trace.note(state, leaked)
            continue
        matched = Match(root, state.captures, state.nodes)
        outcome = condition(matched)
        if not isinstance(outcome, Refusal):
            return matched, outcome
        refused = refused or outcome
    if refused is not None:
        return refused
    anchored, depth = trace.reached
    return Refusal(trace.reason) if depth > 0 and (anchored or not _has_anchor(pattern)) else None


def _has_anchor(pattern: Object) -> bool:
    if isinstance(pattern, OneOf):
        return any(map(_has_anchor, pattern.patterns))
    return isinstance(pattern, Call) and (pattern.anchor or any(map(_has_anchor, pattern.arguments.values())))


def leak(nodes: frozenset[fx.Node], root: fx.Node, shared: frozenset[fx.Node] = frozenset()) -> str | None:
    """Why matched nodes cannot go: something outside of the match reads one; None where nothing does."""
    for node in nodes - {root} - shared:
        for user in node.users:
            if user not in nodes:
                reader = "returned by the model" if user.op == "output" else f"also read by {user.name}"
                return f"{node.name} is {reader}{source_of(node)}"
    return None


def _matches(pattern: Object, value: Object, state: _State, trace: _Trace) -> Iterator[_State]:
    if isinstance(pattern, OneOf):
        for alternative in pattern.patterns:
            yield from _matches(alternative, value, state, trace)
    elif isinstance(pattern, Call):
        yield from _matches_call(pattern, value, state, trace)
    elif isinstance(pattern, Any | Weight | Literal):
        is_weight = isinstance(value, fx.Node) and value.op == "get_attr"
        if isinstance(pattern, Weight) and not is_weight:
            trace.note(state, f"{pattern.name} must be a weight, found {spell(value)}")
        elif isinstance(pattern, Literal) and isinstance(value, fx.Node):
            trace.note(state, f"{pattern.name} must be a literal, found {spell(value)}")
        elif (captured := state.capture(pattern.name, value)) is not None:
            yield captured
        else:
            trace.note(state, f"{pattern.name} must be {spell(state.captures[pattern.name])}, found {spell(value)}")
    elif isinstance(value, fx.Node) or type(value) is not type(pattern) or value != pattern:
        trace.note(state, f"expected {pattern!r}, found {spell(value)}")
    else:
        yield state


def _matches_call(pattern: Call, value: Object, state: _State, trace: _Trace) -> Iterator[_State]:
    wanted = " or ".join(_target_name(target) for target in pattern.targets)
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in pattern.targets:
        trace.note(state, f"expected {wanted}, found {spell(value)}")
        return
    given = arguments(value)
    entered: _State | None = replace(
        state,
        nodes=state.nodes | {value},
        shared=state.shared | {value} if pattern.shared else state.shared,
        anchored=state.anchored or pattern.anchor,
    )
    if pattern.name is not None and entered is not None:
        entered = entered.capture(pattern.name, value)
    if entered is None:
        trace.note(state, f"{pattern.name} must be one node, found another: {spell(value)}")
        return
    default = _defaults(value)
    for name, found in given.items():
        if name not in pattern.arguments and not (
            found is default.get(name) or (not isinstance(found, fx.Node) and found == default.get(name))
        ):
            trace.note(entered, f"{value.name} has {name}={spell(found)}, expected {default.get(name)!r}")
            return
    for variant in pattern.variants():
        yield from _matches_arguments(list(variant.items()), given, entered, trace)


def _matches_arguments(
    wanted: list[tuple[str, Object]], given: Mapping[str, Object], state: _State, trace: _Trace
) -> Iterator[_State]:
    if not wanted:
        yield state
        return
    (name, pattern), rest = wanted[0], wanted[1:]
    for matched in _matches(pattern, given.get(name), state, trace):
        yield from _matches_arguments(rest, given, matched, trace)


def _defaults(node: fx.Node) -> dict[str, Object]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    return {argument.name: argument.default_value for argument in node.target._schema.arguments}


def _target_name(target: Object) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def spell(value: Object) -> str:
    """A value for a reason: a node's name and operator, or the literal."""
    if isinstance(value, fx.Node):
        kind = _target_name(value.target) if value.op == "call_function" else value.op
        return f"{value.name} ({kind})" if kind != value.name else value.name
    return repr(value)


@dataclass(frozen=True)
class Rule:
    """match -> condition -> replace.

    `condition(match)` gives what `replace` needs, or a Refusal; `replace(program, match, result)` edits the program.
    Nothing is kept on the rule between the two. Where a pattern matches in several ways, a refused one is not the last.
    """

    name: str
    pattern: Pattern
    condition: Callable[[Match], Object]
    replace: Callable[[Program, Match, Object], None]
