"""Options of ReplaceAttention and of every kind: what is no such option, what they need, and their text form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import integers
import pytest
import torch
from build import normal, rewritten
from sites import BITING
from torch import Tensor, nn

import fxpress
from fxpress.compiler.pipeline import parse_passes
from fxpress.ir.errors import InputError
from fxpress.ir.graph import Program
from fxpress.ir.replacement.kind import Kind
from fxpress.ir.replacement.kinds.graph import Graph
from fxpress.ir.rewrite import Context
from fxpress.passes import ReplaceAttention

X = normal(2, 5, 12)
NEEDS_DATA = {"linear": "features that are fitted", "depthwise_conv": "taps from the mean attention at each distance"}
NAMES = tuple(BITING)


@functools.cache
def encoder() -> Program:
    """Two layers, canonical; not to be changed."""
    return integers.canonical(integers.Encoder())


# --- bad options -----------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("nystrm", {}, "unknown kind of attention 'nystrm': did you mean 'nystrom'\\? \\(valid: "),
    (["exact", "slidingwindow"], {"layers": "auto"}, "unknown kind .* 'slidingwindow': did you mean 'sliding_window'"),
    ("nystrom", {"landmark": 8}, "unknown option 'landmark' of nystrom: did you mean 'landmarks'"),
    ("exact", {"window": 8}, "unknown option 'window' of exact: it has none"),
    (["nystrom", "lsh"], {"layers": "auto", "rank": 2}, "unknown option 'rank' of nystrom, lsh: .*valid: buckets, ch"),
    (["nystrom", "lsh"], {}, "several kinds of attention need layers='auto', which chooses among them"),
    ([], {"layers": "auto"}, "kind must be the name of a kind of attention, or several"),
    ("nystrom", {"layers": "layers.0"}, "layers must be a list of names and numbers, found 'layers.0'"),
    ("nystrom", {"layers": [1.0]}, r"layers must be a list of names and numbers, found \(1.0,\)"),
    ("nystrom", {"layers": [True]}, r"layers must be a list of names and numbers, found \(True,\)"),
    ("nystrom", {"skip": "layers.0"}, "skip must be a list of names and numbers, found 'layers.0'"),
    ("nystrom", {"skip": 1}, "skip must be a list of names and numbers, found 1"),
    ("nystrom", {"force": 1}, "force must be True or False, found 1"),
    ("nystrom", {"min_cosine": 0.9}, "min_cosine is a budget of layers='auto'; give that, or leave it out"),
    ("nystrom", {"speedup": 2, "layers": [0]}, "speedup is a budget of layers='auto'"),
    ("nystrom", {"layers": "auto", "min_cosine": 1}, "min_cosine must lie between 0 and 1, found 1"),
    ("nystrom", {"layers": "auto", "min_cosine": 0}, "min_cosine must lie between 0 and 1, found 0"),
    ("nystrom", {"layers": "auto", "min_cosine": float("nan")}, "min_cosine must be a number, found nan"),
    ("nystrom", {"layers": "auto", "min_cosine": True}, "min_cosine must be a number, found True"),
    ("nystrom", {"layers": "auto", "min_cosine": "0.9"}, "min_cosine must be a number, found '0.9'"),
    ("nystrom", {"layers": "auto", "min_sqnr_db": "20"}, "min_sqnr_db must be a number, found '20'"),
    ("nystrom", {"layers": "auto", "min_sqnr_db": -1e5}, "min_sqnr_db must lie between -1000 and 1000, found -100000"),
    ("lsh", {"seed": 2**70}, "seed must be an integer of 64 bits, found 1180591620717411303424"),
    ("nystrom", {"layers": "auto", "speedup": [2]}, r"speedup must be a number, found \[2\]"),
    ("nystrom", {"layers": "auto", "speedup": 1}, "speedup must be more than 1, found 1"),
    ("nystrom", {"layers": "auto", "speedup": 2, "min_cosine": 0.9}, "give one budget, found min_cosine and speedup"),
    ("nystrom", {"layers": "auto", "min_sqnr_db": 9, "min_cosine": 0.9}, "give one budget, found min_cosine and min_s"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_a_bad_option(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReplaceAttention(kind, **options)


# Of each kind's option that is a number: the least that it may be.
LEAST = {
    "sliding_window": {"window": 1, "global_tokens": 0, "dilation": 1},
    "dynamic_sparse": {"block": 1, "top_k": 0},
    "random_sparse": {"block": 1, "window": 1, "global_blocks": 0, "random_blocks": 0, "seed": 0},
    "graph": {"degree": 0, "hubs": 0, "block": 1, "seed": 0},
    "linformer": {"rank": 1, "steps": 0},
    "performer": {"features": 0, "seed": 0},
    "nystrom": {"landmarks": 1, "iterations": 1},
    "linear": {"features": 1, "window": 0, "steps": 0, "seed": 0},
    "lsh": {"chunk": 1, "rounds": 1, "buckets": 2, "seed": 0},
    "depthwise_conv": {"kernel": 1, "steps": 0},
    "exact": {},
}
OTHER = {
    "dynamic_sparse": {"mass", "similarity", "per_query"},
    "graph": {"topology", "adjacency"},
    "linformer": {"projection"},
    "depthwise_conv": {"dynamic", "min_mass"},
}
NUMBERS = [(name, option, least) for name, options in LEAST.items() for option, least in options.items()]


def test_every_option_of_every_kind_is_tested() -> None:
    for name, (kind, *_) in BITING.items():
        assert {entry.name for entry in dataclasses.fields(kind)} == {*LEAST[name], *OTHER.get(name, ())}


@pytest.mark.parametrize(("name", "option", "least"), NUMBERS)
def test_an_option_that_is_no_such_number(name: str, option: str, least: int) -> None:
    for value in (least - 1, 2.0, "2", True, None):
        with pytest.raises(InputError) as error:
            ReplaceAttention(name, **{option: value})
        assert str(error.value) == f"{option} must be an integer, {least} or more, found {value!r}"


@pytest.mark.parametrize(("name", "option", "least"), NUMBERS)
def test_the_least_that_an_option_may_be(name: str, option: str, least: int) -> None:
    ReplaceAttention(name, **{option: least})


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    *[
        ("dynamic_sparse", {option: value}, f"{option} must lie between {low} and 1, found {value!r}")
        for option, low in (("mass", 0), ("similarity", -1))
        for value in (low - 0.5, 1.5, float("nan"), "0.5", True)
    ],
    ("dynamic_sparse", {"mass": 0.5, "top_k": 3}, "give top_k or mass, not both"),
    ("dynamic_sparse", {"per_query": 1}, "per_query must be True or False, found 1"),
    ("graph", {"topology": "ring"}, "topology must be 'star', 'expander' or 'adjacency', found 'ring'"),
    ("graph", {"degree": 3}, "degree must be even, half of it on each side, found 3"),
    ("graph", {"topology": "adjacency"}, "topology 'adjacency' goes with an adjacency matrix, the others without"),
    ("graph", {"adjacency": [[1]]}, "topology 'adjacency' goes with an adjacency matrix, the others without"),
    *[
        ("graph", {"topology": "adjacency", "adjacency": value}, "adjacency must be a square matrix")
        for value in ([[1, 0]], [1], 3, [[1], [1, 0]], [["a"]], [], torch.zeros(0, 0))
    ],
    ("linformer", {"projection": "fit"}, "projection must be 'segments' or 'fitted', found 'fit'"),
    ("depthwise_conv", {"dynamic": 1}, "dynamic must be True or False, found 1"),
    *[
        ("depthwise_conv", {"min_mass": value}, f"min_mass must lie between 0 and 1, found {value!r}")
        for value in (-0.1, 1.1, float("nan"), "0.5", True)
    ],
]


@pytest.mark.parametrize(("name", "options", "message"), OTHERS)
def test_another_bad_option_of_a_kind(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReplaceAttention(name, **options)


@pytest.mark.parametrize("option", ["layers", "skip"])
def test_a_name_that_no_attention_has(option: str) -> None:
    with pytest.raises(InputError, match=r"no attention is 'layer\.0'; there are 2, as layers\.[01], layers\.[01]"):
        rewritten(encoder(), ReplaceAttention("nystrom", **{option: ["layers.1", "layer.0"]}))


@pytest.mark.parametrize("number", [2, -1])
def test_a_number_that_no_attention_has(number: int) -> None:
    with pytest.raises(InputError, match=f"no attention is {number}; there are 2"):
        rewritten(encoder(), ReplaceAttention("nystrom", layers=[number]))


# --- what is needed --------------------------------------------------------------------------------------------

NEEDS = [
    *[(name, {}, what) for name, what in NEEDS_DATA.items()],
    ("linformer", {"projection": "fitted"}, "projection 'fitted'"),
    ("nystrom", {"layers": "auto"}, "layers='auto'"),
]


class Untouched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model was run")


@pytest.mark.parametrize(("name", "options", "what"), NEEDS)
def test_missing_calibration_data_are_refused_before_any_work(name: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"{what} needs calibration data; give calibration=batches"):
        fxpress.compile(Untouched().eval(), [ReplaceAttention(name, **options)], (X,))


@pytest.mark.parametrize(("name", "options", "what"), NEEDS)
def test_missing_calibration_data_are_refused_by_the_pass_itself(name: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"{what} needs calibration data"):
        rewritten(encoder(), ReplaceAttention(name, **options))


@pytest.mark.parametrize("name", sorted({*NAMES} - {*NEEDS_DATA}))
def test_kinds_that_need_no_data(name: str) -> None:
    assert ReplaceAttention(name).needs_calibration is None


def test_features_that_are_not_fitted_need_no_data() -> None:
    assert ReplaceAttention("linear", steps=0).needs_calibration is None


def test_speed_needs_a_clock() -> None:
    context = Context(calibration=[integers.batch()])
    with pytest.raises(InputError, match="speedup needs a backend that can be measured; compile with backend='onnx'"):
        rewritten(encoder(), ReplaceAttention("nystrom", layers="auto", speedup=2), context)


# --- the text form ---------------------------------------------------------------------------------------------

TEXTS = {
    "replace_attention(nystrom)": ReplaceAttention("nystrom"),
    "replace_attention(nystrom, landmarks=8, layers=[0])": ReplaceAttention("nystrom", layers=[0], landmarks=8),
    "replace_attention(lsh, all, ['encoder.*', 2], chunk=32)": ReplaceAttention("lsh", skip=["encoder.*", 2], chunk=32),
    "replace_attention(sliding_window, layers=auto, min_sqnr_db=20, force=True)": ReplaceAttention(
        "sliding_window", layers="auto", min_sqnr_db=20, force=True
    ),
    "replace_attention(['nystrom', 'lsh'], layers=auto, chunk=8)": ReplaceAttention(
        ["nystrom", "lsh"], layers="auto", chunk=8
    ),
    "replace_attention(graph, topology=expander)": ReplaceAttention("graph", topology="expander"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_form(text: str) -> None:
    found = parse_passes(text)[-1]
    assert found == TEXTS[text]
    assert parse_passes(str(found))[-1] == found


KINDS_OF_TEXT = [kind for kinds in BITING.values() for kind in kinds if not isinstance(kind, Graph)]


@pytest.mark.parametrize("kind", KINDS_OF_TEXT, ids=str)
def test_what_a_pass_is_written_as_can_be_read(kind: Kind) -> None:
    own = {entry.name: getattr(kind, entry.name) for entry in dataclasses.fields(kind)}
    given = ReplaceAttention(kind.kind_name(), layers=["a.b", 3], skip=("c",), force=True, **own)
    (read,) = parse_passes(str(given))[1:]
    assert read == given and isinstance(read, ReplaceAttention) and read.kinds() == [kind]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replace_attention(nystrm)", "did you mean 'nystrom'"),
        ("replace_attention(nystrom, landmark=8)", "unknown option 'landmark' of nystrom: did you mean 'landmarks'"),
        ("replace_attention(nystrom, landmarks=0)", "landmarks must be an integer, 1 or more, found 0"),
        ("replace_attention(nystrom, options={'landmarks': 8})", "unknown option 'options' of nystrom"),
        ("replace_attention(nystrom, layers=auto, min_cosine=2)", "min_cosine must lie between 0 and 1"),
    ],
)
def test_a_bad_text(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_passes(text)


def test_the_text_form_without_data() -> None:
    with pytest.raises(InputError, match=r"pass replace_attention\('linear'\): features .* needs calibration data"):
        fxpress.compile(Untouched().eval(), "replace_attention(linear)", (X,))


@pytest.mark.slow
def test_the_text_form_is_compiled() -> None:
    x, mask = integers.batch()
    model = integers.Encoder(layers=1).eval()
    compiled = fxpress.compile(
        model, "replace_attention(nystrom, landmarks=64)", {"x": x, "mask": mask}, backend="eager"
    )
    torch.testing.assert_close(compiled(x=x, mask=mask)[mask], model(x, mask)[mask], rtol=1e-4, atol=1e-5)
