"""Linear layers: Hugging Face's Conv1D."""

from __future__ import annotations

from typing import Any

import torch

from .. import pattern as p
from ..graph import Program, same_sizes, shape
from ..pattern import Match, Refusal, Rule

aten = torch.ops.aten


def _conv1d_condition(found: Match) -> Any:
    weight = found["weight"]
    if not same_sizes(shape(found.root)[-1:], shape(weight)[1:]):
        return Refusal("the result's last axis is not that of the weight")
    if not same_sizes(shape(found["bias"]), shape(weight)[1:]):
        return Refusal(f"a bias of shape {list(shape(found['bias']))} is none of a linear layer")
    if len(weight.users) > 1:
        return Refusal(f"weight {weight.target} is read by {len(weight.users)} nodes; a transposed copy would untie it")
    return True


def _conv1d_replace(program: Program, found: Match, _: Any) -> None:
    """Give the rows the leading axes of the result before the matmul, not after it."""
    stored = program.tensor(found["weight"])
    weight = program.add_weight(
        f"{found['weight'].target}_transposed", stored.detach().T.contiguous(), trainable=stored.requires_grad
    )
    sizes = [*found["sizes"][:-1], shape(weight)[1]]
    rows = program.call(aten.reshape.default, found["rows"], sizes, before=found.root)
    new = program.call(aten.linear.default, rows, weight, found["bias"], before=found.root)
    program.replace(found.root, new)


RULES = (
    Rule(
        "conv1d",
        p.Call(
            aten.reshape.default,
            self=p.Call(
                aten.addmm.default, anchor=True, self=p.Weight("bias"), mat1=p.Any("rows"), mat2=p.Weight("weight")
            ),
            shape=p.Any("sizes"),
        ),
        _conv1d_condition,
        _conv1d_replace,
    ),
)
