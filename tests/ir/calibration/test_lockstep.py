"""Running a program on several batches node by node: values, padding, memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from tiny import encoder, inputs
from torch import Tensor, fx, nn

from fxpress.compiler.trace import trace
from fxpress.ir.calibration.lockstep import Lockstep
from fxpress.ir.graph import Program
from fxpress.ir.rewrite import Context
from fxpress.passes import Canonicalize

aten = torch.ops.aten
BATCHES = [[normal(2, 8)], [normal(5, 8, seed=1)], [normal(1, 8, seed=2)]]


def chain() -> Program:
    return program(lambda m, x: F.linear(x, m.w).relu().exp(), normal(2, 8), w=normal(4, 8))


def nothing(node: fx.Node) -> None:
    return None


def test_outputs_are_those_of_the_program_by_batch() -> None:
    traced = chain()
    found = Lockstep(traced, BATCHES).run(nothing)
    for batch, outputs in zip(BATCHES, found, strict=True):
        assert torch.equal(outputs[0], traced.run(batch)[0])


def test_without_memory_the_outputs_are_the_same() -> None:
    traced = program(lambda m, x: (F.linear(x, m.w).t().relu() + 1).exp(), normal(64, 80), w=normal(48, 80))
    batches = [[normal(64, 80, seed=seed)] for seed in range(3)]
    held: list[str | None] = []
    lockstep = Lockstep(traced, batches, memory=0)

    def visit(node: fx.Node) -> None:
        if node.target is aten.exp.default:
            held.extend(value.untyped_storage().filename for value in lockstep.values(node.args[0]))  # type: ignore[arg-type]

    for batch, outputs in zip(batches, lockstep.run(visit), strict=True):
        assert torch.equal(outputs[0], traced.run(batch)[0])
    assert len(held) == 3 and None not in held


def test_every_call_is_visited_in_order_once_for_all_batches() -> None:
    seen: list[str] = []
    Lockstep(chain(), BATCHES).run(lambda node: seen.append(node.name))
    assert seen == ["linear", "relu", "exp"]


def test_what_a_visit_gives_takes_the_place_of_the_call() -> None:
    def visit(node: fx.Node) -> list[Any] | None:
        return [torch.zeros(1, 4)] * 3 if node.target is aten.linear.default else None

    assert [outputs[0].tolist() for outputs in Lockstep(chain(), BATCHES).run(visit)] == [[[1.0] * 4]] * 3


def test_a_visit_reads_what_was_computed_before() -> None:
    lockstep, read = Lockstep(chain(), BATCHES), []

    def visit(node: fx.Node) -> None:
        if node.target is aten.exp.default:
            read.extend(value.min() for value in lockstep.values(node.args[0]))  # type: ignore[arg-type]

    lockstep.run(visit)
    assert len(read) == 3 and min(read) == 0


def test_values_are_freed_behind_their_last_reader() -> None:
    """The relu's are alive while exp is computed, and the linear's, which only the relu reads, are not."""
    lockstep = Lockstep(chain(), BATCHES)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def visit(node: fx.Node) -> None:
        if node.target is aten.relu.default:
            kept.extend(weakref.ref(value) for value in lockstep.values(node.args[0]))  # type: ignore[arg-type]
        if node.target is aten.exp.default:
            gc.collect()
            alive.extend(value() is not None for value in kept)

    lockstep.run(visit)
    assert alive == [False] * 3
    with pytest.raises(KeyError):
        lockstep.values(next(iter(lockstep.program.calls(aten.relu.default))))


def test_no_gradient_is_recorded() -> None:
    assert not Lockstep(chain(), BATCHES).run(nothing)[0][0].requires_grad


def test_inputs_and_weights_are_not_changed() -> None:
    traced, before = chain(), [batch[0].clone() for batch in BATCHES]
    weight = traced.module.w.clone()
    Lockstep(traced, BATCHES).run(nothing)
    assert all(torch.equal(batch[0], copy) for batch, copy in zip(BATCHES, before, strict=True))
    assert torch.equal(traced.module.w, weight)


# --- padding ---------------------------------------------------------------------------------------------------


def attended() -> Program:
    traced = program(encoder(), *inputs().values())
    Canonicalize().apply(traced, Context())
    return traced


def rows_of_first_linear(traced: Program, batches: list[list[Tensor]]) -> list[Tensor]:
    lockstep, found = Lockstep(traced, batches), []

    def visit(node: fx.Node) -> None:
        if node.target is aten.linear.default and not found:
            found.extend(lockstep.rows(node.args[0]))  # type: ignore[arg-type]

    lockstep.run(visit)
    return found


def test_rows_leave_out_what_attention_masks_as_padding() -> None:
    traced = attended()
    batches = [list(inputs(2, 6).values()), list(inputs(3, 9).values())]
    found = rows_of_first_linear(traced, batches)
    assert [len(rows) for rows in found] == [12 - 2, 27 - 3]
    table = traced.module.embed.weight
    for rows, (ids, mask) in zip(found, batches, strict=True):
        assert torch.equal(rows, table[ids[mask]])


def test_rows_without_a_mask_are_all() -> None:
    traced = chain()
    lockstep = Lockstep(traced, BATCHES)
    assert len(lockstep.unpadded(first_output(traced), normal(2, 3, 4), 0)) == 6


def first_output(traced: Program) -> fx.Node:
    return outputs_of(traced)[0]


def outputs_of(traced: Program) -> Any:
    return next(node for node in traced.graph.nodes if node.op == "output").args[0]


def test_a_value_that_has_no_tokens_has_no_padding() -> None:
    traced = attended()
    lockstep = Lockstep(traced, [list(inputs(2, 6).values())])
    assert len(lockstep.unpadded(first_output(traced), normal(2, 6, 4), 0)) == 10
    assert len(lockstep.unpadded(first_output(traced), normal(2, 6), 0)) == 2


class Crossed(nn.Module):
    """A decoder's tokens that attend to those of a source, with its padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.memory, self.out = nn.Embedding(50, 16), nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, source: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.memory(source), self.words(target)
        query, key = (item.unflatten(-1, (2, 8)).transpose(1, 2) for item in (y, x))
        found = F.scaled_dot_product_attention(query, key, key, attn_mask=mask[:, None, None, :])
        return self.out(y + found.transpose(1, 2).flatten(2)), x


@pytest.mark.parametrize("shapes", ["auto", None], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("length", [5, 6])
def test_a_sources_mask_is_not_one_of_the_decoders_tokens(length: int, shapes: str | None) -> None:
    """Not even where there are as many of them."""
    source, mask = inputs(2, 6).values()
    target = inputs(2, length)["ids"]
    model, example = Crossed().eval(), inputs(2, length if shapes is None else 5)["ids"]
    traced = trace(model, ((), {"source": source, "mask": mask, "target": example}), shapes)
    Canonicalize().apply(traced, Context())
    lockstep = Lockstep(traced, [[source, mask, target]])
    (written, read) = lockstep.run(nothing)[0]
    nodes = outputs_of(traced)
    assert len(lockstep.unpadded(nodes[0], written, 0)) == 2 * length
    assert len(lockstep.unpadded(nodes[1], read, 0)) == 12 - 2


def test_a_batch_of_nothing_but_padding_has_no_rows() -> None:
    ids, mask = inputs(2, 6).values()
    assert [len(rows) for rows in rows_of_first_linear(attended(), [[ids, torch.zeros_like(mask)]])] == [0]
