"""Pruning single weights: which are meant, how they are scored, and what each layer reads when it is pruned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program
from torch import Tensor, nn

from fxpress.ir.equality import sqnr_db
from fxpress.ir.graph import Program
from fxpress.ir.pruning.select import Pattern, lowest, mask
from fxpress.ir.pruning.weights import Criterion, Pruned, Target, decide, gram, output_sqnr_db, prune, targets
from fxpress.ir.rewrite import untracked

aten = torch.ops.aten
WIDTH, INNER = 8, 12
UNSTRUCTURED = Pattern("unstructured")
X = normal(2, 5, WIDTH)


def criterion(method: str, sparsity: float = 0.5, refit: bool = False, **options: Any) -> Criterion:
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    return Criterion(method, sparsity, options.get("pattern", UNSTRUCTURED), refit, generator, options.get("given", {}))


# --- targets ---------------------------------------------------------------------------------------------------


def meant(traced: Program, explicit: bool = False) -> tuple[list[Target], list[str]]:
    found, refusals = targets(traced, traced.calls(aten.linear.default), explicit)
    return found, [refusal.reason for refusal in refusals]


def forward(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(torch.tanh(F.linear(x, m.u)), m.d))


WEIGHTS = {"u": normal(INNER, WIDTH) / 2, "d": normal(WIDTH, INNER, seed=1) / 2}


@functools.cache
def traced() -> Program:
    """Two layers; not to be changed."""
    return program(forward, X, **WEIGHTS)


def test_weights_of_linear_layers_are_targets_in_graph_order() -> None:
    found, reasons = meant(traced())
    assert [target.name for target in found] == ["u", "d"] and reasons == []


def test_a_weight_of_two_layers_is_one_target() -> None:
    weight = normal(WIDTH, WIDTH)
    (found,), _ = meant(program(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w).tanh(), X, w=weight))
    assert len(found.readers) == 2


def test_a_computed_weight_is_refused() -> None:
    found, reasons = meant(program(lambda m, x: F.linear(x, m.w * 2).tanh(), X, w=normal(3, WIDTH)))
    assert found == [] and reasons == ["its weight is computed"]


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    found, reasons = meant(program(lambda m, x: F.linear(x, m.w).tanh(), X, w=normal(WIDTH)))
    assert found == [] and reasons == ["weight w is no matrix of floats"]


def test_what_makes_an_output_is_spared() -> None:
    found, reasons = meant(program(lambda m, x: F.linear(F.linear(x, m.u).tanh(), m.d), X, **WEIGHTS))
    assert [target.name for target in found] == ["u"]
    assert reasons == ["d makes an output of the model; name it in layers to prune it"]


class Tied(nn.Module):
    """A head whose weight is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.head(self.words(ids)))


def test_a_weight_that_is_an_embedding_too_is_spared() -> None:
    found, reasons = meant(program(Tied(), torch.tensor([[0, 3]])))
    assert found == []
    assert reasons == ["weight words.weight is an embedding too; name it in layers to prune it"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: program(lambda m, x: F.linear(x, m.w), X, w=normal(3, WIDTH)),
        lambda: program(Tied(), torch.tensor([[0, 3]])),
    ],
    ids=["output", "embedding"],
)
def test_what_is_named_is_not_spared(build: Callable[[], Program]) -> None:
    found, reasons = meant(build(), explicit=True)
    assert len(found) == 1 and reasons == []


# --- statistics ------------------------------------------------------------------------------------------------


def test_gram_sums_over_batches() -> None:
    first, second = normal(7, 4), normal(3, 4, seed=1)
    every = torch.cat([first, second])
    torch.testing.assert_close(gram([first, second]), every.T @ every)


def test_gram_of_half_precision_is_summed_in_fp32() -> None:
    """Squares of 1000 overflow fp16."""
    assert gram([torch.full((3, 2), 1000.0, dtype=torch.float16)]).tolist() == [[3e6, 3e6], [3e6, 3e6]]


def test_the_error_of_a_layer_is_that_of_its_outputs() -> None:
    rows, old, new = [normal(9, 4), normal(5, 4, seed=1)], normal(3, 4, seed=2), normal(3, 4, seed=3)
    every = torch.cat(rows)
    assert output_sqnr_db(rows, new, old) == pytest.approx(sqnr_db(every @ new.T, every @ old.T))
    assert output_sqnr_db(rows, old, old) == float("inf")


def test_the_error_over_many_tokens_is_that_over_a_part_of_them() -> None:
    rows, old = [normal(1500, 4, seed=seed) for seed in range(2)], normal(3, 4, seed=2)
    new = old + normal(3, 4, seed=3) / 10
    every = torch.cat(rows)
    assert output_sqnr_db(rows, new, old) == pytest.approx(sqnr_db(every @ new.T, every @ old.T), abs=1)


# --- one weight ------------------------------------------------------------------------------------------------

ROWS = [normal(40, WIDTH, seed=seed) @ (torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=9) / 2) for seed in (2, 3)]
U = Target(next(node for node in traced().graph.nodes if node.target == "u"), (traced().calls(aten.linear.default)[0],))


def pruned(method: str, sparsity: float = 0.5, rows: Sequence[Tensor] | None = ROWS, **options: Any) -> Pruned:
    scores = {"given": {U.weight: normal(INNER, WIDTH, seed=5)}, "refit": method == "sparsegpt", **options}
    return criterion(method, sparsity, **scores).pruned(U, WEIGHTS["u"], rows, options.get("keep"))


def test_random_scores_are_those_of_the_generator() -> None:
    found = pruned("random", seed=3)
    scores = torch.rand(INNER, WIDTH, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.keep, lowest([scores], 0.5)[0])


def test_magnitude_takes_the_smallest_of_all_rows() -> None:
    assert torch.equal(pruned("magnitude").keep, lowest([WEIGHTS["u"].abs()], 0.5)[0])


def test_wanda_takes_the_smallest_products_of_each_row() -> None:
    norms = torch.cat(ROWS).norm(dim=0)
    assert torch.equal(pruned("wanda").keep, mask(WEIGHTS["u"].abs() * norms, 0.5, UNSTRUCTURED, by_row=True))


def test_wanda_does_not_count_tokens_and_their_scale() -> None:
    more = [batch * 3 for batch in ROWS * 2]
    assert torch.equal(pruned("wanda").keep, pruned("wanda", rows=more).keep)


@pytest.mark.parametrize("method", ["fisher", "movement"])
def test_given_scores_decide(method: str) -> None:
    assert torch.equal(pruned(method).keep, lowest([normal(INNER, WIDTH, seed=5)], 0.5)[0])


def test_sparsegpt_makes_up_for_zeros_with_what_is_read() -> None:
    """Zeros of its mask alone are worse, and those of Wanda's."""
    found = pruned("sparsegpt")
    assert torch.equal(found.values != 0, found.keep)
    plain = [torch.where(keep, WEIGHTS["u"], 0) for keep in (found.keep, pruned("wanda").keep)]
    assert found.sqnr_db is not None
    assert all(found.sqnr_db > output_sqnr_db(ROWS, weight, WEIGHTS["u"]) + 0.3 for weight in plain)


def test_sparsegpt_without_a_fit_is_its_mask_alone() -> None:
    found = criterion("sparsegpt", refit=False).pruned(U, WEIGHTS["u"], ROWS, None)
    assert torch.equal(found.values, torch.where(found.keep, WEIGHTS["u"], 0))


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher", "movement"])
def test_without_a_fit_what_stays_is_as_it_was(method: str) -> None:
    found = pruned(method)
    assert torch.equal(found.values, torch.where(found.keep, WEIGHTS["u"], 0))


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher", "movement"])
def test_a_fit_keeps_the_mask_and_lessens_the_error(method: str) -> None:
    plain, fit = pruned(method), pruned(method, refit=True)
    assert torch.equal(plain.keep, fit.keep)
    assert torch.equal(fit.values != 0, fit.keep)
    assert plain.sqnr_db is not None and fit.sqnr_db is not None and fit.sqnr_db > plain.sqnr_db + 0.2


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher", "movement"])
def test_a_mask_that_is_decided_is_kept(method: str) -> None:
    keep = normal(INNER, WIDTH, seed=6) > 1
    assert torch.equal(pruned(method, keep=keep).keep, keep)


def test_without_data_there_is_no_error() -> None:
    assert pruned("magnitude", rows=None).sqnr_db is None


def test_half_precision_is_scored_in_fp32() -> None:
    """Products with inputs of 1000 overflow fp16."""
    half = WEIGHTS["u"].half()
    rows = [batch.half() * 1000 for batch in ROWS]
    found = criterion("wanda").pruned(U, half, rows, None)
    expected = criterion("wanda").pruned(U, half.float(), [batch.float() for batch in rows], None)
    assert torch.equal(found.keep, expected.keep)


def test_a_report_counts_zeros() -> None:
    report = pruned("wanda", 0.25).report(U)
    assert (report.layer, report.numbers, report.zeros) == ("u", INNER * WIDTH, INNER * WIDTH // 4)


# --- layer by layer --------------------------------------------------------------------------------------------

BATCHES = [[normal(3, 5, WIDTH, seed=seed)] for seed in (2, 3)]
EVERY = torch.cat([batch[0] for batch in BATCHES]).reshape(-1, WIDTH)


def walk(method: str, sparsity: float = 0.5, of: Program | None = None, **options: Any) -> dict[str, Pruned]:
    of = of or traced()
    found = prune(of, meant(of)[0], criterion(method, sparsity, **options), BATCHES, untracked)
    return {target.name: item for target, item in found.items()}


def alone(method: str, weight: Tensor, rows: Tensor) -> Pruned:
    return criterion(method).pruned(U, weight, [rows], None)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_second_layer_is_pruned_by_what_the_pruned_first_one_gives(method: str) -> None:
    found = walk(method)
    behind = torch.tanh(EVERY @ found["u"].values.T)
    ahead = torch.tanh(EVERY @ WEIGHTS["u"].T)
    assert torch.equal(found["d"].keep, alone(method, WEIGHTS["d"], behind).keep)
    assert not torch.equal(found["d"].keep, alone(method, WEIGHTS["d"], ahead).keep)


def test_inputs_that_the_first_layer_no_longer_gives_are_pruned_first() -> None:
    """Half the rows of u read nothing but input 0, which hardly ever is anything: they give zeros then."""
    u = normal(INNER, WIDTH)
    u[:6, 1:] = 0
    small = [[batch[0] * torch.tensor([1e-3] + [1.0] * (WIDTH - 1))] for batch in BATCHES]
    of = program(forward, X, u=u, d=WEIGHTS["d"])
    found = prune(of, meant(of)[0], criterion("wanda"), small, untracked)
    keep = next(item.keep for target, item in found.items() if target.name == "d")
    assert not keep[:, :6].any() and bool(keep[:, 6:].all())


def test_a_bias_is_read_on_the_way() -> None:
    def biased(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(torch.tanh(F.linear(x, m.u, m.b)), m.d))

    b = normal(INNER, seed=7) * 2
    found = walk("wanda", of=program(biased, X, **WEIGHTS, b=b))
    behind = torch.tanh(EVERY @ found["u"].values.T + b)
    assert torch.equal(found["d"].keep, alone("wanda", WEIGHTS["d"], behind).keep)


def test_what_two_layers_read_is_the_same_for_both() -> None:
    def split(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, m.u))
        return torch.tanh(F.linear(h, m.d)) + torch.tanh(F.linear(h, m.e))

    found = walk("wanda", of=program(split, X, **WEIGHTS, e=normal(WIDTH, INNER, seed=8)))
    behind = torch.tanh(EVERY @ found["u"].values.T)
    assert torch.equal(found["e"].keep, alone("wanda", normal(WIDTH, INNER, seed=8), behind).keep)


def test_a_weight_of_two_layers_is_pruned_once() -> None:
    weight = normal(WIDTH, WIDTH)
    of = program(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w).tanh(), X, w=weight)
    assert list(walk("wanda", of=of)) == ["w"]


def test_weights_are_not_changed_by_the_walk() -> None:
    walk("sparsegpt")
    assert all(torch.equal(getattr(traced().module, name), weight) for name, weight in WEIGHTS.items())


def test_without_data_there_is_no_walk() -> None:
    found = prune(traced(), meant(traced())[0], criterion("magnitude"), [], untracked)
    assert [item.sqnr_db for item in found.values()] == [None, None]


# --- one threshold for all -------------------------------------------------------------------------------------


def decided(method: str, sparsity: float = 0.5) -> dict[str, Tensor]:
    found = decide(traced(), meant(traced())[0], criterion(method, sparsity), BATCHES, untracked)
    return {str(weight.target): keep for weight, keep in found.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("method", ["random", "magnitude", "wanda"])
def test_over_all_weights_exactly_the_share_goes(method: str, sparsity: float) -> None:
    found = decided(method, sparsity)
    assert sum(int((~keep).sum()) for keep in found.values()) == round(sparsity * 2 * INNER * WIDTH)


def test_what_goes_is_smaller_than_what_stays_anywhere() -> None:
    found = decided("magnitude")
    gone = torch.cat([WEIGHTS[name][~keep].abs() for name, keep in found.items()])
    kept = torch.cat([WEIGHTS[name][keep].abs() for name, keep in found.items()])
    assert gone.max() <= kept.min()


def test_one_threshold_of_wanda_is_of_the_model_as_it_is() -> None:
    inputs = {"u": EVERY, "d": torch.tanh(EVERY @ WEIGHTS["u"].T)}
    scores = [WEIGHTS[name].abs() * rows.norm(dim=0) for name, rows in inputs.items()]
    for keep, expected in zip(decided("wanda").values(), lowest(scores, 0.5), strict=True):
        assert torch.equal(keep, expected)
