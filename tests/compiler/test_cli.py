"""The command line: one line and an exit status for bad input, no traceback, and what each command prints."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpress.compiler.hf import example_inputs, load_model
from fxpress.ir.errors import ArtifactError, InputError


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`fxpress ARGUMENTS` in a process of its own, on a wide terminal's width."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "COLUMNS": "200"}
    code = "from fxpress.compiler.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


ONE_BY_ONE = """
import contextlib, io, json, os, sys
from fxpress.compiler.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fxpress", *arguments]
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    done.append({"status": status, "out": out.getvalue(), "errors": errors.getvalue(), "files": sorted(os.listdir())})
print(json.dumps(done))
"""


def run_one_by_one(lines: Sequence[Sequence[object]], cwd: Path) -> list[dict[str, Any]]:
    """Several command lines in one process, as importing takes most of the time: what each printed and left."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd.parent / "cache"), "COLUMNS": "200"}
    texts = [[str(argument) for argument in line] for line in lines]
    done = subprocess.run(
        [sys.executable, "-P", "-c", ONE_BY_ONE, json.dumps(texts)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # a traceback, or a word that no command's output holds
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, saved as transformers does."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


HEATMAP = ["compile", "empty", "-o", "out", "--passes", "mask_weights(0.5)", "--heatmap"]
STATIC = ["compile", "empty", "-o", "out", "--passes", "quantize(mode=static)"]
BAD = {
    "no such folder": (["compile", "nowhere", "-o", "out"], "'nowhere' is no directory"),
    "a folder that is no model": (["compile", "empty", "-o", "out"], "is no model: it has no config.json"),
    "an output that exists": (["compile", "empty", "-o", "empty"], "'empty' exists already"),
    "an output without a parent": (["compile", "empty", "-o", "a/b"], "'a' is no directory"),
    "an unknown pass": (["compile", "empty", "-o", "out", "--passes", "fuze"], "did you mean 'fuse'?"),
    "an unknown option": (["compile", "empty", "-o", "out", "--passes", "fuse(x=1)"], "unknown option 'x'"),
    "passes that cannot be read": (["compile", "empty", "-o", "out", "--passes", "fuse("], "cannot read the passes"),
    "a heatmap of another kind": ([*HEATMAP, "map.pdf"], "a heatmap must end in .png or .svg, found 'map.pdf'"),
    "a heatmap without a parent": ([*HEATMAP, "a/map.png"], "'a' is no directory"),
    "a heatmap in place of the model": ([*HEATMAP, "x.png", "-o", "x.png"], "--heatmap and --output are both 'x.png'"),
    "a heatmap without pruning": (["compile", "empty", "-o", "out", "--heatmap", "map.png"], "give --passes with mask"),
    "a pass without the data it needs": ([*STATIC], "ranges of activations needs calibration data; give --calibration"),
    "no such data": ([*STATIC, "--calibration", "none.txt"], "there is no file 'none.txt'"),
    "no such data to inspect with": (
        ["inspect", "empty", *STATIC[4:], "--calibration", "none.safetensors"],
        "there is no file 'none.safetensors'",
    ),
    "data of another kind": ([*STATIC, "--calibration", "x.csv"], "must end in .txt or .safetensors, found 'x.csv'"),
    "data that nothing reads": (["compile", "empty", "-o", "out", "--calibration", "x.txt"], "is for passes that fit"),
    "an unknown backend": (["compile", "empty", "-o", "out", "--backend", "onix"], "is onnx or openvino, found 'onix'"),
    "a dtype of no use": (
        ["compile", "empty", "-o", "out", "--dtype", "bfloat16"],
        "--dtype is for --backend openvino",
    ),
    "an unknown pass to explain": (["inspect", "empty", "--explain", "fuze"], "did you mean 'fuse'?"),
    "a pass to explain that does not run": (
        ["inspect", "empty", "--explain", "quantize"],
        "--explain quantize: that pass does not run; name it in --passes, too",
    ),
    "an unknown family": (["families", "brt"], "did you mean 'bert'?"),
    "a survey's file without a survey": (["families", "bert", "--write", "x.md"], "--write is for every family"),
    "a survey gone on with without one": (["families", "bert", "--resume"], "--resume is for every family"),
    "a survey for the short table": (["families", "--all", "--write-readme"], "--write-readme is for the table of a"),
    "an unknown family of the survey": (["families", "--all", "llamma"], "did you mean 'llama'?"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each bad command line, in a folder that holds an empty one."""
    folder = tmp_path_factory.mktemp("bad") / "work"
    (folder / "empty").mkdir(parents=True)
    return dict(zip(BAD, run_one_by_one([arguments for arguments, _ in BAD.values()], folder), strict=True))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, refused: dict[str, dict[str, Any]]) -> None:
    done = refused[case]
    assert done["status"] == 2
    assert BAD[case][1] in done["errors"]
    assert done["errors"].count("\n") == 1
    assert done["files"] == ["empty"]


def test_damaged_weights_are_one_line_and_status_2(model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    (copy / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:1000])
    done = run("compile", copy, "-o", tmp_path / "out", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_in_the_file_are_not_made_up(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ArtifactError, match=r"lack 16 of BertModel, encoder\.layer\.1\.attention"):
        load_model(copy)


def test_a_config_that_is_none_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": "32"}))
    with pytest.raises(ArtifactError, match=r"cannot load the model in '.*': .*hidden_size"):
        load_model(copy)


@pytest.mark.parametrize(("length", "padding"), [(1, 0), (2, 0), (3, 1), (16, 5)])
def test_the_example_has_tokens_in_every_row(length: int, padding: int, model_dir: Path) -> None:
    mask = example_inputs(load_model(model_dir), 2, length)["attention_mask"]
    assert (mask == 0).sum(1).tolist() == [0, padding]


def test_an_example_of_unknown_sizes_is_refused() -> None:
    import transformers

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 60}
    model = transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig(**sizes))
    with pytest.raises(InputError, match="main input is 'input_features'; give example inputs through the Python API"):
        example_inputs(model)


def test_every_command_has_help(tmp_path: Path) -> None:
    commands = ("compile", "inspect", "bench", "demo", "families")
    for command, done in zip(commands, run_one_by_one([(name, "--help") for name in commands], tmp_path), strict=True):
        assert done["status"] == 0
        assert f"fxpress {command}" in done["out"]


OUTPUTS = {
    "an artefact": ("bert", "--threads", 1),
    "openvino": ("bert", "--backend", "openvino", "--threads", 1),
    "a cache": ("gpt2", "--cache", "--threads", 1),
    "a cache and an encoder": ("t5", "--cache", "--threads", 1),
    "a[bold] heatmap": ("bert", "--passes", "mask_weights(pattern='2:4')", "--heatmap", "map.svg"),
    "calibration": (
        "bert", "--threads", 1, "--calibration", "x.safetensors",
        "--passes", "quantize(mode=static, method=minmax, sensitive=None)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with what each command line compiled, and what it printed."""
    import tiny
    import transformers
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("good") / "work"
    folder.mkdir()
    (folder / "bert").symlink_to(model_dir)
    tiny.gpt2().save_pretrained(folder / "gpt2")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 60}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(folder / "t5")
    ids = torch.arange(20 * 6).reshape(20, 6) % 99
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, folder / "x.safetensors")
    lines = [("compile", line[0], "-o", name, *line[1:]) for name, line in OUTPUTS.items()]
    done = run_one_by_one(lines, folder)
    assert [(item["status"], item["errors"]) for item in done] == [(0, "")] * len(lines)
    return folder, {name: item["out"] for name, item in zip(OUTPUTS, done, strict=True)}


Outputs = tuple[Path, dict[str, str]]


@pytest.mark.slow
def test_compile_writes_an_artefact_that_loads(outputs: Outputs) -> None:
    import numpy

    import fxpress

    assert "equal to eager PyTorch" in outputs[1]["an artefact"]
    ones = numpy.ones((3, 5), dtype=numpy.int64)
    found = fxpress.load(outputs[0] / "an artefact", threads=1)(input_ids=ones, attention_mask=ones)
    assert found.last_hidden_state.shape == (3, 5, 32)


@pytest.mark.slow
def test_compile_for_openvino(outputs: Outputs) -> None:
    assert "BertModel on openvino" in outputs[1]["openvino"]
    assert json.loads((outputs[0] / "openvino" / "manifest.json").read_text())["backend"] == "openvino"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), [("a cache", 9), ("a cache and an encoder", 4)])
def test_compile_with_a_cache(name: str, length: int, outputs: Outputs) -> None:
    import tiny

    import fxpress

    assert ("The encoder, which reads a source once:" in outputs[1][name]) == ("encoder" in name)
    loaded = fxpress.load(outputs[0] / name, threads=1)
    options = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0} if "encoder" in name else {}
    ids = tiny.text()["input_ids"]
    assert loaded.generate(ids, max_new_tokens=3, **{"pad_token_id": 0, **options}).shape == (2, length)


@pytest.mark.slow
def test_compile_draws_what_pruning_left(outputs: Outputs) -> None:
    printed = outputs[1]["a[bold] heatmap"]
    assert "what pruning left" in printed and "no speed-up here, masks kept: 50% of the weights" in printed
    assert printed.endswith("saved to a[bold] heatmap\nheatmap in map.svg\n")
    assert "<svg" in (outputs[0] / "map.svg").read_text()


@pytest.mark.slow
def test_calibration_data_reach_the_passes(outputs: Outputs) -> None:
    printed = outputs[1]["calibration"]
    assert "calibration: 20 samples in batches of 16" in printed and "linear (static)" in printed


@pytest.mark.slow
def test_inspect_prints_the_graph_and_explains_a_pass(model_dir: Path, tmp_path: Path) -> None:
    options = [(), ("--passes", ""), ("--explain", "fuse"), ("--explain", "canonicalize")]
    done = run_one_by_one([("inspect", model_dir, *more) for more in options], tmp_path)
    graph, plain, reasons, found = (item["out"] for item in done)
    assert "fxpress.attention(" in graph
    assert "aten.dropout" not in graph
    assert "aten.scaled_dot_product_attention(" in plain
    assert "the operands of add_2 broadcast" in reasons
    assert "attention_mask[b, j] != 0" in found  # what the masks mean
