"""How much the outputs of a program depend on its numbers: diagonal Fisher information and first-order effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from ..calibration.lockstep import Lockstep
from ..errors import RewriteError
from ..graph import Program
from ..ops.attention import attention
from ..rewrite import Track

_PROBES = 256  # of all batches together: the relative error of each sum of squares is the root of 2 / 256

Loss = Callable[[Sequence[Tensor]], Tensor]
"""From the program's flat outputs on a batch to a number that is to stay low."""


def gradients(
    program: Program, names: Sequence[str], batches: Sequence[Sequence[Tensor]], loss: Loss | None, track: Track
) -> Iterator[dict[str, Tensor]]:
    """Gradients of weights, one set a batch and probe.

    With a loss they are its gradients. Without one they are those of the outputs' sum with random signs: the mean of
    their squares over the probes is the sum of the squares of all derivatives of the outputs, the Fisher information of
    a model whose outputs are known to within normal noise, and the curvature of the mean squared error to the outputs
    as they are (Hutchinson, 1989; Martens, 2020).
    """
    generator = torch.Generator().manual_seed(0)
    module = program.module
    fixed = {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    lockstep, judged = Lockstep(program, batches), _judged(program)
    probes = 1 if loss else max(1, -(-_PROBES // len(batches)))
    rounds = [index for index in range(len(batches)) for _ in range(probes)]
    for index in track(rounds, "measuring sensitivity"):
        live = {name: fixed[name].clone().requires_grad_() for name in names}
        with torch.enable_grad():
            outputs = functional_call(module, {**fixed, **live}, tuple(batches[index]))
            if loss:
                total = loss(outputs)
            else:
                total = sum((_signed(outputs[place], lockstep, index, generator) for place in judged), torch.zeros(()))
            found = torch.autograd.grad(total, list(live.values()), allow_unused=True)
        pairs = zip(names, found, strict=True)
        yield {name: torch.zeros_like(live[name]) if grad is None else grad for name, grad in pairs}


def _judged(program: Program) -> list[int]:
    """The outputs of floats, except for keys and values that the model hands on."""
    outputs: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
    found = [
        place
        for place, node in enumerate(outputs)
        if isinstance(node, fx.Node)
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].is_floating_point()
        and not any(user.target is attention for user in node.users)
    ]
    if not found:
        raise RewriteError("the program has no output of floats to measure sensitivity by; give a loss")
    return found


def _signed(output: Tensor, lockstep: Lockstep, index: int, generator: torch.Generator) -> Tensor:
    """The sum with random signs, without padding, in units of the output's length."""
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    real = lockstep.mask(output.shape[:-1], index)
    if real is not None:
        signs = signs * real.unsqueeze(-1)
    return (output * signs).sum() / output.detach().square().sum().sqrt().clamp(min=1e-12)


def fisher(
    program: Program, names: Sequence[str], batches: Sequence[Sequence[Tensor]], loss: Loss | None, track: Track
) -> dict[str, Tensor]:
    """The diagonal Fisher information of weights, up to one factor for all."""
    return _sums(_squared(found) for found in gradients(program, names, batches, loss, track))


def slopes(
    program: Program, names: Sequence[str], batches: Sequence[Sequence[Tensor]], loss: Loss, track: Track
) -> dict[str, Tensor]:
    """The gradients of a loss by weights, summed over batches."""
    return _sums(gradients(program, names, batches, loss, track))


def _squared(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.square() for name, grad in found.items()}


def _sums(sets: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for found in sets:
        for name, item in found.items():
            total[name] = total[name] + item if name in total else item
    return total
