"""Quantize: golden graphs, refusals, what must survive, training, and what calibration data brings."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import before_after, normal, program, reasons, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.ir.calibration.target import cosines
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.quantize import dequantize, dynamic_quantize, int8_linear, quantize
from fxpress.ir.quantization.fold import fold
from fxpress.ir.rewrite import Context
from fxpress.ir.verify import verify
from fxpress.passes import Canonicalize, Fuse, IntegerOnly, Quantize

aten = torch.ops.aten
X = (2, 5, 8)
PLAIN = {"method": "minmax", "sensitive": None}  # everything rounded to nearest, with calibration data or without
Batches = list[list[Tensor]]


def linear(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.b)


def weights(*sizes: int, **more: Tensor) -> dict[str, Tensor]:
    return {"w": normal(*sizes), "b": normal(sizes[0], seed=1), **more}


def calibrated(batches: Batches) -> Context:
    return Context(calibration=batches)


@functools.cache
def encoder(dtype: torch.dtype = torch.float32) -> Program:
    """One Transformer layer, canonical; not to be changed."""
    return rewritten(program(tiny.encoder().to(dtype), *tiny.inputs().values()), Canonicalize())[0]


TEXTS: Batches = [list(tiny.inputs(3, length).values()) for length in (6, 9, 7, 8)]


# --- golden graphs ---------------------------------------------------------------------------------------------


def projections(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x, m.q), F.linear(x, m.k, m.b), F.linear(x, m.v)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 8)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.words(ids)
        return found


IDS = torch.tensor([[0, 3, 9], [1, 1, 2]])
THREE = {name: normal(8, 8, seed=index) for index, name in enumerate("qkv")}
ONE: Callable[[], Program] = lambda: program(linear, normal(*X), **weights(4, 8))  # noqa: E731
CASES: dict[str, tuple[Callable[[], Program], Quantize, Batches]] = {
    "linear": (lambda: program(lambda m, x: F.linear(x, m.w), normal(*X), w=normal(4, 8)), Quantize(), []),
    "linear_bias": (ONE, Quantize(), []),
    "linear_tensor": (ONE, Quantize(granularity="tensor"), []),
    "linears_of_one_input": (lambda: program(projections, normal(*X), **THREE, b=normal(8)), Quantize(), []),
    "linear_behind_gelu": (
        lambda: program(lambda m, x: F.linear(F.gelu(x), m.w, m.b), normal(*X), **weights(4, 8)),
        Quantize(),
        [],
    ),
    "mlp": (
        lambda: program(
            lambda m, x: torch.ops.fxpress.mlp(x, m.w, m.b, m.d, None, "relu"),
            normal(*X),
            **weights(6, 8, d=normal(8, 6)),
        ),
        Quantize(),
        [],
    ),
    "embedding": (lambda: program(Lookup(), IDS), Quantize(), []),
    "not_folded": (ONE, Quantize(fold=False), []),
    "weights_only": (ONE, Quantize(activations=None), []),
    "int4": (ONE, Quantize(weights="int4"), []),
    "int4_of_int8": (ONE, Quantize(weights="int4", activations="int8"), []),
    "int4_of_int8_not_folded": (ONE, Quantize(weights="int4", activations="int8", symmetric=True, fold=False), []),
    "int4_not_folded": (ONE, Quantize(weights="int4", fold=False, symmetric=True), []),
    "static": (ONE, Quantize(mode="static", **PLAIN), [[normal(*X)]]),
    "static_symmetric": (ONE, Quantize(mode="static", symmetric=True, **PLAIN), [[normal(*X)]]),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case: str, golden: Callable[[str], None]) -> None:
    build, rewrite, batches = CASES[case]
    before = build()
    after, result = rewritten(before, rewrite, calibrated(batches))
    golden(before_after(before, after, result))


@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_close(case: str) -> None:
    build, rewrite, batches = CASES[case]
    before = build()
    after, _ = rewritten(before, rewrite, calibrated(batches))
    given = [IDS] if case == "embedding" else [normal(*X)]
    least = 15 if "int4" in case else 30
    assert min(sqnr_db(a, b) for a, b in zip(after.run(given), before.run(given), strict=True)) > least


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_computed_weight_stays_in_floats() -> None:
    after, result = rewritten(program(lambda m, x: F.linear(x, m.w * 2), normal(*X), w=normal(4, 8)), Quantize())
    assert result.changes == 0 and reasons(result) == ["mul is no weight"]
    assert len(after.calls(aten.linear.default)) == 1


def test_a_skipped_layer_stays_in_floats() -> None:
    after, result = rewritten(encoder(), Quantize(skip=["up"]))
    assert reasons(result) == ["up is to be skipped"]
    assert len(after.calls(aten.linear.default)) == 1 and len(after.calls(int8_linear)) == 5


def test_a_name_to_be_skipped_that_no_layer_has() -> None:
    with pytest.raises(InputError, match="no layer is named 'quary'; the nearest of 8: query, "):
        rewritten(encoder(), Quantize(skip=["quary"]))


@pytest.mark.parametrize("elsewhere", [["decoder.quary"], None])
def test_a_layer_to_be_skipped_may_be_in_another_program_of_the_model(elsewhere: list[str] | None) -> None:
    _, result = rewritten(encoder(), Quantize(skip=["quary"]), Context(elsewhere=elsewhere))
    assert result.rewrites["linear (token)"] == 6


def test_layers_that_are_integers_already() -> None:
    after, _ = rewritten(encoder(), IntegerOnly(), calibrated(TEXTS))
    with pytest.raises(
        RewriteError, match="integer_only has made integers of the program already; leave one of the two"
    ):
        rewritten(after, Quantize())


def test_everything_skipped_leaves_the_graph() -> None:
    before = encoder()
    after, result = rewritten(before, Quantize(skip=["*"]))
    assert result.changes == 0 and [node.name for node in after.graph.nodes] == [
        node.name for node in before.graph.nodes
    ]


class Tied(nn.Module):
    """An embedding whose table is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(ids))
        return found


def test_an_embedding_stays_where_a_linear_reads_its_floats() -> None:
    after, result = rewritten(program(Tied(), IDS), Quantize(skip=["head"]))
    assert result.changes == 0
    assert reasons(result, "embedding") == ["its weight is read by linear, which stays in floats"]
    assert after.module.words.weight.dtype is torch.float32


def test_embeddings_stay_unless_asked() -> None:
    after, _ = rewritten(encoder(), Quantize(embeddings=None))
    assert after.module.embed.weight.dtype is torch.float32


@pytest.mark.parametrize("first", [Quantize(), Quantize(fold=False), Quantize(weights="int4")], ids=str)
def test_twice_is_refused(first: Quantize) -> None:
    after, _ = rewritten(ONE(), first)
    with pytest.raises(RewriteError, match="quantized already; give one Quantize with all options"):
        Quantize().apply(after, Context())


# --- what must survive -----------------------------------------------------------------------------------------


def test_symmetric_dynamic_ranges_are_those_of_tokens() -> None:
    after, _ = rewritten(encoder(), Quantize(mode="dynamic", symmetric=True, sensitive=None), calibrated(TEXTS))
    assert {node.args[1] for node in after.calls(dynamic_quantize)} == {"token"}


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
def test_budget_stops(budget: int) -> None:
    """The encoder has four sites: query, key and value; out; up; down."""
    after, _ = rewritten(encoder(), Quantize(embeddings=None), Context(max_rewrites=budget))
    assert len(after.calls(dynamic_quantize)) == budget


def test_a_budget_of_nothing_changes_nothing() -> None:
    before = encoder()
    after, result = rewritten(before, Quantize(), Context(max_rewrites=0))
    given = list(tiny.inputs().values())
    assert result.changes == 0 and torch.equal(after.run(given)[0], before.run(given)[0])


def test_a_budget_reaches_embeddings_last() -> None:
    _, result = rewritten(encoder(), Quantize(), Context(max_rewrites=4))
    assert "embedding" not in result.rewrites
    _, result = rewritten(encoder(), Quantize(), Context(max_rewrites=5))
    assert result.rewrites["embedding"] == 1


def test_what_else_reads_an_activation_reads_floats() -> None:
    after, _ = rewritten(program(lambda m, x: x + F.linear(x, m.w), normal(*X), w=normal(8, 8)), Quantize())
    (add,) = after.calls(aten.add.Tensor)
    assert add.args[0].op == "placeholder"


def test_an_activation_is_quantized_once_for_its_linears() -> None:
    after, _ = rewritten(encoder(), Quantize())
    readers = Counter(node.args[0] for node in after.calls(int8_linear))
    assert sorted(readers.values()) == [1, 1, 1, 3]


def test_a_linear_right_behind_another() -> None:
    both = {"w": normal(6, 8), "v": normal(4, 6, seed=1)}
    before = program(lambda m, x: F.linear(F.linear(x, m.w), m.v), normal(*X), **both)
    after, _ = rewritten(before, Quantize())
    assert len(after.calls(int8_linear)) == 2
    assert sqnr_db(after.run([normal(*X)])[0], before.run([normal(*X)])[0]) > 30


def test_tied_weights_are_stored_once() -> None:
    before = program(Tied(), IDS)
    after, result = rewritten(before, Quantize())
    assert set(result.rewrites) == {"linear (token)", "embedding"}
    assert [name for name, value in after.module.state_dict().items() if value.dtype is torch.int8] == [
        "words_weight_integers"
    ]
    assert sqnr_db(after.run([IDS])[0], before.run([IDS])[0]) > 30


def test_a_tied_weight_is_neither_smoothed_nor_fitted() -> None:
    after, _ = rewritten(program(Tied(), IDS), Quantize(), calibrated([[IDS]] * 4))
    fitted, _ = rewritten(program(Tied(), IDS), Quantize())
    assert torch.equal(after.module.words_weight_integers, fitted.module.words_weight_integers)


@pytest.mark.slow
def test_the_table_and_head_of_gpt2_are_quantized_once() -> None:
    compiled = fxpress.compile(tiny.gpt2(), [Quantize()], tiny.text(), backend="eager", verify=False)
    graph = compiled.program
    tables = [node for node in graph.graph.nodes if node.op == "get_attr" and node.meta["val"].shape[0] == 1000]
    assert sorted(str(graph.tensor(node).dtype) for node in tables) == ["torch.float32", "torch.int8"]
    (integers,) = (node for node in tables if graph.tensor(node).dtype is torch.int8)
    assert {user.target for user in integers.users} == {int8_linear, aten.embedding.default}


def test_one_table_looked_up_twice() -> None:
    class Twice(Lookup):
        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.words(ids) + self.words(ids + 1)
            return found

    after, result = rewritten(program(Twice(), IDS.clamp(max=8)), Quantize())
    assert result.rewrites["embedding"] == 2
    stored = {name: tuple(value.shape) for name, value in after.module.state_dict().items()}
    assert stored == {"words_weight_integers": (10, 8), "words_weight_scale": (10, 1)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "tensor"},
        {"activations": None},
        {"weights": "int4"},
        {"weights": "int4", "activations": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (3, 33), (17, 65)])
def test_odd_sizes(rows: int, columns: int, options: dict[str, Any]) -> None:
    before = program(linear, normal(2, 5, columns), **weights(rows, columns))
    after, _ = rewritten(before, Quantize(**options))
    for size in ((1, 1), (3, 2)):
        x = normal(*size, columns, seed=7)
        assert sqnr_db(after.run([x])[0], before.run([x])[0]) > (12 if options.get("weights") else 25)


EDGES: list[dict[str, Any]] = [
    {}, {"granularity": "tensor"}, {"weights": "int4"}, {"weights": "int4", "activations": "int8"}, {"mode": "static"},
]  # fmt: skip


def test_a_batch_of_nothing() -> None:
    after, _ = rewritten(ONE(), Quantize())
    assert after.run([torch.zeros(0, 5, 8)])[0].shape == (0, 5, 4)


@pytest.mark.parametrize("options", EDGES, ids=str)
def test_a_weight_of_zeros_leaves_the_bias(options: dict[str, Any]) -> None:
    before = program(linear, normal(*X), w=torch.zeros(4, 8), b=normal(4))
    after, _ = rewritten(before, Quantize(**options), calibrated([[normal(*X)]]))
    assert torch.equal(after.run([normal(*X)])[0], before.run([normal(*X)])[0])


@pytest.mark.parametrize("options", EDGES, ids=str)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e12])
def test_constant_activations_give_finite_numbers(value: float, options: dict[str, Any]) -> None:
    x = torch.full(X, value)
    before = program(linear, normal(*X), **weights(4, 8))
    for batches in [[[x]]] if options.get("mode") else [[], [[x]]]:
        after, _ = rewritten(before, Quantize(**options), calibrated(batches))
        found, expected = after.run([x])[0], before.run([x])[0]
        assert found.isfinite().all() and (found - expected).norm() <= 0.1 * expected.norm()


MIXED = {"weights": "int4", "activations": "int8", "group_size": 16}  # 4 bits times 8


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batches", [[], TEXTS], ids=["plain", "calibrated"])
@pytest.mark.parametrize("options", [{}, {"activations": None}, {"weights": "int4", "group_size": 16}, MIXED], ids=str)
def test_half_precision_keeps_its_dtype(half: torch.dtype, batches: Batches, options: dict[str, Any]) -> None:
    before = encoder(dtype=half)
    after, result = rewritten(before, Quantize(**options), calibrated(batches))
    given = list(tiny.inputs(3, 5).values())
    found = after.run(given)[0]
    assert result.changes == 7 and found.dtype is half
    assert cosines(found, before.run(given)[0]).mean() > 0.99


def test_a_table_has_8_bits_beside_linears_of_4() -> None:
    before = program(Lookup(), IDS)
    after, _ = rewritten(before, Quantize(weights="int4"))
    assert sqnr_db(after.run([IDS])[0], before.run([IDS])[0]) > 35


def integers(traced: Program) -> Counter[tuple[float, ...]]:
    """The rows of the weights that integer matmuls read."""
    return Counter(
        itertools.chain.from_iterable(map(tuple, traced.tensor(n.args[3]).tolist()) for n in traced.calls(int8_linear))
    )


def test_before_and_after_fuse_are_the_same() -> None:
    early, late = (
        rewritten(rewritten(encoder(), Quantize())[0], Fuse())[0],
        rewritten(rewritten(encoder(), Fuse())[0], Quantize())[0],
    )
    assert integers(early) == integers(late)
    for size in ((2, 6), (1, 1), (3, 11)):
        given = list(tiny.inputs(*size).values())
        assert torch.equal(early.run(given)[0], late.run(given)[0])


def test_the_model_is_not_changed() -> None:
    model = tiny.encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxpress.compile(model, [Quantize()], tiny.inputs(), backend="eager", calibration=[tiny.inputs(3, 9)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_batches_are_not_changed() -> None:
    copies = [[tensor.clone() for tensor in batch] for batch in TEXTS]
    rewritten(encoder(), Quantize(mode="static"), calibrated(TEXTS))
    assert all(torch.equal(a, b) for x, y in zip(TEXTS, copies, strict=True) for a, b in zip(x, y, strict=True))


def test_the_same_data_give_the_same_integers() -> None:
    first, second = (rewritten(encoder(), Quantize(), calibrated(TEXTS))[0].module.state_dict() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"weights": "int4"}, MIXED], ids=str)
def test_what_is_not_folded_can_be_trained_and_folded_afterwards(options: dict[str, Any]) -> None:
    both = {"w": normal(16, 8) / 3, "b": normal(16, seed=1), "v": normal(4, 16, seed=2) / 4}
    traced = program(lambda m, x: F.linear(F.gelu(F.linear(x, m.w, m.b)), m.v), normal(32, 8), **both)
    trained, _ = rewritten(traced, Quantize(fold=False, **options))
    x, target = normal(32, 8, seed=3), normal(32, 4, seed=4)
    optimizer = torch.optim.SGD(trained.module.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (trained.run([x])[0] - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    expected = trained.run([x])[0].detach()
    assert fold(trained) == 2
    verify(trained)
    torch.testing.assert_close(trained.run([x])[0].detach(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_folded_gives_what_is_folded() -> None:
    left, stored = (rewritten(encoder(), Quantize(fold=each))[0] for each in (False, True))
    assert left.calls(quantize) and left.calls(dequantize) and not left.calls(int8_linear)
    given = list(tiny.inputs(3, 9).values())
    assert sqnr_db(left.run(given)[0], stored.run(given)[0]) > 50  # a number near a tie may be rounded elsewhere


def test_frozen_weights_stay_frozen() -> None:
    traced = program(linear, normal(*X), w=nn.Parameter(normal(4, 8), requires_grad=False), b=normal(4))
    after, _ = rewritten(traced, Quantize(fold=False))
    assert [name for name, value in after.module.named_parameters() if value.requires_grad] == ["b"]
