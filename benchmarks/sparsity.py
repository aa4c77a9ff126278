"""What zeros among the weights do to two models, by method, share and pattern; nothing is timed.

The models are MiniLM, judged as minilm-int8 is (quality.py), and the language model of tiny_lm.py, judged by held-out
perplexity. Below the tables stands whether the methods come in the order that their papers say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import batches
import tiny_lm
import torch
from candidates import tensors_of
from corpus import CALIBRATION, EVALUATION
from quality import Inputs, closeness, pooled, states_of, usefulness
from report import environment
from workloads import minilm

from fxpress import compile

METHODS = ("random", "magnitude", "wanda", "sparsegpt")
AMOUNTS = ("30%", "50%", "70%", "2:4")
MUCH = AMOUNTS[1:]  # where methods that look at data have something to gain
FAR = 2.0  # times as much loss is far worse
SEQUENCES, LENGTH = 64, tiny_lm.SETTINGS.context  # of the language model's calibration
HELD_OUT = 256  # sequences
QUICK = 32  # pairs of texts, and sequences

Call = Callable[[Inputs], Any]  # a model: outputs by attribute
Found = dict["Setting", "Judged"]


@dataclass(frozen=True)
class Setting:
    """A way to set weights to zero; the default is none at all."""

    method: str = "dense"
    amount: str = ""

    @property
    def passes(self) -> str | list[str]:
        if not self.amount:
            return []
        if ":" in self.amount:
            return f"mask_weights(method={self.method}, pattern='{self.amount}')"
        return f"mask_weights({self.share}, {self.method})"

    @property
    def share(self) -> float:
        """Of the numbers, those that go."""
        if ":" in self.amount:
            keep, of = map(int, self.amount.split(":"))
            return 1 - keep / of
        return int(self.amount.removesuffix("%") or 0) / 100


@dataclass(frozen=True)
class Judged:
    """How good a model is with its weights as they are now."""

    cells: tuple[str, ...]
    loss: float  # what methods are compared by


@dataclass(frozen=True)
class Case:
    """A model, what it is calibrated on, and how it is judged."""

    name: str
    about: str
    columns: tuple[str, ...]
    compared: str  # the loss, in words
    model: Any
    calibration: list[Inputs]  # tensors
    judge: Callable[[Call], Judged]


NOTHING_LEFT = Setting("random", "100%")  # what zeros can cost at most: no loss can be twice another above half of it
SETTINGS = (Setting(), *(Setting(method, amount) for amount in AMOUNTS for method in METHODS), NOTHING_LEFT)


# --- the models ------------------------------------------------------------------------------------------------


def cases(quick: bool) -> list[Case]:
    """Both models; the second is trained if need be."""
    return [sentence_encoder(QUICK if quick else EVALUATION), language_model(QUICK if quick else HELD_OUT)]


def sentence_encoder(pairs: int) -> Case:
    """MiniLM; what it gives as it is, is the truth."""
    model = minilm()
    texts = batches.evaluation(pairs)

    def states(call: Call) -> tuple[Any, Any]:
        with torch.no_grad():
            return states_of(lambda batch: call(tensors_of(batch)).last_hidden_state, texts)

    truth, mask = states(lambda batch: model(**batch))
    wanted = pooled(truth, mask)
    mrr = usefulness(wanted, wanted).mrr

    def judge(call: Call) -> Judged:
        found, _ = states(call)
        near, use = closeness(found, truth, mask), usefulness(pooled(found, mask), wanted)
        loss = 1 - use.spearman
        return Judged(
            (f"{near.token_mean:.5f}", f"{near.pooled_mean:.5f}", f"{loss:.2%}", f"{1 - use.mrr / mrr:.2%}"), loss
        )

    return Case(
        "all-MiniLM-L6-v2",
        f"Calibrated on {CALIBRATION} texts and judged on {2 * pairs} others, as in minilm-int8: cosines with fp32, of "
        "the states of tokens that are not padding and of mean-pooled embeddings, means; what the Spearman correlation "
        "of all pairwise similarities with fp32's loses of 1, and what retrieval's MRR loses of fp32's.",
        ("token cosine", "pooled cosine", "Spearman loss", "MRR loss"),
        "Spearman loss",
        model,
        [tensors_of(batch) for batch in batches.calibration()],
        judge,
    )


def language_model(count: int) -> Case:
    """The small GPT-2."""
    model, tokenizer = tiny_lm.load()
    held_out = [{"input_ids": ids} for ids in tiny_lm.sequences(tokenizer, "held_out", count, LENGTH).split(8)]

    def perplexity(call: Call) -> float:
        return tiny_lm.perplexity(lambda batch: call(batch).logits, held_out)

    dense = perplexity(lambda batch: model(**batch))

    def judge(call: Call) -> Judged:
        found = perplexity(call)
        return Judged((f"{found:.3f}", f"{found / dense - 1:.2%}"), found / dense - 1)

    return Case(
        "small GPT-2",
        f"Trained on Python's standard library (benchmarks/tiny_lm.py). Calibrated on {SEQUENCES} sequences of "
        f"{LENGTH} tokens of the files that it was trained on, and judged by the perplexity of {count} such sequences "
        "of other files.",
        ("perplexity", "increase"),
        "increase of perplexity",
        model,
        [{"input_ids": ids} for ids in tiny_lm.sequences(tokenizer, "train", SEQUENCES, LENGTH).split(8)],
        judge,
    )


# --- measuring -------------------------------------------------------------------------------------------------


def measure(case: Case, tell: Callable[[str], None]) -> Found:
    """Every setting, one after the other."""
    found: Found = {}
    for place, setting in enumerate(SETTINGS):
        tell(f"{case.name}: {setting.method} {setting.amount}".rstrip() + f" ({place + 1} of {len(SETTINGS)})")
        compiled = compile(
            case.model,
            setting.passes,
            example_inputs=case.calibration[0],
            calibration=case.calibration,
            backend="eager",
            verify=False,
        )
        check(compiled.report, setting)
        found[setting] = case.judge(lambda batch, compiled=compiled: compiled(**batch))
    return found


def check(report: Any, setting: Setting) -> None:
    """The zeros are as many as the table says."""
    layers = [item for done in report.passes for item in done.sparsity]
    share = sum(item["zeros"] for item in layers) / max(sum(item["numbers"] for item in layers), 1)
    if abs(share - setting.share) > 0.005:
        raise SystemExit(f"{setting.passes} left {share:.1%} zeros, not {setting.share:.0%}")


# --- the section -----------------------------------------------------------------------------------------------


def section(found: Mapping[str, tuple[Case, Found]]) -> str:
    """The section, without its heading."""
    lines = [
        "",
        "Single weights set to zero in every linear layer but embeddings and those that make the outputs, all layers "
        "to the same share (`mask_weights`, benchmarks/sparsity.py); nothing is trained afterwards. Backend eager: "
        "zeros are multiplied like all numbers, so there is no speed to measure.",
        "",
        environment("not timed"),
        "",
    ]
    for case, judged in found.values():
        lines += table(case, judged)
    lines += [
        "### Order of the methods",
        "",
        f"What the papers say (Sun et al., 2024; Frantar and Alistarh, 2023); far worse: {FAR:g} times the loss. "
        f"{'; '.join(f'{case.name}: {case.compared}' for case, _ in found.values())}. Out of reach: the loss wanted is "
        "more than a model loses whose masked weights are zero, all of them (what is left knows a text by the "
        "embeddings of its tokens and by biases).",
        "",
        "| model | zeros | claim | losses | met |",
        "|---|---|---|---|---|",
    ]
    for case, judged in found.values():
        lines += [f"| {case.name} | {' | '.join(row)} |" for row in claims(judged)]
    return "\n".join(lines)


def table(case: Case, judged: Found) -> list[str]:
    """Every setting of a model."""
    lines = [
        f"### {case.name}",
        "",
        case.about,
        "",
        f"| zeros | method | {' | '.join(case.columns)} |",
        "|---|---|" + "---:|" * len(case.columns),
    ]
    for setting, item in judged.items():
        lines.append(f"| {setting.amount or 'none'} | {setting.method} | {' | '.join(item.cells)} |")
    return [*lines, ""]


def claims(judged: Found) -> Iterator[tuple[str, str, str, str]]:
    """Share or pattern, claim, figures and verdict."""
    for worse, better, factor, amounts in (
        ("random", "magnitude", FAR, AMOUNTS),
        ("magnitude", "wanda", 1.0, MUCH),
        ("magnitude", "sparsegpt", 1.0, MUCH),
    ):
        for amount in amounts:
            high, low = (judged[Setting(method, amount)].loss for method in (worse, better))
            claim = f"{worse} {'far worse' if factor > 1 else 'worse'} than {better}"
            yield amount, claim, f"{high:.2%} and {low:.2%}", verdict(high, factor * low, judged[NOTHING_LEFT].loss)


def verdict(found: float, wanted: float, most: float) -> str:
    """Whether a loss is above the one wanted; if not, whether it could be, all masked weights zero losing the most."""
    if found > wanted:
        return "met"
    return (
        f"**not met**, out of reach: {wanted:.2%} is wanted, no weights at all lose {most:.2%}"
        if wanted >= most
        else "**not met**"
    )
