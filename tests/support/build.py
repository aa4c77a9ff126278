"""Small programs for tests, and the check that every rewrite has to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.compiler.trace import trace
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program
from fxpress.ir.printer import print_program
from fxpress.ir.rewrite import Context, Pass, PassResult
from fxpress.ir.verify import verify


def module(function: Callable[..., Any], **weights: Tensor) -> nn.Module:
    """A module whose forward is `function(self, ...)`, with weights as parameters; one tensor given twice is tied."""
    made = type("Tiny", (nn.Module,), {"forward": function})()
    known: dict[int, nn.Parameter] = {}
    for name, tensor in weights.items():
        weight = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, tensor.is_floating_point())
        made.register_parameter(name, known.setdefault(id(tensor), weight))
    return made.eval()


def program(model: Callable[..., Any], *examples: Tensor, dynamic: Any = "auto", **weights: Tensor) -> Program:
    """Trace a module, or a function `f(self, x, ...)` that reads `weights` from self; every axis stays dynamic."""
    if not isinstance(model, nn.Module):
        model = module(model, **weights)
    return trace(model.eval(), (examples, {}), dynamic)


def normal(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers, the same at every call."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(traced: Program, base: int = 3) -> list[Tensor]:
    """Random inputs that fit a program, with sizes base, base + 1, ... on its dynamic axes."""
    symbols = list(traced.signature.ranges)
    made = []
    for index, spec in enumerate(traced.signature.inputs):
        shape = [base + symbols.index(size) if size in symbols else int(size) for size in spec.shape]
        value = normal(*shape, seed=index)
        made.append(value > -0.5 if spec.dtype == "bool" else value.to(getattr(torch, spec.dtype)))
    return made


def rewritten(traced: Program, rewrite: Pass, context: Context | None = None) -> tuple[Program, PassResult]:
    """A rewritten copy, verified before and after, and what the pass did."""
    verify(traced)  # before it is copied: what is checked once stays so in every copy
    after = traced.copy()
    verify(after)
    result = rewrite.apply(after, context or Context())
    verify(after)
    return after, result


def assert_equal(before: Program, after: Program, tensors: Sequence[Tensor]) -> None:
    """The meaning of equal, on given inputs."""
    with torch.no_grad():
        comparison = compare(after.run(tensors), before.run(tensors), run_float64(before, tensors))
    assert comparison.equal, comparison.reasons


def check(traced: Program, rewrite: Pass) -> tuple[Program, PassResult]:
    """Rewrite a copy: equal on two sizes of every axis, and a second run changes nothing."""
    after, result = rewritten(traced, rewrite)
    for base in (3, 6):
        assert_equal(traced, after, inputs(traced, base))
    text = print_program(after)
    again, second = rewritten(after, rewrite)
    assert second.changes == 0
    assert print_program(again) == text
    return after, result


def before_after(before: Program, after: Program, result: PassResult) -> str:
    """The golden text of a rewrite."""
    done = ", ".join(f"{name} {count}" for name, count in sorted(result.rewrites.items())) or "nothing"
    return f"{print_program(before)}\n---- {done}\n\n{print_program(after)}"


def reasons(result: PassResult, rule: str | None = None) -> list[str]:
    """The reasons of refusals, of one rule or all."""
    return [refusal.reason for refusal in result.refusals if rule in (None, refusal.rule)]
