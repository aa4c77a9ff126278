"""Comparing a module under torch.compile(backend="fxpress") with itself in eager PyTorch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpress
from fxpress.compiler.dynamo.report import Reports
from fxpress.ir.equality import compare, widen

Call = Callable[..., Any]


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Without what dynamo compiled before, and without the reports of it."""
    torch._dynamo.reset()
    fxpress.reports(clear=True)
    yield
    torch._dynamo.reset()


def clones(value: Any) -> Any:
    """Copies of the tensors of a structure; one that stands twice in it stays one."""
    known: dict[int, Tensor] = {}

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return known[id(leaf)]

    return pytree.tree_map(clone, value)


def wide(value: Any) -> Any:
    """A structure with its float tensors in fp64."""
    return pytree.tree_map(lambda leaf: widen(leaf).detach().requires_grad_(leaf.requires_grad)
                           if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value)  # fmt: skip


def state(module: Any, args: Any) -> list[Any]:
    """Everything that a call may have changed."""
    found = [*module.state_dict().values()] if isinstance(module, nn.Module) else []
    return [*found, *(leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))]


def gradients(module: Any, args: Any) -> list[Any]:
    """The gradients of parameters and inputs."""
    found = [*module.parameters()] if isinstance(module, nn.Module) else []
    leaves = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    return [leaf.grad for leaf in [*found, *leaves] if leaf.requires_grad]


def backward(result: Any) -> None:
    """The gradients of a sum that weighs each number of the outputs differently."""
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    total = sum((leaf * torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)).sum()
                for leaf in leaves)  # fmt: skip
    if isinstance(total, Tensor):
        total.backward()


def run(call: Call, owner: Any, args: Sequence[Any], train: bool) -> list[Any]:
    """The outputs of a call, what it changed, and its gradients."""
    if isinstance(owner, nn.Module):
        owner.zero_grad()
    torch.manual_seed(0)
    with contextlib.nullcontext() if train else torch.no_grad():
        result = call(*args)
    if train:
        backward(result)
    return [*pytree.tree_leaves(result), *state(owner, args), *(gradients(owner, args) if train else [])]


def assert_equal(
    model: Any, *calls: Sequence[Any], options: dict[str, Any] | None = None, train: bool = False, **settings: Any
) -> Reports:
    """Check a module or function under torch.compile against itself, call by call; gives the graphs' reports.

    Outputs, inputs and buffers afterwards, and with `train` gradients are equal by ir/equality; whatever does not run
    as it was asked has a reason.
    """
    options = {"backend": "eager", **(options or {})}
    is_module = isinstance(model, nn.Module)
    ours = copy.deepcopy(model) if is_module else model
    truth = copy.deepcopy(model).double() if is_module else model
    compiled = torch.compile(ours, backend="fxpress", options=options, **settings)
    for args in calls:
        own, judge = clones(args), wide(clones(args))
        usual = run(model, model, clones(args), train)
        usual_default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            exact = run(truth, truth, judge, train)
        finally:
            torch.set_default_dtype(usual_default)
        found = run(compiled, ours, own, train)
        verdict = compare(found, usual, exact)
        assert verdict.equal, verdict.reasons
    reports = fxpress.reports()
    for report in reports:
        taken = "onnx" if options["backend"] == "auto" else options["backend"]
        assert report.runner == taken or report.reason, report
    return reports
