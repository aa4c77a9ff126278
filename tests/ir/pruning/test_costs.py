"""Multiplications of a head and of a neuron."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor

from fxpress.ir.graph import Program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.costs import unit_macs
from fxpress.ir.pruning.units import families

BATCH, LENGTH, HEADS, GROUPS, SIZE, INNER = 2, 5, 4, 2, 3, 16
WIDTH = HEADS * SIZE
X = normal(BATCH, LENGTH, WIDTH)
TOKENS = BATCH * LENGTH


def costs(traced: Program) -> list[float]:
    channels = follow(traced)
    return [unit_macs(traced, channels, family) for family in families(channels)[0]]


def attend(m: Any, x: Tensor) -> Tensor:
    def split(weight: Tensor) -> Tensor:
        return F.linear(x, weight).view(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2)

    y = torch.ops.fxpress.attention(split(m.q), split(m.k), split(m.v))
    return F.linear(y.transpose(1, 2).reshape(x.shape), m.o)


def attention(groups: int) -> Program:
    few = normal(groups * SIZE, WIDTH)
    return program(attend, X, q=normal(WIDTH, WIDTH), k=few, v=few + 1, o=normal(WIDTH, WIDTH, seed=1))


def test_a_neuron_costs_a_row_and_a_column_for_each_token() -> None:
    weights = {"u": normal(INNER, WIDTH), "b": normal(INNER), "d": normal(3, INNER)}
    traced = program(lambda m, x: F.linear(F.relu(F.linear(x, m.u, m.b)), m.d), X, **weights)
    assert costs(traced) == [TOKENS * (WIDTH + 3)]


def test_a_neuron_of_a_gated_block_costs_two_rows() -> None:
    weights = {"g": normal(INNER, WIDTH), "u": normal(INNER, WIDTH, seed=1), "d": normal(3, INNER)}
    traced = program(lambda m, x: F.linear(F.silu(F.linear(x, m.g)) * F.linear(x, m.u), m.d), X, **weights)
    assert costs(traced) == [TOKENS * (2 * WIDTH + 3)]


def test_a_head_costs_its_part_of_four_projections_and_of_attention() -> None:
    projections = TOKENS * 4 * SIZE * WIDTH
    assert costs(attention(HEADS)) == [projections + BATCH * LENGTH * LENGTH * 2 * SIZE]


def test_a_group_of_heads_costs_all_its_queries_and_one_key_and_value() -> None:
    heads = HEADS // GROUPS
    projections = TOKENS * (2 * heads + 2) * SIZE * WIDTH
    assert costs(attention(GROUPS)) == [projections + BATCH * heads * LENGTH * LENGTH * 2 * SIZE]


def test_a_head_costs_no_keys_and_values_where_all_heads_share_them() -> None:
    projections = TOKENS * 2 * SIZE * WIDTH
    assert costs(attention(1)) == [projections + BATCH * LENGTH * LENGTH * 2 * SIZE]
