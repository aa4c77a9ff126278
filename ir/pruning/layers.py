"""Residual branches: x + f(x), what a layer adds to the stream that runs through a Transformer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.lockstep import Lockstep
from ..graph import Program, arguments, module_path, same_value, source_of
from ..pattern import spell
from ..rewrite import Track

aten = torch.ops.aten


@dataclass(frozen=True)
class Branch:
    """A sum of a stream and of what linear layers make of it.

    Attributes:
        total: the sum.
        stream: the operand that stays.
        fixed: why it cannot be dropped; None: it can.
    """

    total: fx.Node
    stream: fx.Node
    name: str
    fixed: str | None = None


@dataclass(frozen=True)
class Layer:
    """Branches that go together, in graph order."""

    name: str
    branches: tuple[Branch, ...]

    @property
    def fixed(self) -> str | None:
        """Why it cannot be dropped."""
        return next((branch.fixed for branch in self.branches if branch.fixed), None)


def branches(program: Program) -> list[Branch]:
    """The residual branches of a program, in graph order."""
    found: list[Branch] = []
    for node in program.calls(aten.add.Tensor):
        given = arguments(node)
        if given["alpha"] != 1 or not isinstance(given["other"], fx.Node):
            continue
        for stream, branch in ((given["self"], given["other"]), (given["other"], given["self"])):
            inside = _between(stream, branch) if same_value(stream.meta["val"], node.meta["val"]) else None
            earlier = {item.total: item.stream for item in found}
            start = stream
            while inside is None and start in earlier:  # beside an earlier branch: (x + f(x)) + g(x)
                start = earlier[start]
                inside = _between(start, branch)
            if inside is not None and any(item.target is aten.linear.default for item in inside):
                linear = next(item for item in inside if item.target is aten.linear.default)
                found.append(Branch(node, stream, module_path(linear) or node.name, _fixed(inside)))
                break
    return found


def grouped(found: Sequence[Branch]) -> list[Layer]:
    """Branches of one numbered module as one layer, `encoder.layer.0`; others by themselves."""
    groups: dict[str, list[Branch]] = {}
    for branch in found:
        numbered = re.match(r".*?(^|\.)\d+(?=\.|$)", branch.name)
        groups.setdefault(numbered[0] if numbered else branch.name, []).append(branch)
    return [Layer(name, tuple(members)) for name, members in groups.items()]


def drop(program: Program, layer: Layer) -> None:
    """Let what reads the sums read the streams; what only the branches need goes.

    before:  %h = aten.linear(%x, @w);  %y = aten.add(%x, %h)
    after:   %x in place of %y
    """
    for branch in layer.branches:
        program.replace(branch.total, _stream(branch))


def least(layers: Sequence[Layer], program: Program, batches: Sequence[Sequence[Tensor]], track: Track) -> Layer:
    """The layer that turns its input the least: 1 - cos(in, out) of its tokens is smallest (Men et al., 2024)."""
    starts = {layer.branches[0].total: layer for layer in layers}
    ends = {layer.branches[-1].total: layer for layer in layers}
    entered: dict[Layer, list[Tensor]] = {}
    turned: dict[Layer, float] = {}
    lockstep = Lockstep(program, batches, track, "measuring layers")

    def visit(node: fx.Node) -> None:
        if node in starts:
            entered[starts[node]] = lockstep.rows(_stream(starts[node].branches[0]))
        if node in ends:
            both = zip(*(lockstep.values(item) for item in _operands(node)), strict=True)
            after = torch.cat(
                [lockstep.unpadded(node, first + second, index) for index, (first, second) in enumerate(both)]
            )
            before = torch.cat(entered.pop(ends[node]))
            turned[ends[node]] = 1 - float(F.cosine_similarity(before.double(), after.double(), dim=-1).mean())

    lockstep.run(visit)
    return min(layers, key=lambda layer: turned[layer])


def _operands(total: fx.Node) -> tuple[fx.Node, fx.Node]:
    given = arguments(total)
    return given["self"], given["other"]


def _stream(branch: Branch) -> fx.Node:
    """The operand that stays, by whatever it was replaced since."""
    first, second = _operands(branch.total)
    if branch.stream in (first, second):
        return branch.stream
    return first if _between(first, second) is not None else second


def _between(stream: fx.Node, branch: fx.Node) -> list[fx.Node] | None:
    """The nodes on the ways from a stream to a branch, without the stream; None: the branch does not depend on it."""
    depends: dict[fx.Node, bool] = {stream: True}
    order: list[fx.Node] = []
    waiting = [branch]
    while waiting:
        node = waiting[-1]
        unknown = [used for used in node.all_input_nodes if used not in depends]
        if node in depends:
            waiting.pop()
        elif unknown:
            waiting += unknown
        else:
            depends[node] = any(depends[used] for used in node.all_input_nodes)
            if depends[node]:
                order.append(node)
            waiting.pop()
    return order if depends[branch] and branch is not stream else None


def _fixed(inside: Sequence[fx.Node]) -> str | None:
    for node in inside:
        if any(user.op == "output" for user in node.users):
            return f"{spell(node)} is an output of the model{source_of(node)}"
    return None
