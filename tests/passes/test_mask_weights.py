"""MaskWeights on single weights: goldens, exact counts, what is spared, other passes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import assert_equal, before_after, normal, program, reasons, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.ops.quantize import int8_linear
from fxpress.ir.printer import print_program
from fxpress.ir.pruning.masks import masked
from fxpress.ir.rewrite import Context, PassResult, Sparsity
from fxpress.passes import Canonicalize, Fold, Fuse, MaskWeights, Quantize

METHODS = ("random", "magnitude", "wanda", "sparsegpt", "fisher", "movement")
NAMES = ("query", "key", "value", "out", "up", "down")
TEXTS = [list(tiny.inputs(3, length).values()) for length in (6, 9, 7)]
SIZES = ((2, 6), (1, 1), (3, 11))


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].square().mean() + outputs[0][..., 0].mean()


def mask_weights(method: str = "magnitude", sparsity: float | None = 0.5, **options: Any) -> MaskWeights:
    """Masks that are left in the graph; with a loss where one is needed."""
    if method == "movement":
        options.setdefault("loss", loss)
    return MaskWeights(sparsity, method, **{"fold": False, **options})


@functools.cache
def encoder(dtype: torch.dtype = torch.float32) -> Program:
    """One Transformer layer, canonical; not to be changed."""
    return rewritten(program(tiny.encoder().to(dtype), *tiny.inputs().values()), Canonicalize())[0]


@functools.cache
def pruned(rewrite: MaskWeights) -> tuple[Program, PassResult]:
    """The encoder; not to be changed."""
    return rewritten(encoder(), rewrite, Context(calibration=TEXTS))


def weights(traced: Program) -> dict[str, Tensor]:
    return {name: getattr(traced.module, name).weight.detach() for name in NAMES}


def zeros(traced: Program) -> dict[str, Tensor]:
    """Of the masks, by layer, in the order of the layers."""
    found = {str(item.weight.target).rpartition(".")[0]: traced.tensor(item.mask) == 0 for item in masked(traced)}
    return {name: found[name] for name in NAMES if name in found}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def outputs(traced: Program, size: tuple[int, int] = (3, 11)) -> Tensor:
    found: Tensor = traced.run(list(tiny.inputs(*size).values()))[0].detach()
    return found


# --- golden graphs ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is the weight of the head, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.inner(self.words(ids))))
        return found


IDS = torch.tensor([[0, 3, 9], [1, 1, 2]])
GOLDEN = {
    "folded": MaskWeights(0.5),
    "left_for_training": MaskWeights(0.5, fold=False),
    "tied": MaskWeights(0.5, layers=["head"], fold=False),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_graph(case: str, golden: Callable[[str], None]) -> None:
    before = program(Tied(), IDS)
    golden(before_after(before, *rewritten(before, GOLDEN[case])))


# --- which numbers go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_as_it_was_and_what_goes_is_zero(method: str) -> None:
    masks = zeros(pruned(mask_weights(method, refit=False))[0])
    folded = weights(rewritten(pruned(mask_weights(method, refit=False))[0], Fold())[0])
    for name, before in weights(encoder()).items():
        assert torch.equal(folded[name], torch.where(masks[name], 0, before))


@pytest.mark.parametrize("method", METHODS)
def test_folded_at_once_or_later_is_the_same(method: str) -> None:
    at_once, later = pruned(mask_weights(method, fold=True))[0], rewritten(pruned(mask_weights(method))[0], Fold())[0]
    assert print_program(at_once) == print_program(later)
    assert same(dict(at_once.module.state_dict()), dict(later.module.state_dict()))


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_each_weight_loses_exactly_its_share(method: str, sparsity: float) -> None:
    for zero in zeros(pruned(mask_weights(method, sparsity, scope="layer"))[0]).values():
        assert int(zero.sum()) == round(sparsity * zero.numel())


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"sparsegpt"}))
def test_over_all_weights_exactly_the_share_goes(method: str, sparsity: float) -> None:
    every = torch.cat(
        [zero.flatten() for zero in zeros(pruned(mask_weights(method, sparsity, scope="global"))[0]).values()]
    )
    assert int(every.sum()) == round(sparsity * every.numel())


def test_over_all_weights_layers_differ() -> None:
    shares = [float(zero.float().mean()) for zero in zeros(pruned(mask_weights(scope="global"))[0]).values()]
    assert max(shares) - min(shares) > 0.05


@pytest.mark.parametrize(("method", "scope"), [("fisher", "global"), ("wanda", "layer"), ("magnitude", "layer")])
def test_the_scope_of_a_method(method: str, scope: str) -> None:
    found, expected = pruned(mask_weights(method)), pruned(mask_weights(method, scope=scope))
    assert same(zeros(found[0]), zeros(expected[0]))


@pytest.mark.parametrize("sparsity", [0.5, 0.37])
def test_wanda_takes_as_many_of_each_row_to_one(sparsity: float) -> None:
    for zero in zeros(pruned(mask_weights("wanda", sparsity))[0]).values():
        counts = zero.sum(1)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:8", 3, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_of_n_of_m_neighbouring_inputs_n_stay(method: str, pattern: str, keep: int, of: int) -> None:
    for zero in zeros(pruned(mask_weights(method, None, pattern=pattern))[0]).values():
        assert bool(((~zero).reshape(len(zero), -1, of).sum(2) == keep).all())


@pytest.mark.parametrize("method", METHODS)
def test_blocks_go_as_a_whole(method: str) -> None:
    for zero in zeros(pruned(mask_weights(method, 0.5, pattern="blocks", block=8))[0]).values():
        whole = zero.reshape(len(zero) // 8, 8, -1, 8)
        assert torch.equal(whole, whole[:, :1, :, :1].expand_as(whole))
        assert int(zero.sum()) == zero.numel() // 2


@pytest.mark.parametrize("method", METHODS)
def test_biases_norms_and_embeddings_stay(method: str) -> None:
    before, after = encoder().module.state_dict(), rewritten(pruned(mask_weights(method))[0], Fold())[0]
    found = after.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed == {f"{name}.weight" for name in NAMES}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_again(method: str) -> None:
    again = rewritten(encoder(), mask_weights(method, fold=True), Context(calibration=TEXTS))[0]
    assert same(weights(pruned(mask_weights(method, fold=True))[0]), weights(again))


def test_another_seed_takes_others() -> None:
    first, second = (zeros(pruned(mask_weights("random", seed=seed))[0]) for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in NAMES)


def test_every_layer_has_random_numbers_of_its_own() -> None:
    found = zeros(pruned(mask_weights("random"))[0])
    assert not torch.equal(found["query"], found["key"])


def test_what_was_done_is_reported() -> None:
    _, result = rewritten(encoder(), mask_weights(sparsity=0.25, layers=["up", "down"]))
    assert result.rewrites == {"weight": 2}
    assert [(match.node, match.detail) for match in result.matches] == [("up", "25.0% zero"), ("down", "25.0% zero")]
    assert result.sparsity == [Sparsity("up", 512, 128), Sparsity("down", 512, 128)]


def test_with_calibration_data_the_error_is_reported() -> None:
    _, result = pruned(mask_weights("wanda"))
    assert all(report.sqnr_db is not None and 3 < report.sqnr_db < 30 for report in result.sparsity)
    assert result.matches[0].detail.endswith(" dB")


# --- calibration data ------------------------------------------------------------------------------------------


def padded(fill: int, more: int) -> list[list[Tensor]]:
    """The same real tokens; the padding, and `more` columns of it, filled with one id."""
    ids, mask = TEXTS[1]
    return [[F.pad(torch.where(mask, ids, fill), (0, more), value=fill), F.pad(mask, (0, more), value=False)]]


def with_padding(rewrite: MaskWeights, fill: int, more: int = 0) -> Program:
    return rewritten(encoder(), rewrite, Context(calibration=padded(fill, more)))[0]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_padding_holds_does_not_matter(method: str) -> None:
    first, second = (weights(with_padding(mask_weights(method), fill)) for fill in (0, 49))
    assert same(first, second)


def test_what_padding_holds_does_not_matter_to_the_outputs_fisher_looks_at() -> None:
    """But for the outputs at padding itself, nothing depends on it."""
    first, second = (zeros(with_padding(mask_weights("fisher"), fill)) for fill in (0, 49))
    assert same(first, second)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_how_much_padding_there_is_does_not_matter(method: str) -> None:
    first, second = (with_padding(mask_weights(method), 7, more) for more in (0, 5))
    assert same(zeros(first), zeros(second))
    for name, weight in weights(first).items():
        torch.testing.assert_close(weights(second)[name], weight, rtol=1e-4, atol=1e-5)


def correlated(seed: int) -> list[Tensor]:
    """Rows [200, 32] of inputs of different sizes that are much alike."""
    mix = torch.eye(32) + normal(32, 32, seed=5) / 3
    return [normal(200, 32, seed=seed) @ mix * torch.linspace(0.2, 2, 32)]


LINEAR = {"w": normal(24, 32, seed=1)}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_on_correlated_inputs_the_methods_are_better_in_their_order(pattern: str) -> None:
    """On rows that were not calibrated with: random, magnitude, wanda, sparsegpt."""
    before = program(lambda m, x: F.linear(x, m.w), normal(4, 32), **LINEAR)
    x = correlated(9)
    context = Context(calibration=[correlated(seed) for seed in range(3)])
    share = 0.5 if pattern == "unstructured" else None
    errors = [
        sqnr_db(
            rewritten(before, MaskWeights(share, method, pattern, layers=["w"]), context)[0].run(x)[0], before.run(x)[0]
        )
        for method in ("random", "magnitude", "wanda", "sparsegpt")
    ]
    assert all(later > earlier + 0.2 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher"])
def test_refit_lessens_the_error_and_keeps_the_mask(method: str) -> None:
    plain, fit = (pruned(mask_weights(method, scope="layer", refit=refit)) for refit in (False, True))
    if method != "wanda":  # whose scores are of what the fitted layers before give
        assert same(zeros(plain[0]), zeros(fit[0]))
    assert (
        sum(after.sqnr_db - before.sqnr_db for before, after in zip(plain[1].sparsity, fit[1].sparsity, strict=True))
        > 3
    )


# --- which layers ----------------------------------------------------------------------------------------------


def test_tied_weights_and_the_output_are_spared_with_a_reason() -> None:
    after, result = rewritten(program(Tied(), IDS), MaskWeights(0.5))
    assert reasons(result) == ["weight words.weight is an embedding too; name it in layers to prune it"]
    assert result.rewrites == {"weight": 1} and bool((after.module.words.weight != 0).all())


def test_the_head_is_spared_with_a_reason() -> None:
    _, result = rewritten(
        program(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.h), normal(2, 8), w=normal(8, 8), h=normal(3, 8)),
        MaskWeights(0.5),
    )
    assert reasons(result) == ["h makes an output of the model; name it in layers to prune it"]


def test_tied_weights_that_are_named_share_one_mask() -> None:
    after, result = rewritten(program(Tied(), IDS), MaskWeights(0.5, layers=["head"], fold=False))
    (found,) = masked(after)
    assert {user.target for user in found.product.users} == {
        torch.ops.aten.embedding.default,
        torch.ops.aten.linear.default,
    }
    assert result.sparsity == [Sparsity("head", 80, 40)]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"layers": ["up"]}, ["up"]),
        ({"layers": ["q*", "?ey"]}, ["query", "key"]),
        ({"skip": ["up", "down"]}, ["query", "key", "value", "out"]),
        ({"layers": ["*u*"], "skip": ["out"]}, ["query", "value", "up"]),
        ({"layers": ("down",), "skip": ("down",)}, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_layers_that_are_meant(options: dict[str, Any], names: list[str], scope: str) -> None:
    after, result = rewritten(encoder(), mask_weights(scope=scope, **options))
    assert [report.layer for report in result.sparsity] == names
    assert list(zeros(after)) == names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0, 4])
def test_as_many_weights_as_rewrites_are_left(budget: int, method: str) -> None:
    context = Context(calibration=TEXTS, max_rewrites=budget)
    after, result = rewritten(encoder(), mask_weights(method), context)
    assert result.changes == context.rewrites == budget
    assert len(masked(after)) == budget


@pytest.mark.parametrize("sizes", [(1, 1), (3, 33)])
@pytest.mark.parametrize("method", METHODS)
def test_odd_sizes(method: str, sizes: tuple[int, int]) -> None:
    before = program(lambda m, x: F.linear(x, m.w).tanh(), normal(4, sizes[1]), w=normal(*sizes))
    after, _ = rewritten(before, mask_weights(method, fold=True), Context(calibration=[[normal(9, sizes[1])]]))
    assert int((after.module.w == 0).sum()) == round(sizes[0] * sizes[1] / 2)


@pytest.mark.slow
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_keeps_its_dtype(method: str, half: torch.dtype) -> None:
    after, _ = rewritten(encoder(half), mask_weights(method), Context(calibration=TEXTS))
    assert all(weight.dtype is half for weight in weights(after).values())
    assert outputs(after).isfinite().all()


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher"])
def test_an_activation_that_several_layers_read(method: str) -> None:
    """Each is masked by its own weight; query, key and value of the encoder are such layers, too."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.linear(x, m.a).relu()
        return F.linear(h, m.b).tanh() + h, F.linear(h, m.c).tanh()

    given = {name: normal(8, 8, seed=seed) for seed, name in enumerate("abc")}
    before = program(forward, normal(4, 8), **given)
    after, _ = rewritten(before, mask_weights(method, scope="layer", fold=True), Context(calibration=[[normal(9, 8)]]))
    x = normal(5, 8, seed=4)
    by_hand = forward(after.module, x)
    assert all((getattr(after.module, name) == 0).sum() == 32 for name in "abc")
    for found, expected in zip(after.run([x]), by_hand, strict=True):
        assert torch.equal(found, expected)


# --- twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fold"),
    [("unstructured", True), ("unstructured", False), ("2:4", True), ("2:4", False), ("blocks", False)],
)
def test_magnitude_a_second_time_changes_nothing(pattern: str, fold: bool) -> None:
    rewrite = MaskWeights(None if pattern == "2:4" else 0.5, pattern=pattern, block=8, fold=fold)
    first = rewritten(encoder(), rewrite)[0]
    second = rewritten(first, rewrite)[0]
    assert print_program(first) == print_program(second)
    assert same(dict(first.module.state_dict()), dict(second.module.state_dict()))


def test_neurons_whose_weights_all_go_are_cut() -> None:
    """Of the 32 columns of down, 8 are a block that goes as a whole."""
    before = encoder().copy()
    small = before.module.down.weight.detach().clone()
    small[:, 8:16] /= 100
    before.set_weight(next(n for n in before.graph.nodes if n.target == "down.weight"), small)
    after, _ = rewritten(before, MaskWeights(0.25, pattern="blocks", block=8, layers=["down"]))
    assert after.module.up.weight.shape == (24, 16)
    masks, _ = rewritten(before, MaskWeights(0.25, pattern="blocks", block=8, layers=["down"], fold=False))
    torch.testing.assert_close(outputs(after), outputs(masks))


# --- other passes and backends ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"pattern": "2:4", "sparsity": None}, {"method": "sparsegpt"}], ids=str)
@pytest.mark.parametrize("fold", [True, False])
def test_the_onnx_backend_gives_what_the_masked_program_gives(fold: bool, options: dict[str, Any]) -> None:
    compiled = fxpress.compile(
        tiny.encoder(),
        [mask_weights(**{"fold": fold, **options})],
        tiny.inputs(),
        calibration=[tiny.inputs(3, length) for length in (6, 9)],
        backend="onnx",
    )
    for size in SIZES:
        found = torch.as_tensor(compiled(**tiny.inputs(*size)))
        torch.testing.assert_close(found, outputs(compiled.program, size), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [True, False])
def test_before_and_after_fuse_are_the_same(fold: bool) -> None:
    """Where every few numbers lose their share, it does not matter that fuse packs weights into one."""
    rewrite = MaskWeights(pattern="2:4", fold=fold)
    early = rewritten(rewritten(encoder(), rewrite)[0], Fuse())[0]
    late = rewritten(rewritten(rewritten(encoder(), Fuse())[0], rewrite)[0], Fuse())[0]
    for size in SIZES:
        assert_equal(early, late, list(tiny.inputs(*size).values()))


PLAIN: dict[str, Any] = {"method": "minmax", "symmetric": True}


@pytest.mark.parametrize(("options", "batches"), [(PLAIN, []), ({"symmetric": True}, TEXTS)], ids=["minmax", "data"])
def test_what_is_quantized_afterwards_stays_zero(options: dict[str, Any], batches: list[list[Tensor]]) -> None:
    before, _ = rewritten(encoder(), MaskWeights(0.5, skip=["up"]))
    after, _ = rewritten(before, Quantize(**options), Context(calibration=batches))
    stored = {str(node.args[3].target): after.tensor(node.args[3]) for node in after.calls(int8_linear)}
    for name in set(NAMES) - {"up"}:
        integers = next(value for key, value in stored.items() if key.startswith(f"{name}_weight"))
        assert not integers[weights(before)[name] == 0].any()
    assert len(stored) == len(NAMES)


def test_masks_have_to_be_folded_before_weights_are_quantized() -> None:
    with pytest.raises(RewriteError, match="masked for training; put the pass fold before quantize"):
        rewritten(pruned(mask_weights())[0], Quantize())


@pytest.mark.slow
def test_the_model_is_not_changed() -> None:
    model = tiny.encoder()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fxpress.compile(model, [mask_weights("sparsegpt")], tiny.inputs(), backend="eager", calibration=[tiny.inputs(3, 9)])
    assert same(before, dict(model.state_dict()))
