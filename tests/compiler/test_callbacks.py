"""The callback that lets masks grow under transformers' Trainer: its events by hand, and a Trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from build import normal, program, rewritten
from torch import Tensor, nn

import fxpress
from fxpress import MaskScheduler, mask_callback
from fxpress.compiler import hf
from fxpress.compiler.callbacks import STATE
from fxpress.compiler.driver import Compiled
from fxpress.ir.errors import InputError
from fxpress.ir.graph import Program
from fxpress.passes import Fold, MaskWeights


def layer() -> Program:
    """One linear layer [8 -> 16] with a mask."""
    traced = program(lambda m, x: F.linear(x, m.w), normal(8, 8), w=normal(16, 8))
    return rewritten(traced, MaskWeights(0.0, layers=["w"], fold=False))[0]


class Loop:
    """The events of a Trainer, in its order and with its own handler and state: of transformers/trainer.py."""

    def __init__(self, made: Program, scheduler: MaskScheduler, folder: Path, max_steps: int, accumulate: int = 1):
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState

        self.made, self.accumulate = made, accumulate
        self.optimizer = torch.optim.AdamW(made.module.parameters(), lr=0.01, weight_decay=0.1)
        self.shown: list[dict[str, Any]] = []
        callbacks = [DefaultFlowCallback, mask_callback(scheduler), self._printer()]
        self.handler = CallbackHandler(callbacks, made.module, None, self.optimizer, None)
        self.args = SimpleNamespace(output_dir=str(folder))
        self.state, self.control = TrainerState(max_steps=max_steps), TrainerControl()

    def _printer(self) -> Any:
        """A callback behind the one under test, as the Trainer's own printer is."""
        shown = self.shown

        class Printer(transformers.TrainerCallback):  # type: ignore[misc]
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                shown.append(dict(logs))

        return Printer

    def call(self, event: str, **given: Any) -> None:
        self.handler.call_event(event, self.args, self.state, self.control, **given)

    def step(self) -> None:
        self.call("on_step_begin")
        for batch in range(self.accumulate):
            (self.made.run([normal(8, 8, seed=self.state.global_step)])[0] - 1).square().mean().backward()
            if batch < self.accumulate - 1:
                self.call("on_substep_end")
        torch.nn.utils.clip_grad_norm_(self.made.module.parameters(), 1.0)
        self.call("on_pre_optimizer_step")
        self.optimizer.step()
        self.call("on_optimizer_step")
        self.made.module.zero_grad()
        self.state.global_step += 1

    def log(self) -> None:
        logs = {"loss": 1.0}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs=logs)

    def save(self) -> Path:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir()
        self.call("on_save")
        return folder


@pytest.mark.parametrize("method", ["magnitude", "movement", "random"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_follows_the_events(method: str, accumulate: int, tmp_path: Path) -> None:
    made = layer()
    scheduler = MaskScheduler(made, 0.75, method, end=4, every=2)
    loop = Loop(made, scheduler, tmp_path, 6, accumulate)
    loop.call("on_train_begin")
    for _ in range(6):
        loop.step()
        loop.log()
    assert scheduler.steps == loop.state.global_step == 6
    assert scheduler.history == [(2, scheduler.history[0][1]), (4, 0.75)]
    shares = [entry["sparsity"] for entry in loop.state.log_history]
    assert (
        shares
        == [entry["sparsity"] for entry in loop.shown]
        == [0, *[round(scheduler.history[0][1], 6)] * 2, *[0.75] * 3]
    )
    assert loop.shown[0] == {"loss": 1.0, "sparsity": 0}


def test_a_checkpoint_has_the_schedule_and_resumes(tmp_path: Path) -> None:
    whole, first, second = (layer() for _ in range(3))
    options: dict[str, Any] = {"sparsity": 0.75, "method": "movement", "end": 6, "every": 2}
    expected = Loop(whole, MaskScheduler(whole, **options), tmp_path / "whole", 8)
    expected.call("on_train_begin")
    for _ in range(8):
        expected.step()

    stopped = Loop(first, MaskScheduler(first, **options), tmp_path, 8)
    stopped.call("on_train_begin")
    for _ in range(3):
        stopped.step()
    assert (stopped.save() / STATE).is_file()

    scheduler = MaskScheduler(second, **options)
    resumed = Loop(second, scheduler, tmp_path, 8)
    second.module.load_state_dict(first.module.state_dict())  # as the Trainer does before training begins
    resumed.optimizer.load_state_dict(stopped.optimizer.state_dict())
    resumed.state.global_step = 3
    resumed.call("on_train_begin")
    assert scheduler.steps == 3
    for _ in range(5):
        resumed.step()
    for name, value in whole.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name


def test_a_checkpoint_without_the_schedule_is_refused(tmp_path: Path) -> None:
    made = layer()
    loop = Loop(made, MaskScheduler(made, 0.5, end=4), tmp_path, 8)
    loop.state.global_step = 3
    with pytest.raises(InputError, match=r"resumes at step 3, the schedule stands at 0, .* no .*checkpoint-3"):
        loop.call("on_train_begin")


def test_nothing_is_written_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    made = layer()
    loop = Loop(made, MaskScheduler(made, 0.5, end=4), tmp_path, 8)
    loop.call("on_save")
    loop.state.is_world_process_zero = False
    assert list(loop.save().iterdir()) == []


def test_a_training_that_is_too_short_is_refused(tmp_path: Path) -> None:
    made = layer()
    with pytest.raises(InputError, match="training ends after 3 steps, the schedule after 4"):
        Loop(made, MaskScheduler(made, 0.5, end=4), tmp_path, 3).call("on_train_begin")


def test_it_takes_schedules_only() -> None:
    with pytest.raises(InputError, match=r"mask_callback needs a MaskScheduler, found 0\.5"):
        mask_callback(0.5)  # type: ignore[arg-type]


def test_transformers_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise InputError("this needs transformers")

    monkeypatch.setattr(hf, "import_transformers", missing)
    with pytest.raises(InputError, match="this needs transformers"):
        mask_callback(MaskScheduler(layer(), 0.5, end=4))


# --- a Trainer -------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A compiled BERT with a head and a loss, as the Trainer wants a model."""

    def __init__(self, compiled: Compiled) -> None:
        super().__init__()
        self.program = compiled.program
        self.body = compiled.program.module  # its parameters and masks are this module's
        torch.manual_seed(1)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.program(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(hidden.mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def bert() -> Compiled:
    """Without masks where the loss of `Classifier` has no gradients."""
    masks = MaskWeights(0.0, skip=["pooler"], fold=False)
    return fxpress.compile(tiny.bert(), [masks], tiny.text(), backend="eager")


def sparsities(compiled: Compiled) -> list[float]:
    """The share of zeros in each linear layer's weight."""
    made = compiled.program
    weights = [made.tensor(node.args[1]) for node in made.calls(torch.ops.aten.linear.default)]  # type: ignore[arg-type]
    return [float((weight == 0).double().mean()) for weight in weights]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the Trainer and accelerate warn of is not for this test to judge
@pytest.mark.parametrize(
    ("method", "pattern"),
    [pytest.param("magnitude", "unstructured", marks=pytest.mark.exhaustive), ("movement", "2:4")],
)
def test_trainer(method: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    examples = [
        {**{name: value[0] for name, value in tiny.text(1, 6).items()}, "labels": index % 2} for index in range(32)
    ]

    def trainer(compiled: Compiled, scheduler: MaskScheduler) -> Any:
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            weight_decay=0.1,
            logging_steps=2,
            save_strategy="steps",
            save_steps=6,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model = Classifier(compiled)
        return transformers.Trainer(model, args, train_dataset=examples, callbacks=[mask_callback(scheduler)])

    compiled = bert()
    scheduler = MaskScheduler(compiled.program, 0.5, method, pattern, end=10, every=3)
    running = trainer(compiled, scheduler)
    running.train()
    assert [step for step, _ in scheduler.history] == [3, 6, 9, 10]
    logged = [entry["sparsity"] for entry in running.state.log_history if "loss" in entry]
    assert logged == sorted(logged) and logged[0] == 0 and logged[-1] == 0.5
    folded = compiled.then([Fold()], backend="eager")
    assert sparsities(folded) == [*[0.5] * 6, 0]
    given = tiny.text(3, 5)
    torch.testing.assert_close(folded(**given).last_hidden_state, compiled(**given).last_hidden_state)

    again = bert()
    resumed = MaskScheduler(again.program, 0.5, method, pattern, end=10, every=3)
    trainer(again, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.history == scheduler.history
    for name, value in compiled.program.module.state_dict().items():
        torch.testing.assert_close(again.program.module.state_dict()[name], value, msg=name)


@pytest.mark.slow
def test_gpt2_by_hand() -> None:
    """Without a Trainer: a language model in a plain loop, then folded."""
    compiled = fxpress.compile(tiny.gpt2(), [MaskWeights(0.0, fold=False)], tiny.text(), backend="eager")
    scheduler = MaskScheduler(compiled.program, 0.8, "movement", end=6, every=2, scope="global")
    optimizer = torch.optim.AdamW(compiled.program.module.parameters(), lr=1e-2)
    ids, losses = tiny.text(4, 9)["input_ids"], []
    for _ in range(10):
        logits = compiled.program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        scheduler.observe()
        optimizer.step()
        scheduler.step()
    assert losses[-1] < losses[0]
    folded = compiled.then([Fold()], backend="eager")
    zeros = {layer.layer: layer.zeros for layer in scheduler.layers}
    counts = {
        "transformer.h.0.attn.c_attn": 768,
        "transformer.h.0.attn.c_proj": 256,
        "transformer.h.0.mlp.c_fc": 1024,
        "transformer.h.0.mlp.c_proj": 1024,
    }
    assert list(zeros) == list(counts) and sum(zeros.values()) == round(0.8 * sum(counts.values()))
    assert sparsities(folded)[:4] == [zeros[name] / count for name, count in counts.items()]
