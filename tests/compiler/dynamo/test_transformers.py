"""transformers under torch.compile(backend="fxpress"): families, generate, pipeline, Trainer, training by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dynamo
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpress
from fxpress.compiler import hf
from fxpress.compiler.families import Family, families
from fxpress.ir.equality import compare

transformers = pytest.importorskip("transformers")
hf.register_caches()

FAMILIES = {family.name: family for family in families()}
QUICK = ("bert", "gpt2")
ALIKE = ("distilbert", "roberta", "qwen2", "mistral", "nn.Transformer")
SIZES = ((2, 12), (3, 17), (4, 9))
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with dynamo.fresh():
        yield


def _marks(family: str, backend: str) -> Any:
    """Most families with the eager backend; with ONNX Runtime, which is tested for itself, a few in each run."""
    if family in ALIKE or (family, backend) == ("llama", "eager"):
        return pytest.mark.exhaustive
    if backend == "eager":
        return () if family in QUICK else pytest.mark.slow
    return pytest.mark.slow if family in QUICK else pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param(family, backend, id=f"{family.name}-{backend}", marks=_marks(family.name, backend))
        for family in FAMILIES.values() for backend in ("eager", "onnx")
    ],
)  # fmt: skip
# torch's encoder makes nested tensors of padding
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_family_at_three_sizes_compiles_twice(family: Family, backend: str) -> None:
    torch.manual_seed(0)
    model = family.model().eval()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="fxpress", options={"backend": backend})
    for size in SIZES:
        given = family.inputs(*size)
        with torch.no_grad():
            found, usual = compiled(**given), model(**given)
            torch.set_default_dtype(torch.float64)
            judge = exact(**dynamo.wide(given))
            torch.set_default_dtype(torch.float32)
        verdict = compare(*(pytree.tree_leaves(value) for value in (found, usual, judge)))
        assert verdict.equal, verdict.reasons
    assert len({report.graph for report in fxpress.reports() if report.graph.startswith("0/")}) <= 2
    assert all(report.runner == backend or report.reason for report in fxpress.reports())


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                     bos_token_id=1, eos_token_id=None)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=2, eos_token_id=None))


@pytest.mark.parametrize(("make", "backend"), [(llama, "eager"), pytest.param(gpt2, "onnx", marks=pytest.mark.slow)])
def test_generation_with_a_static_cache_is_that_of_eager(make: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(3, 90, (2, 7))
    settings = {"max_new_tokens": 32, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    usual = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, backend="fxpress", options={"backend": backend})
    assert torch.equal(model.generate(ids, **settings), usual)
    assert usual.shape == (2, 39)
    reports = fxpress.reports()
    assert [report.runner for report in reports] == [backend, backend], str(reports)
    assert reports[1].calls == 31


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "of", "dogs"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def classifier() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**TINY, "num_hidden_layers": 1}))


def test_pipeline_around_a_compiled_model() -> None:
    model, texts = classifier().eval(), ["a good film", "a bad film of dogs", "dogs"]
    usual = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer())(texts)
    compiled = torch.compile(copy.deepcopy(model), backend="fxpress", options={"backend": "eager"})
    found = transformers.pipeline("text-classification", model=compiled, tokenizer=tokenizer())(texts)
    assert [item["label"] for item in found] == [item["label"] for item in usual]
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in usual], rel=1e-5)
    assert all(report.runner == "eager" for report in fxpress.reports())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # torch's loader, on machines without a GPU
def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    fxpress.register_with_accelerate()
    fxpress.register_with_accelerate()
    data = [{"input_ids": torch.randint(5, 11, (6,)), "labels": torch.tensor(index % 2)} for index in range(8)]

    def losses(**compiled: Any) -> list[float]:
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1,
            save_strategy="no", disable_tqdm=True, **compiled,
        )  # fmt: skip
        trainer = transformers.Trainer(classifier(), settings, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    usual = losses()
    assert losses(torch_compile=True, torch_compile_backend="fxpress") == pytest.approx(usual, rel=1e-4)
    assert all(report.training and report.reason for report in fxpress.reports())
    assert fxpress.reports()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
# dynamo looks at .grad of everything that a resumed function takes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_masked_language_model_follows_the_loss_of_eager(half: bool, backend: str) -> None:
    """50 steps with dropout."""
    batches = torch.randint(5, 99, (50, 4, 12), generator=torch.Generator().manual_seed(0))

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**TINY)).train()
        call: Any = torch.compile(model, backend="fxpress", options={"backend": backend}) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for batch in batches:
            hidden = torch.where(torch.arange(12) % 4 == 1, 4, batch)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                loss = call(input_ids=hidden, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    usual, found = losses(False), losses(True)
    assert found == pytest.approx(usual, rel=1e-2 if half else 1e-3)
    assert usual[-1] < usual[0]
    for report in fxpress.reports():
        assert report.runner == backend or report.reason


class Residual(nn.Module):
    """A small ResNet: nothing in it is ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                          nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
            for _ in range(4)
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.stem(image)
        for block in self.blocks:
            hidden = torch.relu(hidden + block(hidden))
        return self.head(hidden.mean((2, 3)))


def test_convolution_model_is_equal() -> None:
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (report,) = dynamo.assert_equal(Residual().eval(), (image,), options={"backend": "auto"})
    assert report.milliseconds.keys() == {"onnx", "pytorch"}
    assert (report.runner == "onnx") == (report.milliseconds["onnx"] < report.milliseconds["pytorch"])
