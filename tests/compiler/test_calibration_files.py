"""Calibration data from files: texts through a tokenizer, tensors by name, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from build import normal
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from fxpress.compiler.calibration_files import ROWS, read
from fxpress.compiler.hf import example_inputs
from fxpress.ir.errors import InputError

WORDS = ("[UNK]", "[PAD]", "a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of three words, as transformers saves it."""
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace("#", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(made)
    return made


def model(vocabulary: int = 5, longest: int = 6) -> transformers.PreTrainedModel:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=longest,
        )
    )  # fmt: skip


def text_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_texts_are_padded_to_the_longest_of_their_batch(folder: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "x.txt", "a b c", "", "  b  ", "d a")
    found = read(file).batches(folder, model(), example_inputs(model()))
    (batch,) = found.batches
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert (batch["input_ids"] * batch["attention_mask"]).tolist() == [[2, 3, 4], [3, 0, 0], [0, 2, 0]]
    assert found.summary == "3 texts; 6 tokens in batches of 3"


def test_a_line_is_a_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffa b\u2028c\r\nb\x0cc\r\n".encode())
    assert read(tmp_path / "x.txt").texts == ["a b\u2028c", "b\x0cc"]


def test_texts_are_cut_to_what_the_model_takes(folder: Path, tmp_path: Path) -> None:
    found = read(text_file(tmp_path / "x.txt", "a " * 9, "b " * 6)).batches(folder, model(), example_inputs(model()))
    assert found.batches[0]["input_ids"].shape == (2, 6)
    assert "1 of them cut to 6 tokens" in found.summary


def test_batches_have_sixteen_rows_and_the_last_what_is_left(folder: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "x.txt", *["a b"] * (ROWS + 1))
    found = read(file).batches(folder, model(), example_inputs(model()))
    assert [len(batch["input_ids"]) for batch in found.batches] == [ROWS, 1]


def test_tensors_are_cut_along_their_first_axis(folder: Path, tmp_path: Path) -> None:
    given = {"x": normal(ROWS + 2, 3), "y": torch.arange(ROWS + 2)}
    save_file(given, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors").batches(folder, model(), {"y": torch.zeros(2), "x": torch.zeros(2, 3)})
    assert [list(batch) for batch in found.batches] == [["y", "x"]] * 2
    assert all(torch.equal(torch.cat([batch[name] for batch in found.batches]), given[name]) for name in given)


def tensors(**given: Tensor) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        save_file(given, place / "x.safetensors")
        return place / "x.safetensors"

    return write


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        (place / name).write_bytes(data)
        return place / name

    return write


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda place: place / "none.txt", "there is no file '.*none.txt'"),
    "a folder": (lambda place: place / "..txt" if (place / "..txt").mkdir() is None else place, "there is no file"),
    "another kind": (raw("x.csv", b"a"), "must end in .txt or .safetensors, found '.*x.csv'"),
    "pickled": (raw("x.pt", b"a"), "must end in .txt or .safetensors"),
    "nothing in it": (raw("x.txt", b""), "has no text; give one a line"),
    "blank lines": (raw("x.txt", b"\n  \n"), "has no text; give one a line"),
    "no UTF-8": (raw("x.txt", b"\xff\xfe\x00"), "cannot read '.*x.txt': .*utf-8"),
    "truncated": (raw("x.safetensors", b"\x00\x01"), "cannot read '.*x.safetensors'"),
    "no tensors": (tensors(), "holds no tensor; give one for each input"),
    "no samples": (tensors(x=torch.zeros(0, 3)), r"'x' has no samples: shape \[0, 3\]"),
    "a single number": (tensors(x=torch.tensor(1.0)), r"'x' has no samples: shape \[\]"),
    "NaN": (tensors(x=torch.tensor([1.0, torch.nan])), "'x' has NaN or infinity"),
    "infinity": (tensors(x=torch.tensor([1.0, torch.inf])), "'x' has NaN or infinity"),
    "unequal counts": (tensors(x=torch.ones(2), y=torch.ones(3)), "{'x': 2, 'y': 3} samples, expected equally many"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_calibrated_on_is_refused_before_the_model_is_loaded(case: str, tmp_path: Path) -> None:
    write, problem = UNREADABLE[case]
    with pytest.raises(InputError, match=problem):
        read(write(tmp_path))


def test_tensors_of_other_names_are_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds ids; the model reads attention_mask, input_ids"):
        read(tmp_path / "x.safetensors").batches(folder, model(), example_inputs(model()))


def test_texts_are_refused_where_the_model_reads_more(folder: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "x.txt", "a")
    with pytest.raises(InputError, match="the model reads pixel_values, which no text gives"):
        read(file).batches(folder, model(), {"pixel_values": normal(2, 3, 8, 8)})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    file = text_file(tmp_path / "x.txt", "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no tokenizer that loads"):
        read(file).batches(tmp_path / "empty", model(), example_inputs(model()))


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "x.txt", "a b c")
    with pytest.raises(InputError, match="has numbers up to 4, the model's vocabulary has 4: it is another model's"):
        read(file).batches(folder, model(vocabulary=4), example_inputs(model()))


def test_a_text_of_no_token_is_refused(folder: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "x.txt", "a", "#")
    with pytest.raises(InputError, match="the tokenizer makes nothing of"):
        read(file).batches(folder, model(), example_inputs(model()))
