"""The examples in the documentation run, and the graphs that it shows are those that fxpress prints."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.printer import print_program

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class FeedForward(nn.Module):
    """The block that the README shows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(nn.functional.gelu(self.up(x)))))


@pytest.mark.slow
def test_readme_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    exec(compile(examples, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith(re.findall(r"```\n(program.*?)```", README, re.DOTALL)[-1] + "\n")
    assert (tmp_path / "encoder" / "manifest.json").is_file()
    assert (tmp_path / "encoder.onnx").is_file()


PAGES = [page.name for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = "".join(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    )
    exec(compile(examples, page, "exec"), {})


@pytest.mark.parametrize(("passes", "place"), [([], 0), (None, 1)], ids=["before", "after"])
def test_readme_graphs_are_what_fxpress_prints(passes: list[str] | None, place: int) -> None:
    shown = re.findall(r"```\n(program.*?)```", README, re.DOTALL)[place]
    compiled = fxpress.compile(
        FeedForward().eval(), passes=passes, example_inputs=(torch.randn(2, 5, 8),), backend="eager"
    )
    assert print_program(compiled.program) == shown


def test_files_that_the_documentation_names_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "docs/design.md", "docs/quantization.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:ir|passes|backends|compiler|tests|benchmarks)/[\w/]+\.(?:py|md))`", text):
            assert (ROOT / path).is_file(), f"{document} names {path}"
