"""What MaskWeights refuses, of every pattern, and the text form of its options."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch.nn.functional as F
from build import normal, program, rewritten
from torch import Tensor, nn

import fxpress
from fxpress.compiler.pipeline import parse_passes
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.graph import Program
from fxpress.ir.rewrite import Context, Pass
from fxpress.passes import Canonicalize, IntegerOnly, MaskWeights, Quantize

MLP = {"u": normal(24, 8), "b": normal(24, seed=1), "d": normal(8, 24, seed=2), "c": normal(8, seed=3)}
X = normal(2, 5, 6)


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].square().mean() + outputs[0][..., 0].mean()


def mask_units(method: str = "magnitude", pattern: str = "heads+neurons", **options: Any) -> MaskWeights:
    """With a loss where one is needed."""
    if method == "movement":
        options.setdefault("loss", loss)
    return MaskWeights(options.pop("sparsity", 0.5), method, pattern, **options)


@functools.cache
def encoder() -> Program:
    """One Transformer layer, canonical; not to be changed."""
    return rewritten(program(tiny.encoder(), *tiny.inputs().values()), Canonicalize())[0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": -0.1}, "sparsity must lie between 0 and 1, found -0.1"),
    ({"sparsity": 1.01}, "sparsity must lie between 0 and 1, found 1.01"),
    ({"sparsity": float("nan")}, "sparsity must lie between 0 and 1, found nan"),
    ({"sparsity": True}, "sparsity must lie between 0 and 1, found True"),
    ({"sparsity": "0.5"}, "sparsity must lie between 0 and 1, found '0.5'"),
    ({}, "give a sparsity: the share of unstructured that goes, between 0 and 1"),
    ({"pattern": "heads"}, "give a sparsity: the share of heads"),
    ({"sparsity": 0.5, "pattern": "neuron"}, "unknown pattern 'neuron': did you mean 'neurons'"),
    ({"sparsity": 0.5, "pattern": "n:m"}, "unknown pattern 'n:m'"),
    ({"sparsity": 0.5, "pattern": 24}, "unknown pattern 24"),
    ({"pattern": "2:4", "sparsity": 0.75}, "pattern '2:4' is a sparsity of 0.5, found 0.75"),
    ({"pattern": "2:4", "sparsity": "0.5"}, "'0.5'"),
    ({"pattern": "4:4"}, "pattern '4:4' must keep some, not all, of each group"),
    ({"pattern": "0:4"}, "pattern '0:4' must keep some, not all, of each group"),
    ({"sparsity": 0.5, "method": "magnitud"}, "unknown method 'magnitud': did you mean 'magnitude'"),
    ({"sparsity": 0.5, "scope": "globl"}, "unknown scope 'globl': did you mean 'global'"),
    ({"sparsity": 0.5, "method": "movement"}, "movement needs a loss, or training: give loss="),
    ({"sparsity": 0.5, "loss": loss}, "method 'magnitude' has no use for a loss"),
    ({"sparsity": 0.5, "pattern": "layers", "method": "wanda"}, "layers are chosen by 'random' or 'magnitude'"),
    ({"sparsity": 0.5, "method": "sparsegpt", "scope": "global"}, "sparsegpt compares the numbers of one layer"),
    ({"pattern": "2:4", "scope": "global"}, "every layer has its share of 2:4; give scope='layer'"),
    ({"sparsity": 0.5, "pattern": "blocks", "scope": "global"}, "every layer has its share of blocks"),
    ({"sparsity": 0.5, "pattern": "blocks", "block": 0}, "block must be 1 or more, found 0"),
    ({"sparsity": 0.5, "block": 4.0}, "block must be int, found 4.0"),
    ({"sparsity": 0.5, "seed": "1"}, "seed must be int, found '1'"),
    ({"sparsity": 0.5, "seed": True}, "seed must be int, found True"),
    ({"sparsity": 0.5, "seed": 2**70}, "seed must be an integer of 64 bits, found 1180591620717411303424"),
    ({"sparsity": 0.5, "refit": "yes"}, "refit must be bool or None, found 'yes'"),
    ({"sparsity": 0.5, "fold": 1}, "fold must be bool, found 1"),
    ({"sparsity": 0.5, "layers": "up"}, r"layers must be a list of names, found 'up'; write layers=\['name'\]"),
    ({"sparsity": 0.5, "loss": 1.0, "method": "fisher"}, "loss must be a function of the model's outputs, found 1.0"),
    ({"sparsity": 0.5, "loss": loss, "method": "sparsegpt"}, "'sparsegpt' has no use for a loss with pattern"),
    ({"sparsity": 0.5, "pattern": "layers", "refit": True}, "layers go as a whole; refit and scope are for"),
    ({"sparsity": 0.5, "pattern": "branches", "scope": "global"}, "branches go as a whole"),
    ({"sparsity": 0.5, "skip": [1]}, r"skip must be a list of names, found \[1\]"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskWeights(**options)


@pytest.mark.parametrize("option", ["layers", "skip"])
@pytest.mark.parametrize("pattern", ["unstructured", "heads", "layers"])
def test_a_name_that_no_layer_has(pattern: str, option: str) -> None:
    rewrite = MaskWeights(0.5, "random", pattern, **{option: ["quary"]})
    with pytest.raises(InputError, match=r"no layer is named 'quary'; the nearest of \d+: query, "):
        rewritten(encoder(), rewrite)


@pytest.mark.parametrize("pattern", ["unstructured", "neurons", "layers"])
@pytest.mark.parametrize("first", [Quantize(), Quantize(fold=False), IntegerOnly()], ids=str)
def test_weights_that_are_quantized_already(first: Pass, pattern: str) -> None:
    context = Context(calibration=[list(tiny.inputs().values())])
    before, _ = rewritten(encoder(), first, context)
    with pytest.raises(
        RewriteError, match=f"weights are quantized already; put mask_weights before {first.pass_name()}"
    ):
        rewritten(before, MaskWeights(0.5, "random", pattern), context)


@pytest.mark.parametrize(("pattern", "reason"), [("3:7", "16 inputs are no multiple of 7"), ("blocks", "not made of")])
def test_a_layer_that_cannot_have_a_pattern_is_named(pattern: str, reason: str) -> None:
    rewrite = MaskWeights(0.5 if pattern == "blocks" else None, pattern=pattern, block=12)
    with pytest.raises(RewriteError, match=f"query cannot have pattern '{pattern}': .*{reason}.*; name it in skip"):
        rewritten(encoder(), rewrite)


@pytest.mark.parametrize("layers", [[], ["d"]])
def test_what_needs_all_of_a_layer_is_named(layers: list[str]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(F.linear(x, m.u), (24,)), m.d)

    before = program(forward, normal(2, 8), u=MLP["u"], d=MLP["d"])
    with pytest.raises(RewriteError, match=r"no neurons that can be cut; d: layer_norm .* needs all of linear"):
        rewritten(before, MaskWeights(0.5, pattern="neurons", layers=layers))


@pytest.mark.parametrize("pattern", ["heads", "neurons", "layers", "branches"])
def test_a_model_that_has_no_such_units(pattern: str) -> None:
    before = program(lambda m, x: F.linear(x, m.u), normal(2, 8), u=MLP["u"])
    with pytest.raises(RewriteError, match=f"there are no {pattern} that can be cut"):
        rewritten(before, MaskWeights(0.5, "random", pattern))


NEEDS = [
    ({"method": "wanda"}, "method 'wanda'"),
    ({"method": "sparsegpt", "pattern": "heads"}, "method 'sparsegpt'"),
    ({"method": "fisher"}, "method 'fisher'"),
    ({"method": "movement", "loss": loss}, "method 'movement'"),
    ({"refit": True}, "refit"),
    ({"pattern": "layers"}, "how much each layer changes its input"),
]


class Untouched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model was run")


@pytest.mark.parametrize(("options", "what"), NEEDS)
def test_missing_calibration_data_are_refused_before_any_work(options: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"mask_weights.*: {what} needs calibration data; give calibration=batches"):
        fxpress.compile(Untouched().eval(), [MaskWeights(0.5, **options)], (X,))


@pytest.mark.parametrize(("options", "what"), NEEDS)
def test_missing_calibration_data_are_refused_by_the_pass_itself(options: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"{what} needs calibration data"):
        rewritten(encoder(), MaskWeights(0.5, **options))


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_methods_that_need_no_data(method: str) -> None:
    assert mask_units(method).needs_calibration is None


def test_the_text_form() -> None:
    assert parse_passes("mask_weights(0.5, wanda)")[-1] == MaskWeights(0.5, "wanda")
    found = parse_passes("mask_weights(pattern='2:4', layers=['up', 'down'])")[-1]
    assert found == MaskWeights(pattern="2:4", layers=["up", "down"])


def test_the_text_form_without_data() -> None:
    with pytest.raises(InputError, match=r"pass mask_weights.*method 'wanda' needs calibration data"):
        fxpress.compile(Untouched().eval(), "mask_weights(0.5, wanda)", (X,))


@pytest.mark.slow
def test_the_text_form_is_compiled() -> None:
    compiled = fxpress.compile(
        tiny.encoder(), "mask_weights(0.5, wanda)", tiny.inputs(), backend="eager", calibration=[tiny.inputs(3, 9)]
    )
    assert float((compiled.program.module.up.weight == 0).float().mean()) == 0.5
