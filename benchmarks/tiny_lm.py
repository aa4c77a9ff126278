"""A small GPT-2 trained on Python's standard library, for benchmarks that judge pruning by held-out perplexity.

.venv/bin/python benchmarks/tiny_lm.py      train it if it is not in the cache, and say how good it is

Training takes about four minutes on one thread of a modern x86 core that it has to itself. What fits into them decides
the size: a wider model sees fewer tokens, is worse, and hardly notices it when half of its weights are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import corpus
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

Split = Literal["train", "held_out"]
Batch = dict[str, Tensor]

DATA_ONLY = {"encodings", "pydoc_data"}  # folders of tables and generated text
HELD_OUT_OF = 10  # one file of so many
END = "<|endoftext|>"  # token 0, after each file


@dataclass(frozen=True)
class Settings:
    """What is trained and how."""

    vocabulary: int = 1024
    context: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    spread: float = 0.05  # of the weights at the start; 0.02, which is usual, learns more slowly at this width
    steps: int = 2200
    batch: int = 8
    rate: float = 3e-3
    warm_up: int = 50  # steps
    decay: float = 0.1  # of matrices
    seed: int = 0


SETTINGS = Settings()


# --- text --------------------------------------------------------------------------------------------------------


@cache
def texts(split: Split) -> list[str]:
    """The files of a split. A hash of its path in the library says which split a file is in."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in corpus.library_files():
        path = file.relative_to(root)
        held_out = int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % HELD_OUT_OF == 0
        if held_out == (split == "held_out") and DATA_ONLY.isdisjoint(path.parts):
            found.append(file.read_text(encoding="utf-8", errors="replace"))
    if not found:
        raise SystemExit("the standard library's sources are needed, and none were found")
    return found


def train_tokenizer(settings: Settings) -> Tokenizer:
    """A byte-level BPE of the training files; no text is out of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts("train"), trainer)
    return tokenizer


def stream(tokenizer: Tokenizer, split: Split) -> Tensor:
    """All tokens of a split, each file followed by END."""
    end = tokenizer.token_to_id(END)
    files = tokenizer.encode_batch_fast(texts(split))
    return torch.tensor([token for file in files for token in (*file.ids, end)])


def sequences(tokenizer: Tokenizer, split: Split, count: int, length: int) -> Tensor:
    """Token ids [count, length]: `count` pieces at even distances of the split's files, one after the other.

    They do not overlap; more than there are is a ValueError.
    """
    tokens = stream(tokenizer, split)
    if count * length > len(tokens):
        raise ValueError(f"{split} has {len(tokens)} tokens, fewer than {count} x {length}")
    distance = len(tokens) // count
    return torch.stack([tokens[start : start + length] for start in range(0, count * distance, distance)])


# --- judging -----------------------------------------------------------------------------------------------------


def perplexity(logits_of: Callable[[Batch], Tensor], batches: list[Batch]) -> float:
    """exp of the mean negative log-likelihood of each token but the first of a row, added up in fp64.

    A batch is {"input_ids": [B, L]}; `logits_of` gives [B, L, vocabulary].
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            targets = batch["input_ids"][:, 1:].flatten()
            logits = logits_of(batch)[:, :-1].double().flatten(0, 1)
            total += functional.cross_entropy(logits, targets, reduction="sum").item()
            count += targets.numel()
    return math.exp(total / count)


def bytes_per_token(tokenizer: Tokenizer, ids: Tensor) -> float:
    """Bytes of text per token that `perplexity` judges; END has none."""
    # A token of a byte-level BPE is written with one character per byte.
    sizes = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if token == END else len(token)
    return float(sizes[ids[:, 1:]].double().mean())


# --- the model ---------------------------------------------------------------------------------------------------


def untrained(settings: Settings) -> GPT2LMHeadModel:
    """The model at its seeded start; the state of torch's generator is left as it was."""
    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=settings.spread,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return GPT2LMHeadModel(config).eval()


def train(settings: Settings, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """Train on windows of the training files in a seeded order, none twice until all were seen."""
    model = untrained(settings)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(settings, step))
    console = Console(stderr=True)
    with one_thread(), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for ids in progress.track(training_batches(settings, tokenizer), settings.steps, description="training"):
            logits = model(input_ids=ids).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


def share_of_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < settings.warm_up:
        return (step + 1) / settings.warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - settings.warm_up) / (settings.steps - settings.warm_up))


def training_batches(settings: Settings, tokenizer: Tokenizer) -> Iterator[Tensor]:
    """`steps` batches [batch, context]."""
    windows = stream(tokenizer, "train").unfold(0, settings.context, settings.context)
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(len(windows), generator=generator) for _ in range(0, needed, len(windows))]
    for rows in torch.cat(rounds)[:needed].split(settings.batch):
        yield windows[rows]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The order of additions, and so the outcome, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the cache ---------------------------------------------------------------------------------------------------


def cache_folder(settings: Settings = SETTINGS) -> Path:
    """Where the model is kept, by its settings, the Python whose library it learns, and the code that does it."""
    key = hashlib.sha256(json.dumps([asdict(settings), sys.version]).encode())
    for source in (__file__, corpus.__file__):
        key.update(Path(source).read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fxpress" / f"tiny_lm-{key.hexdigest()[:16]}"


def load() -> tuple[GPT2LMHeadModel, Tokenizer]:
    """The trained model, in eval mode, and its tokenizer; trains them if they are not in the cache."""
    folder = cache_folder()
    if not folder.exists():
        fill(folder, SETTINGS)
    model = untrained(SETTINGS)
    load_model(model, folder / "model.safetensors")
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def fill(folder: Path, settings: Settings) -> None:
    """Train and write the folder, which appears at once and whole."""
    start = time.perf_counter()
    tokenizer = train_tokenizer(settings)
    model = train(settings, tokenizer)
    facts = asdict(settings) | {"python": sys.version, "seconds": round(time.perf_counter() - start, 1)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tiny_lm-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        save_model(model, str(new / "model.safetensors"))
        tokenizer.save(str(new / "tokenizer.json"))
        (new / "settings.json").write_text(json.dumps(facts, indent=2) + "\n")
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def main() -> None:
    model, tokenizer = load()
    facts = json.loads((cache_folder() / "settings.json").read_text())
    ids = sequences(tokenizer, "held_out", 256, SETTINGS.context)
    found = perplexity(lambda batch: model(**batch).logits, [{"input_ids": rows} for rows in ids.split(8)])
    table = Table(show_header=False)
    for name, value in {
        "layers, width, heads": f"{SETTINGS.layers}, {SETTINGS.width}, {SETTINGS.heads}",
        "vocabulary, context": f"{SETTINGS.vocabulary}, {SETTINGS.context}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "train": f"{len(texts('train'))} files, {len(stream(tokenizer, 'train')):,} tokens",
        "held out": f"{len(texts('held_out'))} files, {len(stream(tokenizer, 'held_out')):,} tokens",
        "trained for": f"{facts['seconds']:.0f} s, {SETTINGS.steps * SETTINGS.batch * SETTINGS.context:,} tokens",
        "held-out perplexity": f"{found:.3f} per token",
        "held-out bits per byte": f"{math.log2(found) / bytes_per_token(tokenizer, ids):.3f}",
        "cache": str(cache_folder()),
    }.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    main()
