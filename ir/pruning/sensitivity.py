"""How much the outputs of a program depend on its weights and on what its layers give.

Without a loss, sensitivity is that of the vectors of the outputs, each in units of its own length, with random signs:
the mean square of such a derivative over many signs is the sum of the squares of the derivatives of all outputs, the
Fisher information of a model whose outputs are known to within normal noise, and the curvature of the squared error to
the outputs as they are (Hutchinson, 1989; Martens, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from ..calibration.lockstep import BatchError, Lockstep
from ..errors import RewriteError
from ..graph import Program, describe_value
from ..ops.attention import attention
from ..rewrite import Track

_PROBES = 256  # of all batches together: the relative error of each sum of squares is the root of 2 / 256
_ACTIVATION_PROBES = 32  # each token gives derivatives of its own

Loss = Callable[[Sequence[Tensor]], Tensor]
"""From the program's flat outputs on a batch to a number that is to stay low."""


def gradients(
    program: Program, names: Sequence[str], batches: Sequence[Sequence[Tensor]], loss: Loss | None, track: Track
) -> Iterator[dict[str, Tensor]]:
    """Gradients of weights by the loss, or by the outputs with random signs: one set a batch and probe."""
    module, judge = program.module, _Judge(program, batches, loss)
    fixed = {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    rounds = [index for index in range(len(batches)) for _ in range(judge.probes(_PROBES))]
    for index in track(rounds, "measuring sensitivity"):
        live = {name: fixed[name].clone().requires_grad_() for name in names}
        with torch.enable_grad():
            with _located(program, batches[index]):
                outputs = functional_call(module, {**fixed, **live}, tuple(batches[index]))
            total = judge(outputs, index)
            found: Any = [None] * len(live)
            if live and total.requires_grad:
                found = torch.autograd.grad(total, list(live.values()), allow_unused=True)
        pairs = zip(names, found, strict=True)
        yield {name: torch.zeros_like(live[name]) if grad is None else grad for name, grad in pairs}


@dataclass
class Reach:
    """How far what a layer gives reaches the outputs.

    Attributes:
        tokens: of each batch [T], the mean square of the derivatives by a token's numbers together, without padding.
        channels: [N, N], the products of the derivatives by two channels, summed over tokens.
    """

    tokens: list[Tensor] = field(default_factory=list)
    channels: Tensor = field(default_factory=lambda: torch.zeros(()))


def reach(
    program: Program, layers: Sequence[fx.Node], batches: Sequence[Sequence[Tensor]], loss: Loss | None, track: Track
) -> dict[fx.Node, Reach]:
    """The reach of what layers give, [..., N] each."""
    judge = _Judge(program, batches, loss)
    found = {layer: Reach() for layer in layers}
    probes = judge.probes(_ACTIVATION_PROBES)
    fixed = {name: tensor.detach() for name, tensor in program.module.named_parameters()}
    for index in track(list(range(len(batches))), "measuring sensitivity"):
        recorder = _Recorder(program.module, layers, fixed)
        with torch.enable_grad():
            with _located(program, batches[index]):
                outputs = recorder.run(*batches[index])
            totals = [judge(outputs, index) for _ in range(probes)] if layers else []
        for place, total in enumerate(totals):
            grads = torch.autograd.grad(
                total, list(recorder.seen.values()), retain_graph=place < probes - 1, allow_unused=True
            )
            for layer, value, grad in zip(recorder.seen, recorder.seen.values(), grads, strict=True):
                found_grad = torch.zeros_like(value) if grad is None else grad
                rows = judge.lockstep.unpadded(layer, found_grad, index).detach().float()
                squares = rows.square().sum(1) / probes
                if place == 0:
                    found[layer].tokens.append(squares)
                else:
                    found[layer].tokens[-1] += squares
                found[layer].channels = found[layer].channels + rows.T @ rows / probes
    return found


@contextmanager
def _located(program: Program, batch: Sequence[Tensor]) -> Iterator[None]:
    """Where the program fails on a batch, it fails node by node too, which says at which."""
    try:
        yield
    except (LookupError, RuntimeError, ValueError):
        Lockstep(program, [batch]).run(lambda node: None)
        raise


class _Recorder(fx.Interpreter):
    """Runs a module and keeps what some nodes give, for derivatives; weights have none."""

    def __init__(self, module: fx.GraphModule, layers: Sequence[fx.Node], fixed: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.layers, self.fixed = frozenset(layers), fixed
        self.seen: dict[fx.Node, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fixed[target] if target in self.fixed else super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.layers:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.seen[n] = value
        return value


class _Judge:
    """From a batch's outputs to the number whose derivatives are taken."""

    def __init__(self, program: Program, batches: Sequence[Sequence[Tensor]], loss: Loss | None) -> None:
        self.lockstep, self._loss = Lockstep(program, batches), loss
        self._batches = len(batches)
        self._places = [] if loss else _judged(program)
        self._nodes: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
        self._generator = torch.Generator().manual_seed(0)

    def probes(self, wanted: int) -> int:
        """How many times each batch is looked at, so that there are so many derivatives in all."""
        return 1 if self._loss else max(1, -(-wanted // self._batches))

    def __call__(self, outputs: Sequence[Any], index: int) -> Tensor:
        total = self._total(outputs, index)
        if not bool(total.detach().isfinite().all()):
            raise BatchError(
                "gives outputs, or a loss, of NaN or infinity, if not a weight does", self.lockstep.batches[index]
            )
        return total

    def _total(self, outputs: Sequence[Any], index: int) -> Tensor:
        if self._loss is not None:
            total = self._loss(outputs)
            if not isinstance(total, Tensor) or total.numel() != 1:
                raise RewriteError(f"the loss must be a tensor of one number, found {describe_value(total)}")
            if not total.requires_grad:
                raise RewriteError("the loss does not depend on the weights")
            return total
        signed = (self._signed(self._nodes[place], outputs[place], index) for place in self._places)
        return sum(signed, torch.zeros(()))

    def _signed(self, node: fx.Node, output: Tensor, index: int) -> Tensor:
        """The sum of the vectors' numbers with random signs, without padding, each vector in units of its length."""
        signs = torch.randint(0, 2, output.shape, generator=self._generator).to(output) * 2 - 1
        real = self.lockstep.mask(node, index) if output.dim() == 3 else None
        if real is not None:
            signs = signs * real.unsqueeze(-1)
        length = output.detach().norm(dim=-1, keepdim=True) if output.dim() else output.detach().abs()
        return (output * signs / length.clamp(min=1e-12)).sum()


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
