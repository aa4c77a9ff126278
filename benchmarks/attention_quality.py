"""What each kind of attention does to two trained models in the place of their own, without any training.

The models are those of sparsity.py, judged in the same way: MiniLM by its embeddings, the language model of tiny_lm.py,
which is causal, by held-out perplexity. Kinds that are fitted to data are fitted to texts that nothing is judged on.

Settings of one's own: measure(sentence_encoder(32, (Setting("nystrom", {"landmarks": 4}),)), print).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import batches
import numpy
import sparsity
import torch
from candidates import tensors_of
from corpus import CALIBRATION
from quality import closeness, pooled, usefulness
from report import cell, environment
from sparsity import HELD_OUT, QUICK, Call, Case, Judged
from targets import Target, target_table
from tiny_lm import one_thread
from workloads import minilm

from fxpress import compile
from fxpress.ir.replacement.table import KINDS
from fxpress.passes import ReplaceAttention

T0, C, FT = "T0", "C", "FT"
EXPECTED = {  # by kind, what its papers and its arithmetic let one expect
    "sliding_window": f"{T0}, {FT}",
    "dynamic_sparse": T0,
    "nystrom": f"{T0}, {FT}",
    "linear": f"{C}, {FT}",
    "linformer": f"{C}, {FT}",
    "depthwise_conv": f"{C}, {FT}",
    "random_sparse": FT,
    "graph": FT,
    "performer": FT,
    "lsh": FT,
    "funnel": FT,
}
LEGEND = f"""Expected of a kind: {T0}: usable as it is, as most of what the model looks at is still seen, or as few
landmarks say most about the rest; {C}: usable after its weights are fitted to what exact attention gives on calibration
data, which takes seconds a layer; {FT}: the model has to learn to live with it, by fine-tuning, and what stands here is
where that starts. Two: a wide setting is the first, a narrow one the second."""
ABOUT = """Attention of each kind in the place of the model's own (`replace_attention`,
benchmarks/attention_quality.py). Nothing is trained, but weights that a kind has may be fitted to what exact attention
gives on calibration data. Texts are short here, and so are the settings: they are chosen so that they show; how time
grows with the length is in attention-scaling. Longer: the share of texts that have more tokens than a setting covers;
the others get exact attention. With a cosine as a budget, layers are chosen on the calibration data (layers='auto')."""
TARGETS = "What all layers, or the ones named, may lose: the more of Spearman and MRR, or of perplexity."
PAIRS = 152  # of texts, half of those that other sections have: there are many settings to judge
BATCH = 8


@dataclass(frozen=True)
class Setting:
    """Kinds with options. `exact_to`: texts of no more tokens get exact attention; 0: none does."""

    kind: str | tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    exact_to: int = 0
    layers: str | tuple[int, ...] = "all"
    min_cosine: float | None = None  # the budget of layers="auto"
    control: str = ""  # what it shows, if it is no candidate
    gate: float | None = None  # the most that it may lose
    worse_than: str = ""  # the label of what must lose less

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    @property
    def text(self) -> str:
        """Options, and layers if they are not all."""
        text = [f"{name}={value}" for name, value in self.options.items()]
        if self.min_cosine is not None:
            text.append(f"cosine {self.min_cosine}")
        elif self.layers != "all":
            text.append(f"layers {', '.join(map(str, self.layers))}")
        return ", ".join(text) or "defaults"

    @property
    def label(self) -> str:
        return f"{', '.join(self.kinds)}, {self.text}"

    @property
    def expected(self) -> str:
        return self.control or ("-" if len(self.kinds) > 1 else EXPECTED.get(self.kinds[0], "-"))


@dataclass(frozen=True)
class Outcome:
    """How good a model is with a setting, and how many of its layers have it; why it failed."""

    judged: Judged | None = None
    layers: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Task:
    """A model, the tokens of the texts that it is judged on, and what is tried."""

    case: Case
    lengths: Any
    settings: tuple[Setting, ...]


EVERY = 10**9  # tokens: all texts get exact attention
CONTROL = Setting("exact", exact_to=EVERY, control="control: no loss", gate=0.0001)
SEVERAL = ("sliding_window", "nystrom", "linformer", "linear")
NARROW = {"window": 16, "landmarks": 16, "rank": 16}
ENCODER = (
    CONTROL,
    Setting("linformer", {"rank": 1}, 1, control="control: the mean of all values"),
    Setting(
        "random_sparse",
        {"block": 1, "window": 1, "global_blocks": 0, "random_blocks": 15},
        16,
        control="control: itself and 15 others at random",
        worse_than="sliding_window, window=8",
    ),
    Setting("sliding_window", {"window": 32}, 32),
    Setting("sliding_window", {"window": 32}, 32, layers=(0, 2, 4), gate=0.03),
    Setting("sliding_window", {"window": 32, "global_tokens": 1}, 33, layers=(0, 2, 4), gate=0.03),
    Setting("sliding_window", {"window": 16}, 16),
    Setting("sliding_window", {"window": 32, "global_tokens": 1}, 33),
    Setting("sliding_window", {"window": 16, "global_tokens": 1}, 17),
    Setting("sliding_window", {"window": 8}, 8),
    Setting("sliding_window", {"window": 8, "global_tokens": 1}, 9),
    Setting("dynamic_sparse", {"block": 16, "top_k": 4}, 64, gate=0.01),
    Setting("dynamic_sparse", {"block": 16, "top_k": 2}, 32),
    Setting("dynamic_sparse", {"block": 16, "top_k": 4, "per_query": True}, 64),
    Setting("dynamic_sparse", {"block": 16, "mass": 0.5}, 16),
    Setting("random_sparse", {"block": 16, "random_blocks": 1}, 80),
    Setting("random_sparse", {"block": 8}, 56),
    Setting("random_sparse", {"block": 4}, 28),
    Setting("graph", {"topology": "star"}, 3),
    Setting("graph", {"topology": "star", "degree": 16}, 10),
    Setting("graph", {"topology": "expander", "block": 8, "degree": 4}, 24),
    Setting("nystrom", {"landmarks": 64}, 64, gate=0.1),
    Setting("nystrom", {"landmarks": 32}, 32),
    Setting("nystrom", {"landmarks": 16}, 16),
    Setting("nystrom", {"landmarks": 8}, 8),
    Setting("linformer", {"rank": 32}, 32),
    Setting("linformer", {"rank": 16}, 16),
    Setting("linformer", {"rank": 8}, 8),
    Setting("linformer", {"rank": 16, "projection": "fitted"}, 16),
    Setting("performer", {"features": 266}),
    Setting("performer", {"features": 64}),
    Setting("linear", {"window": 16}, 16),
    Setting("linear", {"window": 8}, 8),
    Setting("linear", {"window": 8, "steps": 0}, 8),
    Setting("lsh", {"chunk": 32}, 32),
    Setting("lsh", {"chunk": 16}, 16),
    Setting("depthwise_conv", {"kernel": 9}),
    Setting("depthwise_conv", {"kernel": 5}),
    Setting("depthwise_conv", {"kernel": 9, "dynamic": True}),
    Setting("funnel"),
    Setting("funnel", layers=(3,)),
    Setting("funnel", layers=(5,)),
    Setting("sliding_window", {"window": 16}, 16, "auto", 0.99),
    Setting("sliding_window", {"window": 16}, 16, "auto", 0.95),
    Setting("dynamic_sparse", {"block": 16, "top_k": 2}, 32, "auto", 0.99),
    Setting("nystrom", {"landmarks": 16}, 16, "auto", 0.95),
    Setting(SEVERAL, NARROW, 16, "auto", 0.99),
    Setting(SEVERAL, NARROW, 16, "auto", 0.95),
)
DECODER = (
    CONTROL,
    Setting(
        "random_sparse",
        {"block": 1, "window": 1, "global_blocks": 0, "random_blocks": 31},
        32,
        control="control: itself and 31 others at random",
        worse_than="sliding_window, window=32",
    ),
    Setting("sliding_window", {"window": 32}, 32),
    Setting("sliding_window", {"window": 32}, 32, layers=(0, 2), gate=0.05),
    Setting("sliding_window", {"window": 32, "global_tokens": 4}, 36),
    Setting("sliding_window", {"window": 16}, 16),
    Setting("sliding_window", {"window": 16, "global_tokens": 4}, 20),
    Setting("dynamic_sparse", {"block": 16, "top_k": 4}, 80, gate=0.02),
    Setting("dynamic_sparse", {"block": 16, "top_k": 2}, 48),
    Setting("dynamic_sparse", {"block": 16, "top_k": 2, "per_query": True}, 48),
    Setting("random_sparse", {"block": 8}, 56),
    Setting("performer", {"features": 266}),
    Setting("performer", {"features": 64}),
    Setting("linear", {"window": 16}, 16),
    Setting("linear", {"window": 8}, 8),
    Setting("lsh", {"chunk": 32}, 32),
    Setting("lsh", {"chunk": 16}, 16),
    Setting("depthwise_conv", {"kernel": 9}),
    Setting("sliding_window", {"window": 32}, 32, "auto", 0.99),
    Setting(("sliding_window", "linear"), {"window": 16}, 16, "auto", 0.99),
)
Found = list[tuple[Setting, Outcome]]
Tell = Callable[[str], None]


# --- the models ------------------------------------------------------------------------------------------------


def tasks(quick: bool) -> list[Task]:
    """Both models; the second is trained if need be."""
    return [sentence_encoder(QUICK if quick else PAIRS), language_model(QUICK if quick else HELD_OUT)]


def sentence_encoder(pairs: int = PAIRS, settings: tuple[Setting, ...] = ENCODER) -> Task:
    """MiniLM; what it gives as it is, is the truth. Texts of like lengths stand together, with little padding."""
    model = minilm()
    texts = batches.evaluation(pairs)
    ids, mask = (numpy.concatenate([item[name] for item in texts]) for name in ("input_ids", "attention_mask"))
    lengths = mask.sum(1)
    order = numpy.argsort(lengths, kind="stable")

    def states(call: Call) -> Any:
        found = numpy.zeros((*ids.shape, model.config.hidden_size), numpy.float32)
        for rows in numpy.split(order, range(BATCH, len(order), BATCH)):
            longest = lengths[rows].max()
            inputs = {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}
            with torch.no_grad():
                found[rows, :longest] = call(tensors_of(inputs)).last_hidden_state
        return found

    truth = states(lambda batch: model(**batch))
    wanted = pooled(truth, mask)
    mrr = usefulness(wanted, wanted).mrr

    def judge(call: Call) -> Judged:
        found = states(call)
        near, use = closeness(found, truth, mask), usefulness(pooled(found, mask), wanted)
        losses = (1 - use.spearman, 1 - use.mrr / mrr)
        return Judged((f"{near.pooled_mean:.4f}", f"{near.token_mean:.4f}", *(f"{x:.2%}" for x in losses)), max(losses))

    case = Case(
        "all-MiniLM-L6-v2",
        f"Calibrated on {CALIBRATION} texts and judged on {2 * pairs} others of {lengths.mean():.0f} tokens on average "
        f"(cut to {mask.shape[1]}), as in minilm-int8: cosines with the model as it is, of mean-pooled embeddings and "
        "of the states of tokens that are not padding, means; what the Spearman correlation of all pairwise "
        "similarities with the model's loses of 1, and what retrieval's MRR loses of the model's.",
        ("pooled cosine", "token cosine", "Spearman loss", "MRR loss"),
        "Spearman and MRR loss",
        model,
        [tensors_of(batch) for batch in batches.calibration()],
        judge,
    )
    return Task(case, lengths, settings)


def language_model(count: int = HELD_OUT, settings: tuple[Setting, ...] = DECODER) -> Task:
    """The small GPT-2, as in sparsity."""
    return Task(sparsity.language_model(count), numpy.full(count, sparsity.LENGTH), settings)


# --- measuring -------------------------------------------------------------------------------------------------


def measure(task: Task, tell: Tell) -> Found:
    """Every setting, one after the other."""
    found: Found = []
    with one_thread():
        for place, setting in enumerate(task.settings):
            tell(f"{task.case.name}: {setting.label} ({place + 1} of {len(task.settings)})")
            found.append((setting, outcome(task.case, setting)))
    return found


def outcome(case: Case, setting: Setting) -> Outcome:
    """Replace and judge."""
    missing = [kind for kind in setting.kinds if kind not in KINDS]
    if missing:
        return Outcome(failure=f"there is no kind {', '.join(missing)} yet")
    replacement = ReplaceAttention(setting.kind, setting.layers, (), setting.min_cosine, force=True, **setting.options)
    try:
        compiled = compile(
            case.model,
            [replacement],
            example_inputs=case.calibration[-1],
            calibration=case.calibration,
            backend="eager",
            verify=False,
        )
        judged = case.judge(lambda batch: compiled(**batch))
    except Exception as error:  # noqa: BLE001 - a kind that fails is listed with its error
        return Outcome(failure=f"{type(error).__name__}: {error}"[:200])
    rewrites = next(item.rewrites for item in compiled.report.passes if item.name == str(replacement))
    layers = f"{sum(rewrites.values())} of {case.model.config.num_hidden_layers}"
    if len(setting.kinds) > 1 and rewrites:
        layers += ": " + ", ".join(f"{count} {kind}" for kind, count in rewrites.items())
    return Outcome(judged, layers)


# --- the section -----------------------------------------------------------------------------------------------


def section(found: Sequence[tuple[Task, Found]]) -> str:
    """The section, without its heading."""
    lines = [
        "",
        ABOUT,
        "",
        LEGEND,
        "",
        environment("not timed"),
        "",
    ]
    for task, outcomes in found:
        lines += table(task, outcomes)
    return "\n".join([*lines, *target_table(targets(found), TARGETS)])


def table(task: Task, found: Found) -> list[str]:
    """Every setting of a model."""
    case = task.case
    lines = [
        f"### {case.name}",
        "",
        case.about,
        "",
        f"| kind | setting | longer | layers | {' | '.join(case.columns)} | expected |",
        "|---|---|---:|---|" + "---:|" * len(case.columns) + "---|",
    ]
    for setting, item in found:
        longer = f"{(task.lengths > setting.exact_to).mean():.0%}"
        start = f"| {', '.join(setting.kinds)} | {setting.text} | {longer} | {item.layers} |"
        if item.judged is None:
            lines.append(f"{start} failed: {cell(item.failure)}{' |' * len(case.columns)} {setting.expected} |")
        else:
            lines.append(f"{start} {' | '.join(item.judged.cells)} | {setting.expected} |")
    return [*lines, ""]


def targets(found: Sequence[tuple[Task, Found]]) -> Iterator[Target]:
    """Every gate, and that keys at random are worse than as many near ones."""
    for task, outcomes in found:
        losses = {setting.label: item.judged.loss for setting, item in outcomes if item.judged is not None}
        for setting, _ in outcomes:
            point, loss = f"{task.case.name}: {setting.label}", losses.get(setting.label)
            text = "" if loss is None else f"{loss:.2%}"
            if setting.gate is not None:
                wish = f"{task.case.compared}: at most {setting.gate:.2%}"
                yield Target(point, wish, text, None if loss is None else loss <= setting.gate)
            if setting.worse_than:
                other = losses.get(setting.worse_than)
                wish = f"worse than {setting.worse_than}"
                if loss is None or other is None:
                    yield Target(point, wish, "", None)
                else:
                    yield Target(point, wish, f"{loss:.2%} and {other:.2%}", loss > other)
