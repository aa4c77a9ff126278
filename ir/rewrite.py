"""What passes share: the Pass protocol, its result and context, and the loop that applies rules."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from .calibration.statistics import Open, refused
from .graph import Program, module_path, source_of
from .pattern import Match, Refusal, Rule, search

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Gives the items of a sequence one by one, and shows how far their work is under a title."""


def untracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Shows nothing."""
    return items


@dataclass
class Context:
    """What a pass may use besides the program.

    `inputs` are flat example tensors, `calibration` such tensors by batch; `track(items, title)` gives the items and
    shows how far their work is; `statistics` opens what calibration found before; `seconds(program)` is the time that a
    program takes at the example's sizes on the backend that the product is for, None where that cannot be measured;
    `elsewhere` are names of layers that the model may have beside the program, None where they are not known;
    `max_rewrites` is a budget over the whole pipeline (None: no limit) that is used up one rewrite at a time, so that
    bisecting it finds the rewrite that breaks a model.
    """

    inputs: Sequence[Tensor] = ()
    calibration: Sequence[Sequence[Tensor]] = ()
    max_rewrites: int | None = None
    rewrites: int = 0
    track: Track = untracked
    statistics: Open = refused
    seconds: Callable[[Program], float] | None = None
    elsewhere: Sequence[str] | None = ()

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left of the budget."""
        return self.max_rewrites is not None and self.rewrites >= self.max_rewrites

    def take(self) -> bool:
        """Use one rewrite of the budget; False if none is left."""
        if self.is_spent:
            return False
        self.rewrites += 1
        return True


@dataclass(frozen=True)
class Applied:
    """A rule that rewrote at a node: where that is in the user's code, or what was found there."""

    rule: str
    node: str
    detail: str


@dataclass(frozen=True)
class Sparsity:
    """What pruning left of a layer's weight: `zeros` of `numbers` are zero or cut.

    `sqnr_db` is of the layer's output on calibration data, by the same inputs; where heads or neurons were fitted, of
    what to; None: there was none.
    """

    layer: str
    numbers: int
    zeros: int
    sqnr_db: float | None = None


@dataclass
class PassResult:
    """What a pass did: rewrites by rule, where rules matched, where they refused and why, which weights it thinned."""

    rewrites: Counter[str] = field(default_factory=Counter)
    matches: list[Applied] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    sparsity: list[Sparsity] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """All rewrites."""
        return sum(self.rewrites.values())


@dataclass(frozen=True)
class Pass:
    """A rewrite of a program. Options are the fields of the subclass, a frozen dataclass in a file of its own.

    `exact`: the result equals the model (DESIGN: equal); a lossy pass sets it to False and its loss is reported.
    `keeps_padding`: at tokens that are padding, too.
    """

    exact: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True
    more_options: ClassVar[bool] = False  # whether it takes options that are not fields, and checks them itself

    @property
    def needs_calibration(self) -> str | None:
        """What calibration data is needed for; None: for nothing."""
        return None

    @classmethod
    def pass_name(cls) -> str:
        """The name on the command line: the pass's file name."""
        return cls.__module__.rpartition(".")[2]

    def apply(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program in place."""
        raise NotImplementedError

    def __str__(self) -> str:
        given = [
            f"{entry.name}={getattr(self, entry.name)!r}"
            for entry in dataclasses.fields(self)
            if getattr(self, entry.name) != entry.default
        ]
        return f"{self.pass_name()}({', '.join(given)})" if given else self.pass_name()


def apply_rules(program: Program, rules: Sequence[Rule], context: Context) -> PassResult:
    """Try every rule at every node, from the inputs on, until the graph's end; near misses become refusals."""
    result = PassResult()
    for node in list(program.graph.nodes):
        refusals: list[Refusal] = []
        for rule in rules:
            if node.op != "call_function" or node._erased:
                break
            found = search(rule.pattern, rule.condition, node)
            if isinstance(found, Refusal):
                refusals.append(Refusal(found.reason, rule.name, node.name))
            elif found is not None:
                if not context.take():
                    return result
                result.matches.append(Applied(rule.name, node.name, f"{module_path(node)}{source_of(node)}".strip()))
                rule.replace(program, *found)
                _erase_unread(program, found[0])
                result.rewrites[rule.name] += 1
                refusals.clear()  # that another rule did not fit here is of no interest
                break
        result.refusals += refusals
    return result


def _erase_unread(program: Program, found: Match) -> None:
    """Erase the calls of a rewritten match that nothing reads any more, so that no rule meets their remains."""
    waiting = list(found.nodes)
    while waiting:
        node = waiting.pop()
        if not node._erased and not node.users:
            waiting += [used for used in node.all_input_nodes if used in found.nodes]
            program.graph.erase_node(node)


def each_call(program: Program) -> Iterable[fx.Node]:
    """The calls of a program, skipping those erased while iterating."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and not node._erased:
            yield node


Edit = Callable[[Program, fx.Node], fx.Node | None]
"""A local simplification: the node (or other value) that a call can be replaced by, or None."""
