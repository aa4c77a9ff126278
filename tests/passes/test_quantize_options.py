"""Quantize's options: what is refused before any work, what they need, and how they are printed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from build import normal, program, rewritten
from torch import nn

import fxpress
from fxpress.ir.errors import InputError, RewriteError
from fxpress.ir.rewrite import Context
from fxpress.passes import Quantize

BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": "int9"}, "unknown weights 'int9': did you mean 'int"),
    ({"weights": None}, "unknown weights None"),
    ({"activations": "int4"}, "unknown activations 'int4': did you mean 'int8'"),
    ({"mode": "dynamics"}, "unknown mode 'dynamics': did you mean 'dynamic'"),
    ({"granularity": "tokens"}, "unknown granularity 'tokens': did you mean 'token'"),
    ({"granularity": "channel"}, "unknown granularity 'channel'.*valid: auto, tensor, token"),
    ({"method": "smoothquand"}, "unknown method 'smoothquand': did you mean 'smoothquant'"),
    ({"method": "gptq+minmux"}, "unknown method 'minmux': did you mean 'minmax'"),
    ({"embeddings": "int2"}, "unknown embeddings 'int2': did you mean 'int8'"),
    ({"sensitive": "autos"}, "unknown sensitive 'autos': did you mean 'auto'"),
    ({"skip": "head"}, r"skip must be a list of names, found 'head'; write skip=\['name'\]"),
    ({"skip": [3]}, r"skip must be a list of names, found \[3\]"),
    ({"weights": ["int8"]}, r"unknown weights \['int8'\]"),
    ({"method": 3}, "method must be str, found 3"),
    ({"fold": "yes"}, "fold must be bool, found 'yes'"),
    ({"symmetric": "x"}, "symmetric must be bool or None, found 'x'"),
    ({"group_size": "32"}, "group_size must be int or None, found '32'"),
    ({"min_cosine": "0.9"}, "min_cosine must be float or int or None, found '0.9'"),
    ({"mode": "dynamic", "method": "entropy"}, "'entropy' is a static range of activations; give mode='static'"),
    ({"mode": "static", "method": "mse+entropy"}, "two kinds of range, 'mse' and 'entropy'"),
    ({"activations": None, "method": "smoothquant"}, "'smoothquant' is for activations of 8 bits"),
    ({"method": "awq"}, "'awq' is for weights alone"),
    ({"group_size": 33, "activations": None}, "group_size must be a power of two of 16 or more, found 33"),
    ({"group_size": 8, "activations": None}, "group_size must be a power of two of 16 or more, found 8"),
    ({"group_size": -32, "activations": None}, "group_size must be a power of two of 16 or more, found -32"),
    ({"group_size": 32}, "activations=None for a group_size"),
    ({"weights": "int4", "activations": "float8_e4m3"}, "activations are float8_e4m3, weights int4: give both alike"),
    ({"weights": "int4", "activations": "int8", "method": "awq"}, "'awq' is for weights alone"),
    ({"mode": "static", "granularity": "token"}, "granularity='tensor' or mode='dynamic'"),
    ({"min_cosine": 0.99, "min_sqnr_db": 20}, "one of min_cosine, min_sqnr_db and metric"),
    ({"min_cosine": 1.5}, "min_cosine must lie between 0 and 1, found 1.5"),
    ({"min_cosine": 0.0}, "min_cosine must lie between 0 and 1, found 0.0"),
    ({"min_cosine": 0.9, "sensitive": None}, "a target needs sensitive='auto'"),
    ({"min_sqnr_db": -1e5}, "min_sqnr_db must lie between -1000 and 1000, found -100000"),
    ({"min_sqnr_db": math.nan}, "min_sqnr_db must lie between -1000 and 1000, found nan"),
    ({"metric": 0.9}, "metric must be a function of .*, found 0.9"),
    ({"metric": max, "min_metric": "a"}, "min_metric must be float or int or None, found 'a'"),
    ({"min_metric": 0.9}, "min_metric is what a metric is to reach; give metric too"),
    ({"method": "auto+gptq"}, r"method 'auto' chooses all words itself, found 'auto\+gptq'; leave 'auto' out"),
    ({"mode": "static", "weights": "int4"}, "static ranges are of activations, which stay floats; leave mode out"),
    ({"mode": "static", "activations": None}, "static ranges are of activations, which stay floats; leave mode out"),
    ({"granularity": "tensor", "symmetric": True}, "dynamic ranges of a whole tensor have a zero point"),
]


@pytest.mark.parametrize(("options", "problem"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_are_an_error(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Quantize(**options)


def test_a_batch_that_no_statistics_can_be_taken_from_is_named_by_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    batches = [(torch.full((2, 4), 1e38),)]
    with pytest.raises(RewriteError, match=r"calibration fails at .*; look for a batch that causes it"):
        fxpress.compile(model, "quantize", (normal(2, 4),), calibration=batches, backend="eager", verify=False)


def test_an_embedding_of_a_weight_at_the_top_of_a_model() -> None:
    ids = torch.arange(6).reshape(2, 3)
    traced = program(lambda m, i: F.embedding(i, m.w), ids, w=normal(20, 8))
    _, result = rewritten(traced, Quantize())
    assert result.rewrites["embedding"] == 1


def test_an_unknown_option_in_a_text_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown option 'weight' of pass 'quantize': did you mean 'weights'"):
        fxpress.compile(nn.Linear(2, 2).eval(), "quantize(weight=int8)", (normal(1, 2),))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "static"}, "static ranges of activations"),
        ({"min_cosine": 0.99}, "a target for the outputs"),
        ({"min_sqnr_db": 20.0}, "a target for the outputs"),
        ({"metric": max}, "a target for the outputs"),
        ({"method": "gptq"}, "method 'gptq'"),
        ({"method": "minmax+smoothquant"}, "method 'smoothquant'"),
    ],
    ids=str,
)
def test_missing_calibration_data_is_an_error(options: dict[str, Any], reason: str) -> None:
    layer = program(lambda m, x: F.linear(x, m.w), normal(2, 8), w=normal(4, 8))
    with pytest.raises(InputError, match=f"{reason} needs calibration data; give compile\\(\\) calibration=batches"):
        Quantize(**options).apply(layer, Context())


def test_defaults_need_no_calibration_data() -> None:
    assert Quantize().needs_calibration is None


def test_the_pass_is_printed_with_what_was_given() -> None:
    assert str(Quantize()) == "quantize"
    assert str(Quantize(weights="int4", skip=["head"])) == "quantize(weights='int4', skip=['head'])"
