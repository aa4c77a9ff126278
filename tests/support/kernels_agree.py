"""Generated Triton kernels beside eager PyTorch: the check that every lowering has to pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from build import program
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxpress.backends.triton.runner import TritonRunner, interpreted
from fxpress.ir.equality import compare, run_float64
from fxpress.ir.graph import Program


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN, or as small as an integer can be: an element that no kernel writes is seen."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        found = empty(*args, **kwargs)
        if found.dtype.is_floating_point:
            return found.fill_(float("nan"))
        if found.dtype is torch.uint8:
            return found.fill_(255)  # memory that results take turns in: NaN as floats
        return found.fill_(True if found.dtype is torch.bool else torch.iinfo(found.dtype).min)

    with mock.patch.object(torch, "empty", filled):
        yield


def agree(traced: Program, *batches: Sequence[Tensor]) -> TritonRunner:
    """Assert that the kernels of a program give what eager PyTorch does, on each batch; inputs stay as they are.

    With TRITON_INTERPRET=0 the kernels run on a GPU, and are compared with PyTorch on the CPU all the same.
    """
    runner = made_of(traced)
    for batch in batches:
        found = ran(runner, batch)
        with torch.no_grad():
            eager = list(traced.run(batch))
        verdict = compare(found, eager, run_float64(traced, batch))
        assert verdict.equal, verdict.reasons
    return runner


def made_of(traced: Program) -> TritonRunner:
    """The kernels of a program, for the interpreter or the GPU."""
    return TritonRunner(traced if interpreted() else on_gpu(traced))


def ran(runner: TritonRunner, batch: Sequence[Tensor]) -> list[Any]:
    """What kernels give, on the CPU; their inputs stay as they are."""
    read = placed(batch)
    given = [tensor.clone() for tensor in read]
    with poisoned():
        found = runner.run(read)
    assert all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(read, given, strict=True))
    return [item.cpu() if isinstance(item, Tensor) else item for item in found]


def placed(batch: Sequence[Tensor]) -> list[Tensor]:
    """Tensors where kernels read them."""
    return list(batch) if interpreted() else [tensor.cuda() for tensor in batch]


def on_gpu(traced: Program) -> Program:
    """A copy of a program as if it had been traced on the GPU."""
    moved, gpu = traced.copy(), torch.device("cuda", torch.cuda.current_device())

    def there(item: Any) -> Any:
        if isinstance(item, FakeTensor):
            with item.fake_mode:
                return item.to(gpu)
        return gpu if isinstance(item, torch.device) else item

    for node in moved.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, there)
        node.kwargs = fx.node.map_aggregate(node.kwargs, there)
        if "val" in node.meta:
            node.meta["val"] = fx.node.map_aggregate(node.meta["val"], there)
    for holder in moved.module.modules():
        for name, weight in list(holder.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(holder, name, nn.Parameter(weight.detach().cuda(), requires_grad=weight.requires_grad))
        for name, constant in list(holder.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(holder, name, constant.cuda())
    return moved


def _bytes(tensor: Tensor) -> Tensor:
    """NaN equals itself as bytes, and dtypes that torch.equal does not know are compared, too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _copies(count: int) -> Callable[..., Any]:
    """A function of so many named tensors, as the tracer wants them, that gives copies of them."""
    names = [f"x{number}" for number in range(count)]
    known: dict[str, Any] = {}
    exec(f"def copies(self, {', '.join(names)}): return [{', '.join(f'{name}.clone()' for name in names)}]", known)
    return known["copies"]  # type: ignore[no-any-return]


def calling(target: Callable[..., Any], *args: Any, dynamic: Any = None, **kwargs: Any) -> tuple[Program, list[Tensor]]:
    """A program of one call, whose inputs are the tensors among its arguments; and these."""
    tensors: list[Tensor] = []
    fx.node.map_aggregate((args, kwargs), lambda item: tensors.append(item) if isinstance(item, Tensor) else None)
    made = program(_copies(len(tensors)), *tensors, dynamic=dynamic)
    output = made.graph.output_node()
    places = iter([node for node in made.graph.nodes if node.op == "placeholder"])
    arguments, options = fx.node.map_aggregate(
        (args, kwargs), lambda item: next(places) if isinstance(item, Tensor) else item
    )
    called = made.call(target, *arguments, before=output, **options)
    parts = called.meta["val"]
    if isinstance(parts, list | tuple):
        output.args = ([made.call(operator.getitem, called, number, before=output) for number in range(len(parts))],)
    else:
        output.args = ([called],)
    made.clean()
    return made, tensors
