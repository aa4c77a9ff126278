"""MaskWeights on the dimensions of heads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from build import assert_equal, program, reasons, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.ir.equality import sqnr_db
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.layers import name_of
from fxpress.ir.ops.attention import attention
from fxpress.ir.printer import print_program
from fxpress.ir.pruning.channels import follow
from fxpress.ir.pruning.costs import unit_macs
from fxpress.ir.pruning.head_dims import find
from fxpress.ir.pruning.masks import masked
from fxpress.ir.pruning.units import families
from fxpress.ir.rewrite import Context, PassResult
from fxpress.passes import Canonicalize, Fold, Fuse, MaskWeights, Quantize

HEADS, SIZE, NEURONS = 2, 24, 64
WIDTH = HEADS * SIZE
SIZES = ((2, 6), (1, 1), (3, 11))


class Layers(nn.Module):
    """Two Transformer layers over token ids, with a boolean padding mask (True: may be attended)."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.packed = nn.Embedding(50, WIDTH), packed
        sizes = {"up": (WIDTH, NEURONS), "down": (NEURONS, WIDTH), "qkv": (WIDTH, 3 * WIDTH if packed else 1)}
        parts = {**dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH)), **sizes}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in parts.items()}) for _ in range(2)
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            names = ("query", "key", "value")
            made = layer["qkv"](x).chunk(3, -1) if self.packed else [layer[name](x) for name in names]  # type: ignore[index]
            q, k, v = (part.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for part in made)
            y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
            x = F.layer_norm(x + layer["out"](y.transpose(1, 2).flatten(2)), (WIDTH,))  # type: ignore[index]
            x = F.layer_norm(x + layer["down"](F.gelu(layer["up"](x))), (WIDTH,))  # type: ignore[index]
        return x


def texts(*lengths: int) -> list[list[Tensor]]:
    return [list(tiny.inputs(4, length).values()) for length in lengths]


CALIBRATION = texts(6, 9, 7, 12, 8, 10)


def narrow(sparsity: float = 0.4, pattern: str = "dims", **options: Any) -> MaskWeights:
    return MaskWeights(sparsity, "sparsegpt", pattern, **options)


@functools.cache
def layers(packed: bool = False) -> Program:
    """Canonical; not to be changed."""
    return rewritten(program(Layers(packed), *tiny.inputs().values()), Canonicalize())[0]


@functools.cache
def pruned(rewrite: MaskWeights) -> tuple[Program, PassResult]:
    """Not to be changed."""
    return rewritten(layers(), rewrite, Context(calibration=CALIBRATION))


def stay(after: Program) -> list[int]:
    """The dimensions of queries, then of values, by attention; then the neurons."""
    nodes = after.calls(attention)
    ups = [node for node in after.calls(torch.ops.aten.linear.default) if name_of(node).endswith(".up")]
    neurons = [node.meta["val"].shape[-1] for node in ups]
    widths = [[node.args[place].meta["val"].shape[-1] for node in nodes] for place in (0, 2)]  # type: ignore[union-attr]
    return [*widths[0], *widths[1], *neurons]


def error_db(after: Program, size: tuple[int, int] = (3, 11)) -> float:
    given = list(tiny.inputs(*size).values())
    return sqnr_db(after.run(given)[0].detach(), layers().run(given)[0].detach())


@pytest.mark.parametrize("pattern", ["dims", "dims+neurons"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6])
def test_the_budget_of_multiplications_is_met(pattern: str, sparsity: float) -> None:
    channels, sizes = follow(layers()), stay(pruned(narrow(sparsity, pattern))[0])
    every = [*(item.family for item in find(layers()).dims)]
    every += [item for item in families(channels)[0] if item.kind in pattern]
    costs = [unit_macs(layers(), channels, item) for item in every]
    order = [sizes[0], sizes[2], sizes[1], sizes[3], *sizes[4:]]
    removed = sum(cost * (len(item.channels) - count) for cost, item, count in zip(costs, every, order, strict=False))
    budget = sparsity * sum(cost * len(item.channels) for cost, item in zip(costs, every, strict=True))
    assert removed <= budget * 1.0001
    assert removed + 8 * max(costs) > budget
    assert all(size % 8 == 0 for size in sizes)


@pytest.mark.parametrize("refit", [None, False])
def test_nothing_goes_at_a_sparsity_of_0(refit: bool | None) -> None:
    after, result = pruned(narrow(0.0, "dims+neurons", refit=refit))
    assert not result.rewrites
    for size in SIZES:
        assert error_db(after, size) > 100


def test_by_layer_every_attention_loses_the_same_share() -> None:
    assert stay(pruned(narrow(0.34, scope="layer"))[0]) == [16, 16, 16, 16, NEURONS, NEURONS]


@pytest.mark.parametrize("pattern", ["dims", "dims+neurons"])
def test_cut_at_once_or_later_is_the_same(pattern: str) -> None:
    at_once = pruned(narrow(pattern=pattern))[0]
    masks = pruned(narrow(pattern=pattern, fold=False))[0]
    later, result = rewritten(masks, Fold())
    assert print_program(at_once) == print_program(later)
    assert masked(masks) and not masked(later)
    assert result.rewrites["dims"] == sum(SIZE - size for size in stay(later)[:4])
    for size in SIZES:
        assert_equal(masks, at_once, list(tiny.inputs(*size).values()))


def test_what_stays_makes_up_for_what_goes() -> None:
    """Values: what attention reads of queries and keys, no other dimension makes up for."""
    errors = [error_db(pruned_now(narrow(0.4, layers=["*.value"], refit=refit))) for refit in (None, False)]
    assert errors[0] > errors[1]


def test_it_costs_less_than_whole_heads() -> None:
    heads = rewritten(
        layers(), MaskWeights(0.5, "sparsegpt", "heads", scope="layer"), Context(calibration=CALIBRATION)
    )[0]
    assert error_db(pruned(narrow(0.5, scope="global"))[0]) > error_db(heads) + 3


def test_padding_is_of_no_account() -> None:
    """What the padded tokens are changes nothing."""
    other = [[ids.where(mask, (ids + 7) % 50), mask] for ids, mask in CALIBRATION]
    first, second = pruned(narrow())[0], rewritten(layers(), narrow(), Context(calibration=other))[0]
    assert stay(first) == stay(second)
    for name, weight in first.module.state_dict().items():
        torch.testing.assert_close(second.module.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_what_was_done_is_reported() -> None:
    _, result = pruned(narrow(0.34, scope="layer"))
    assert result.rewrites == {"dims": 32}
    done = [(match.rule, match.node, match.detail) for match in result.matches]
    assert done[0] == ("dims", "layers.0.query + layers.0.key", "16 of 24 dims stay")
    shares = {report.layer: round(report.zeros / report.numbers, 3) for report in result.sparsity}
    parts = ("query", "key", "value", "out")
    assert shares == dict.fromkeys((f"layers.{place}.{part}" for place in range(2) for part in parts), 0.333)


@pytest.mark.parametrize(
    ("options", "expected"), [({"layers": ["*.0.*"]}, [16, 24, 16, 24]), ({"skip": ["*.out"]}, [16, 16, 24, 24])]
)
def test_dimensions_that_are_meant(options: dict[str, Any], expected: list[int]) -> None:
    assert stay(pruned_now(narrow(0.34, scope="layer", **options)))[:4] == expected


def pruned_now(rewrite: MaskWeights) -> Program:
    return rewritten(layers(), rewrite, Context(calibration=CALIBRATION))[0]


def test_packed_projections_are_refused_with_a_reason() -> None:
    with pytest.raises(RewriteError, match=r"no dims that can be cut; query and key of attention.* is also read by"):
        rewritten(layers(packed=True), narrow(), Context(calibration=CALIBRATION))
    _, result = rewritten(layers(packed=True), narrow(pattern="dims+neurons"), Context(calibration=CALIBRATION))
    assert sum("is also read by" in reason for reason in reasons(result, "dims")) == 4


def test_rotary_stands_between_queries_and_attention() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, num_hidden_layers=1,
        vocab_size=50, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    batches = [tiny.text(3, length) for length in (5, 8)]
    compiled = fxpress.compile(model, [narrow(0.5)], batches[0], calibration=batches, backend="eager")
    (report,) = [item for item in compiled.report.passes if item.name.startswith("mask_weights")]
    assert report.rewrites == {"dims": 8}
    assert any("rotary" in str(refusal) and "stands between" in str(refusal) for refusal in report.refusals)


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "fisher"])
def test_other_methods_have_no_dimensions_to_choose(method: str) -> None:
    with pytest.raises(InputError, match="dims are chosen by 'sparsegpt'"):
        MaskWeights(0.3, method, "dims")


@pytest.mark.parametrize("pattern", ["dims", "dims+neurons"])
def test_fuse_after_it_changes_nothing(pattern: str) -> None:
    before = pruned(narrow(pattern=pattern))[0]
    after, _ = rewritten(before, Fuse())
    for size in SIZES:
        assert_equal(before, after, list(tiny.inputs(*size).values()))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [False, True])
def test_the_onnx_backend_gives_what_the_smaller_program_gives(quantize: bool) -> None:
    calibration = [tiny.inputs(3, length) for length in (6, 9)]
    passes = [narrow(pattern="dims+neurons"), *([Quantize("int8")] if quantize else []), Fuse()]
    compiled = fxpress.compile(Layers().eval(), passes, tiny.inputs(), calibration=calibration, backend="onnx")
    for size in SIZES:
        given = tiny.inputs(*size)
        truth = compiled.program.run(list(given.values()))[0].detach()
        real = given["mask"]
        torch.testing.assert_close(
            torch.as_tensor(compiled(**given))[real], truth[real], rtol=1e-3, atol=0.03 if quantize else 1e-4
        )
