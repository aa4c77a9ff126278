"""What dynamo hands over, read: which argument is a weight, an input or a size; its graph traced to ATen operators."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module

from ...ir.errors import TraceError, one_line
from ...ir.graph import arguments, attribute, identifier, source_of
from ...ir.signature import describe
from .mixed import mixed
from .plain import PlainInterpreter

aten = torch.ops.aten
WEIGHT, INPUT, SIZE = "weight", "input", "size"
PASSED_THROUGH = ("cond", "while_loop")  # control flow that may stand in a Program; its bodies are left as they are


@dataclass(frozen=True)
class Argument:
    """One argument of dynamo's graph, or a tensor that the graph keeps as an attribute.

    Attributes:
        name: of a weight its dotted path in the model, of others an identifier.
        kind: WEIGHT, INPUT (a tensor) or SIZE (an integer).
        fake: its fake value, symbolic where dynamo lets it vary.
        attribute: the name of the graph's attribute; None: an argument.
    """

    name: str
    kind: str
    fake: Any
    attribute: str | None = None


@dataclass(frozen=True)
class Captured:
    """Dynamo's graph in ATen operators as torch.export gives them, not functional yet: a placeholder an argument.

    `kept` are the tensors that the graph has as attributes: its last arguments. `switches`: whether gradients are
    switched on or off in it.
    """

    arguments: tuple[Argument, ...]
    kept: tuple[Tensor, ...]
    module: fx.GraphModule
    fake_mode: FakeTensorMode
    switches: bool


def read_arguments(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Argument], FakeTensorMode]:
    """The arguments of dynamo's graph, then its tensor attributes.

    Raises:
        TraceError: one that no Program can have, with the reason.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta.get("example_value") for node in placeholders]
    known = [fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)]
    mode = known[0] if known else FakeTensorMode(shape_env=ShapeEnv())
    taken: set[str] = set()
    found = []
    for node, value, fake in zip(placeholders, inputs, fakes, strict=True):
        source = source_text(node)
        if isinstance(value, Tensor):
            _check_tensor(value, source or str(node.target))
            weight = any(part in source for part in ("_parameters[", "_buffers["))  # of a module, not just given
            name = _unique(".".join(_path(source)) if weight else "_".join(_path(source)), node, taken)
            if not isinstance(fake, FakeTensor):
                fake = mode.from_tensor(value.detach(), static_shapes=True)
            found.append(Argument(name, WEIGHT if weight else INPUT, fake))
        elif isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            found.append(Argument(_unique("_".join(_path(source)), node, taken), SIZE, _size(fake, value)))
        else:
            raise TraceError(f"input {source or node.target} is {describe(value)}, neither a tensor nor an integer")
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        _check_tensor(tensor, name)
        fake = mode.from_tensor(tensor.detach(), static_shapes=True)
        found.append(Argument(_unique(name, None, taken), WEIGHT, fake, name))
    return found, mode


def _size(fake: Any, value: Any) -> Any:
    return fake if isinstance(fake, torch.SymInt) else int(value)


def concrete(value: Any) -> Any:
    """An argument as the first call has it: dynamo gives sizes as symbols.

    Raises:
        TraceError: a size that depends on values.
    """
    if not isinstance(value, torch.SymInt):
        return value
    if not value.node.has_hint():
        raise TraceError("one of its inputs is a size that is known only when it runs")
    return int(value.node.hint)


def source_text(node: fx.Node) -> str:
    """Where dynamo found an argument: `L['self']._modules['up']._parameters['weight']`."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


# Through `__dict__` dynamo finds the parts of a module that has set an attribute before it reads them.
_OWN = ("__dict__", "_modules", "_parameters", "_buffers", "L", "G")


def _path(source: str) -> list[str]:
    """`['up', 'weight']`: the names in a source, without what PyTorch adds."""
    names = ["".join(parts) for parts in re.findall(r"\['([^']+)'\]|(?:^|\.)(\w+)|\[(\d+)\]", source)]
    kept = [name for name in names if name not in _OWN]
    return kept[1:] if len(kept) > 1 and kept[0] == "self" else kept


def _unique(name: str, node: fx.Node | None, taken: set[str]) -> str:
    name = identifier(name or str(node.target if node is not None else "tensor"))
    parts = [f"_{part}" if hasattr(fx.GraphModule, part) else part for part in name.split(".")]
    name = "_self" if name == "self" else ".".join(parts)
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


def _check_tensor(value: Tensor, name: str) -> None:
    """Refuse tensors that are more than numbers in memory."""
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TraceError(f"{name} is a {type(value).__name__}, of which fxpress knows nothing")
    if value.layout is not torch.strided or value.is_quantized:
        raise TraceError(f"{name} is a {value.layout} tensor; fxpress takes dense ones")
    if value.device.type not in ("cpu", "cuda"):
        raise TraceError(f"{name} is on {value.device}; fxpress runs on CPUs and on CUDA")
    if value.is_conj() or value.is_neg() or value.is_complex():
        raise TraceError(f"{name} has complex numbers (or is a view of some)")


def autocasting(gm: fx.GraphModule) -> bool:
    """Whether PyTorch chooses dtypes operator by operator, around a graph or in a part of it."""
    around = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return around or any(getattr(node.target, "__name__", "") == "_enter_autocast" for node in gm.graph.nodes)


def check_graph(gm: fx.GraphModule, dtype: torch.dtype | None) -> None:
    """Refuse what can be seen in dynamo's graph before it is traced.

    Raises:
        TraceError: the reason.
    """
    if torch.is_autocast_enabled("cuda"):
        raise TraceError("autocast is on for CUDA: PyTorch chooses the dtype of each operator")
    if dtype is not None and autocasting(gm):
        raise TraceError("autocast is on, which chooses the dtypes, and the option dtype would choose others")
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            target: Any = node.target
            if isinstance(target, torch._ops.HigherOrderOperator) and target.name() not in PASSED_THROUGH:
                raise TraceError(f"it has the higher-order operator {target.name()}{source_of(node)}")


def _transforms(gm: fx.GraphModule) -> bool:
    """Whether a graph has transforms of torch.func."""
    homes = [str(getattr(node.target, "__module__", "")) for node in gm.graph.nodes]
    return any(home.startswith(("torch._functorch", "torch._C._functorch")) for home in homes)


def capture(
    gm: fx.GraphModule, found: Sequence[Argument], mode: FakeTensorMode, dtype: torch.dtype | None = None
) -> Captured:
    """Trace dynamo's graph to ATen operators before decomposition; composite ones stay whole.

    Args:
        dtype: of its matrix products; None: as they are.

    Raises:
        TraceError: it cannot be traced, or holds what a Program cannot; with the reason.
    """
    count = sum(argument.attribute is None for argument in found)
    attributes = [str(argument.attribute) for argument in found[count:]]

    def run(*values: Any) -> Any:
        with _reparametrize_module(gm, dict(zip(attributes, values[count:], strict=True))):
            return mixed(gm, PlainInterpreter(gm).run, dtype)(*values[:count])

    try:
        with torch.no_grad(), mode, fx.traceback.preserve_node_meta():
            fakes = [_fresh(argument.fake) for argument in found]
            # Below the dispatcher's first level transforms of torch.func are gone and the casts of autocast are there;
            # composite operators are taken apart.
            traced = make_fx(run, pre_dispatch=not (_transforms(gm) or autocasting(gm)))(*fakes)
    except Exception as error:
        cause = one_line(error)
        if "_local_scalar_dense" in cause:
            cause = "it takes a number from a tensor (.item()), as dynamo does with every float that varies"
        raise TraceError(f"its graph cannot be traced: {cause}") from error
    module = fx.GraphModule(traced, traced.graph)
    switches = any(node.target is torch._C._set_grad_enabled for node in module.graph.nodes)
    _tidy(module, mode)
    return Captured(tuple(found), kept_tensors(gm, found), module, mode, switches)


def kept_tensors(gm: fx.GraphModule, found: Sequence[Argument]) -> tuple[Tensor, ...]:
    """The tensors that dynamo's graph has as attributes, as arguments."""
    return tuple(attribute(gm, argument.attribute) for argument in found if argument.attribute is not None)


def _fresh(fake: Any) -> Any:
    """A fake tensor of its own: tracing may change metadata in place, and dynamo still needs its own."""
    if not isinstance(fake, Tensor):
        return fake
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


def _tidy(module: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Drop the switches of gradient mode, give constants their fake values and modules their paths."""
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            module.graph.erase_node(node)
            continue
        if node.op == "get_attr":  # a constant; make_fx gives it a value of another mode
            constant = getattr(module, str(node.target))
            if isinstance(constant, fx.GraphModule):
                if random_calls(constant.graph):
                    raise TraceError("a branch or loop in it draws random numbers")
                continue
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (".".join(_path(str(entry[0]))).removeprefix("self."), entry[1]) for key, entry in stack.items()
            }


def has_branches(graph: fx.Graph) -> bool:
    """Whether a graph has control flow."""
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.nodes)


def random_calls(graph: fx.Graph) -> list[fx.Node]:
    """The calls that draw random numbers, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and _is_random(node)]


def _is_random(node: fx.Node) -> bool:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = arguments(node)
    if given.get("train") is False or given.get("training") is False:
        return False
    return not any(given.get(name) == 0 for name in ("dropout_p", "p", "dropout"))


def keeps_statistics(graph: fx.Graph) -> fx.Node | None:
    """A normalization that changes its running statistics, which no schema says; None: there is none."""
    for node in graph.nodes:
        if node.op == "call_function" and "norm" in str(node.target) and isinstance(node.target, torch._ops.OpOverload):
            given = arguments(node)
            training = given.get("training", given.get("use_input_stats", False))
            if training and given.get("running_mean") is not None:
                found: fx.Node = node
                return found
    return None


def first_line(gm: fx.GraphModule) -> str:
    """The first line of the user's code in dynamo's graph, else the line at which the graph ends."""
    for node in gm.graph.nodes:
        if node.op.startswith("call") and (found := source_of(node)):
            return found.strip()[1:-1]
    if torch._guards.TracingContext.try_get() is not None:
        frames = [*torch._guards.TracingContext.extract_stack()]
        if frames:
            return f"{Path(frames[0].filename).name}:{frames[0].lineno}: {frames[0].line or frames[0].name}"
    return ""


def calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The operators of dynamo's graph."""
    return (node for node in gm.graph.nodes if node.op.startswith("call"))
