"""Masks that grow under transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..ir.errors import InputError
from ..ir.pruning.schedule import MaskScheduler
from ..ir.signature import describe
from . import hf

STATE = "mask_scheduler.pt"


def mask_callback(scheduler: MaskScheduler) -> Any:
    """A transformers.TrainerCallback that lets a schedule follow a Trainer.

        trainer = Trainer(model, ..., callbacks=[mask_callback(scheduler)])

    The schedule counts the optimizer's steps, whatever the accumulation of gradients; it sees them clipped, as the
    optimizer does. The log has `sparsity`. The Trainer's checkpoints get the schedule's state, and a Trainer that
    resumes from one in its `output_dir` loads it. Leave `load_best_model_at_end` off: the best model by loss is likely
    to be from before the end of the ramp, with fewer masked.

    Raises:
        InputError: transformers is missing, or this is no schedule; in training, what the schedule raises, and a
            training that is too short for it.
    """
    if not isinstance(scheduler, MaskScheduler):
        raise InputError(f"mask_callback needs a MaskScheduler, found {describe(scheduler)}")
    transformers = hf.import_transformers()
    return type("MaskCallback", (_Events, transformers.TrainerCallback), {})(scheduler)


class _Events:
    """The events of a TrainerCallback that a schedule follows; `state` is the Trainer's."""

    def __init__(self, scheduler: MaskScheduler) -> None:
        self.scheduler = scheduler

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load what a checkpoint has; refuse a training that ends before the schedule."""
        file = _checkpoint(args, state) / STATE
        if state.global_step and state.global_step != self.scheduler.steps:
            if not file.is_file():
                raise InputError(
                    f"the Trainer resumes at step {state.global_step}, the schedule stands at {self.scheduler.steps}, "
                    f"and there is no {str(file)!r}; call the scheduler's load_state_dict() first"
                )
            self.scheduler.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        left = state.max_steps - state.global_step
        if self.scheduler.steps + left < self.scheduler.end:
            raise InputError(
                f"training ends after {left} steps, the schedule after {self.scheduler.end - self.scheduler.steps}: "
                "its sparsity would not be reached; give it another end"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gradients are complete and clipped."""
        self.scheduler.observe()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before any evaluation, log or checkpoint of the step."""
        self.scheduler.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """For the callbacks behind this one, as the one that prints is; and for the Trainer's own history."""
        share = round(self.scheduler.sparsity_now, 6)
        if logs is not None:
            logs["sparsity"] = share
        if state.log_history:
            state.log_history[-1]["sparsity"] = share

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the optimizer's state."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.scheduler.state_dict(), folder / STATE)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder that a Trainer keeps a step's checkpoint in."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
