"""The picture of what pruning left: which cell a layer has, what is written in it, and what cannot be drawn."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny

from fxpress import compile
from fxpress.compiler import heatmap
from fxpress.compiler.report import PassReport, Report
from fxpress.ir.errors import InputError

PARTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BERT = {f"encoder.layer.{block}.{part}": (block + 1) / 20 for block in range(12) for part in PARTS}


def report(*passes: Mapping[str, float]) -> Report:
    """Of passes that left these shares of zeros."""
    found = Report("BertModel", "onnx")
    for shares in passes:
        layers = [
            {"layer": name, "numbers": 1000, "zeros": round(1000 * share), "sqnr_db": None}
            for name, share in shares.items()
        ]
        found.passes.append(PassReport("mask_weights", 1, {}, [], 0.1, None, sparsity=layers))
    return found


def drawn(shares: Mapping[str, float]) -> tuple[list[str], list[str], dict[tuple[int, int], str]]:
    """Labels of the rows and columns, and the text of each cell."""
    axes = heatmap.draw(dict(shares), "BertModel").axes[0]
    rows, columns = ([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis))
    return rows, columns, {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}


# --- the picture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "row", "column"),
    [
        ("encoder.layer.0.attention.self.query", "encoder.layer.0", "attention.self.query"),
        ("transformer.h.11.mlp.c_fc", "transformer.h.11", "mlp.c_fc"),
        ("decoder.block.3.layer.1.EncDecAttention.q", "decoder.block.3", "layer.1.EncDecAttention.q"),
        ("pooler.dense", "pooler.dense", heatmap.ALONE),
        ("fc2", "fc2", heatmap.ALONE),
        ("layers.4", "layers.4", heatmap.ALONE),  # nn.Sequential: the number is the layer itself
    ],
)
def test_the_cell_of_a_layer(layer: str, row: str, column: str) -> None:
    assert heatmap.place(layer) == (row, column)


def test_blocks_are_rows_and_their_parts_columns() -> None:
    rows, columns, cells = drawn({**BERT, "pooler.dense": 1.0})
    assert rows == [*(f"encoder.layer.{block}" for block in range(12)), "pooler.dense"]
    assert columns == [*PARTS, heatmap.ALONE]
    assert len(cells) == 12 * 6 + 1  # each layer once; nothing where there is none
    assert (cells[0, 0], cells[11, 5], cells[12, 6]) == ("5.0%", "60.0%", "100.0%")


def test_a_model_without_numbers_is_one_column() -> None:
    rows, columns, cells = drawn({"query": 0.5, "up": 0.123, "down": 0.0})
    assert (rows, columns) == (["query", "up", "down"], [""])
    assert cells == {(0, 0): "50.0%", (1, 0): "12.3%", (2, 0): "0.0%"}


def test_the_parts_of_encoder_and_decoder_may_differ() -> None:
    names = ("encoder.block.0.layer.1.wi", "decoder.block.0.layer.1.q", "decoder.block.0.layer.2.wi", "lm_head")
    _, columns, cells = drawn(dict.fromkeys(names, 0.5))
    assert columns == ["layer.1.wi", "layer.1.q", "layer.2.wi", heatmap.ALONE]
    assert sorted(cells) == [(0, 0), (1, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("layers", [1, 40])
def test_labels_do_not_overlap(layers: int) -> None:
    figure = heatmap.draw({f"model.layers.{block}.{part}": 1.0 for block in range(layers) for part in PARTS}, "M")
    figure.canvas.draw()
    axes = figure.axes[0]
    rows = sorted(label.get_window_extent().y0 for label in axes.get_yticklabels())
    height = axes.get_yticklabels()[0].get_window_extent().height
    assert all(b - a > height for a, b in pairwise(rows))
    cells = [text.get_window_extent() for text in axes.texts]
    width = cells[1].x0 - cells[0].x0
    assert all(cell.width < width for cell in cells)  # "100.0%", the widest


def test_of_two_passes_the_last_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    original = heatmap.draw
    monkeypatch.setattr(heatmap, "draw", lambda shares, title: seen.update(shares) or original(shares, title))
    report({"up": 0.5, "down": 0.5}, {"up": 0.75}).save_heatmap(tmp_path / "map.png")
    assert seen == {"up": 0.75, "down": 0.5}


@pytest.mark.parametrize("name", ["$x^{$", "a_b", "[red]", "<b>&"])
def test_names_are_written_as_they_are(name: str, tmp_path: Path) -> None:
    report({name: 0.5, f"h.0.{name}": 0.5}).save_heatmap(tmp_path / "map.svg")
    assert drawn({name: 0.5})[0] == [name]


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_suffix_decides(suffix: str, head: bytes, tmp_path: Path) -> None:
    report(BERT).save_heatmap(tmp_path / f"map.{suffix}")
    assert (tmp_path / f"map.{suffix}").read_bytes().startswith(head)
    assert [file.name for file in tmp_path.iterdir()] == [f"map.{suffix}"]


def test_of_a_compiled_model(tmp_path: Path) -> None:
    compiled = compile(tiny.bert(), "mask_weights(0.5, random)", tiny.text(), backend="eager", verify=False)
    shares = {item["layer"]: item["zeros"] / item["numbers"] for item in compiled.report.passes[-1].sparsity}
    rows, columns, _ = drawn(shares)
    assert rows == ["encoder.layer.0", "pooler.dense"] and columns == [*PARTS, heatmap.ALONE]
    compiled.report.save_heatmap(str(tmp_path / "map.png"))


def test_of_a_report_that_was_read(tmp_path: Path) -> None:
    Report.from_dict(report(BERT).as_dict()).save_heatmap(tmp_path / "map.png")


def test_a_picture_that_would_be_huge_has_fewer_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "_MOST_DOTS", 300)
    report(BERT).save_heatmap(tmp_path / "map.png")
    header = (tmp_path / "map.png").read_bytes()[16:24]
    width, height = (int.from_bytes(header[place : place + 4], "big") for place in (0, 4))
    assert 250 < max(width, height) < 350


ALONE = """
import sys
from pathlib import Path
from fxpress.compiler.report import PassReport, Report
item = PassReport("mask", 1, {}, [], 0.1, None, sparsity=[{"layer": "up", "numbers": 2, "zeros": 1, "sqnr_db": None}])
Report("M", "onnx", passes=[item]).save_heatmap(Path(sys.argv[1]))
print("torch" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""


def test_neither_torch_nor_the_state_of_pyplot_is_needed(tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "tkagg", "DISPLAY": ""}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "map.png")],
        env=environment, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, ["False", "False"]), done.stderr


# --- what cannot be drawn --------------------------------------------------------------------------------------------


def _existing(place: Path) -> Path:
    (place / "map.png").write_text("mine")
    return place / "map.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: place / "map.pdf", r"must end in \.png or \.svg, found '.*map\.pdf'"),
        (lambda place: place / "map", r"must end in \.png or \.svg"),
        (_existing, "exists already"),
        (lambda place: place / "missing" / "map.png", "is no directory"),
        (lambda place: place / "a\0.png", "NUL"),
    ],
)
def test_a_bad_path_is_refused_before_any_work(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(*given: Any) -> Any:
        raise AssertionError("work was done")

    monkeypatch.setattr(heatmap, "draw", drawing)
    path = make(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        report(BERT).save_heatmap(path)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_report_without_pruning(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pass says which weights it pruned; compile with mask_weights"):
        report({}).save_heatmap(tmp_path / "map.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install 'fxpress\[plot\]'"):
        report(BERT).save_heatmap(tmp_path / "map.png")


def test_a_drawing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(figure: Figure, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(InputError, match=r"cannot write .*map\.png.*No space left on device"):
        report(BERT).save_heatmap(tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_dropped_layers_are_drawn_as_gone(tmp_path: Path) -> None:
    compiled = compile(tiny.encoder(), "mask_weights(0.5, random, branches)", tiny.inputs(), backend="eager")
    assert {item["zeros"] / item["numbers"] for item in compiled.report.passes[-1].sparsity} == {0.0, 1.0}
    compiled.report.save_heatmap(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size > 0
