"""Measured choice between the ways to run the products and attentions of a module, remembered on disk.

A call is measured the first time that one of its class comes: same operator, dtypes and epilogue, sizes that vary
within a power of two. Later calls of the class, in this process and others, run what was the fastest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from ...ir.graph import short_dtype
from ..memory import Memory, fastest
from .candidates import Way, attention_ways, configured_ways, full_precision, product_ways
from .graphs import recorded
from .machine_code import compile_launches

Run = Callable[[Way], Any]
Timer = Callable[[Callable[[], Any]], float]
OPTIONS = {"key_mask", "left", "right", "scale", "softcap", "sinks", "empty", "bias"}  # of attention
POSITIONS = ("out", "bias", "extra")  # of a product, after its operands
PRODUCT = {"extra", "kernels", "sums"}  # of a product, as generated
# Products with weights of a format of their own, and what lists the configurations of their kernels.
FORMATS = {"int4_matmul": "int4_configs", "float8_matmul": "float8_configs", "sparse24_matmul": "sparse24_configs"}
LIMIT = 4096  # sizes of calls whose way is kept: lengths may grow without end


def measured(call: Callable[[], Any]) -> float:
    """Milliseconds of a call on the GPU: the median of several, each after the L2 cache has been flushed.

    As a CUDA graph, as which it will mostly run: launches from Python would take longer than small kernels do.
    """
    call()
    with contextlib.suppress(RuntimeError):  # it waits for the GPU
        call = recorded(call)[0].replay
    found: float = triton.testing.do_bench(call, warmup=2, rep=10, return_mode="median")
    return found


def not_capturing() -> bool:
    """Whether work may be waited for: not while a CUDA graph is recorded."""
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def this_gpu() -> str:
    """What a measurement holds for: the GPU, its driver, and the versions of what makes kernels."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "of unknown version")()
    versions = f"driver {driver}, triton {triton.__version__}, torch {torch.__version__}, cuda {torch.version.cuda}"
    return f"{torch.cuda.get_device_name()}; {versions}"


@dataclass
class Choice:
    """What runs calls of one class."""

    operator: str
    sizes: str
    chosen: str
    milliseconds: Mapping[str, float | None]  # of each way; None: it failed; empty where there is only one
    calls: int = 0  # different calls of the class, by their sizes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return {
            "operator": self.operator, "sizes": self.sizes, "chosen": self.chosen,
            "milliseconds": dict(self.milliseconds), "calls": self.calls,
        }  # fmt: skip


class Tuner:
    """Chooses for the calls of one module.

    Args:
        timer: from a call to its milliseconds.
        memory: where measurements are remembered; None: the user's cache folder.
        place: what measurements hold for, a part of each key; None: the GPU that is here.
        ready: whether something can be measured now; else what is not known runs its module's own way.
    """

    def __init__(
        self,
        timer: Timer = measured,
        memory: Memory | None = None,
        place: str | None = None,
        ready: Callable[[], bool] = not_capturing,
    ) -> None:
        self._ready, self._compiling = ready, False
        self._timer, self._memory = timer, memory or Memory("triton")
        self._remembered = self._memory.read()
        self._place = place or this_gpu()
        self._ways: dict[Any, Callable[..., Any]] = {}  # by exact sizes
        self._choices: dict[str, Choice] = {}  # by class

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What was chosen so far, in the order of the first calls, for the report."""
        return [choice.as_dict() for choice in self._choices.values()]

    def attach(self, module: ModuleType, forms: Mapping[str, str]) -> None:
        """Let the calls of a generated module be chosen.

        Args:
            forms: of the epilogues of products that are "plain" or "bias", by the kernel's name.
        """
        known = vars(module)
        if "matmul" in known:
            matmul = known["matmul"]
            known["matmul"] = functools.partial(self._product, module, matmul, forms)
        if "attention" in known:
            attention = known["attention"]
            known["attention"] = functools.partial(self._attention, module, attention)
        for name, configs in FORMATS.items():
            if name in known:
                known[name] = functools.partial(self._formatted, module, configs, known[name])

    def _product(
        self,
        module: ModuleType,
        matmul: Callable[..., Any],
        forms: Mapping[str, str],
        x: Tensor,
        w: Tensor,
        *others: Any,
        **given: Any,
    ) -> Any:
        given |= zip(POSITIONS, others, strict=False)
        given = {name: item for name, item in given.items() if item is not None}
        if given.get("precision") == "ieee":  # as every product of a generated module is
            del given["precision"]
        if not {"extra", "kernels"} <= given.keys() <= PRODUCT or x.numel() == 0 or w.numel() == 0:
            return matmul(x, w, **given)
        name = given["kernels"][0].__name__
        key = (name, x.shape, x.stride(), w.shape, w.stride(), x.data_ptr() % 16, w.data_ptr() % 16, full_precision())
        if key not in self._ways:
            ways = product_ways(module, matmul, forms.get(name.removesuffix("_whole")), x, w, **given)
            (rows, inner), columns = x.shape[-2:], w.shape[-2]
            count = x.shape[:-2].numel() if w.dim() == 2 else w.shape[:-2].numel()
            types = " x ".join(dict.fromkeys(map(_type, (x, w))))
            sizes = f"{types} [{_class(count)}, {_class(rows)}, {inner}] x [{columns}, {inner}]"
            kernel = digest(*given["kernels"])
            way = self._choose(module, name, sizes, kernel, ways, lambda way: way.run(x, w, **given))
            if way is None:
                return matmul(x, w, **given)
            self._remember(key, way)
        return self._ways[key](x, w, **given)

    def _formatted(
        self, module: ModuleType, configs: str, function: Callable[..., Any], x: Tensor, w: Tensor, **given: Any
    ) -> Any:
        if not {"extra", "kernels"} <= given.keys() or x.numel() == 0 or w.numel() == 0:
            return function(x, w, **given)
        kernel = given["kernels"][0]
        facts = {name: item for name, item in given.items() if name not in PRODUCT}
        exact = (kernel.__name__, _exact(x), _exact(w), *((name, _exact(item)) for name, item in facts.items()))
        if exact not in self._ways:
            ways = configured_ways(module, configs, function, x, w, given.get("dense"))
            rows, inner = _class(x.shape[:-1].numel()), x.shape[-1]
            options = "".join(f", {name}={_said(item)}" for name, item in facts.items() if item is not None)
            sizes = f"{_type(x)} x {_type(w)} [{rows}, {inner}] x [{w.shape[0]}, {inner}]{options}"
            run: Run = lambda way: way.run(x, w, **given)  # noqa: E731
            way = self._choose(module, kernel.__name__, sizes, digest(*given["kernels"]), ways, run)
            if way is None:
                return function(x, w, **given)
            self._remember(exact, way)
        return self._ways[exact](x, w, **given)

    def _attention(
        self,
        module: ModuleType,
        attention: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Any,
        **given: Any,
    ) -> Any:
        if others or not given.keys() <= OPTIONS:  # a window, or a bias that the kernel computes
            return attention(query, key, value, *others, **given)
        exact = tuple(map(_exact, (query, key, value))) + tuple((name, _exact(item)) for name, item in given.items())
        exact = (*exact, full_precision())
        if exact not in self._ways:
            ways = attention_ways(module, attention, query, key, value, **given)
            batch, heads, rows, size = query.shape
            options = "".join(f", {name}={_reach(name, item)}" for name, item in given.items() if item is not None)
            run: Run = lambda way: way.run(query, key, value, **given)  # noqa: E731
            queries = f"{_type(query)} [{_class(batch)}, {heads}, {_class(rows)}, {size}]"
            sizes = f"{queries} x [{key.shape[1]}, {_class(key.shape[2])}, {value.shape[3]}]{options}"
            way = self._choose(module, "attention", sizes, digest(module.attention_kernel), ways, run)
            if way is None:
                return attention(query, key, value, **given)
            self._remember(exact, way)
        return self._ways[exact](query, key, value, **given)

    def _remember(self, exact: Any, way: Callable[..., Any]) -> None:
        if len(self._ways) >= LIMIT:
            self._ways.clear()
        self._ways[exact] = way

    def _choose(
        self, module: ModuleType, operator: str, sizes: str, kernel: str, ways: Sequence[Way], run: Run
    ) -> Callable[..., Any] | None:
        """The fastest way for a class of calls: as remembered, else measured on one of them, which `run` runs; None:
        it is not known, and nothing can be measured now."""
        by_name = {way.name: way for way in ways}
        key = f"{operator} {kernel}: {sizes} as {'; '.join(by_name)} on {self._place}"
        if key not in self._choices:
            times = self._known(key, by_name) if len(by_name) > 1 else {}
            if times is None and (self._compiling or not self._ready()):
                return None
            times = self._measure(module, key, ways, run) if times is None else times
            self._choices[key] = Choice(operator, sizes, fastest(times) if times else ways[0].name, times)
        choice = self._choices[key]
        choice.calls += 1
        return by_name[choice.chosen].run

    def _known(self, key: str, wanted: Mapping[str, Way]) -> dict[str, float | None] | None:
        """Times from the disk, if they are of all ways."""
        found = self._remembered.get(key)
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            return None
        return found if all(map(_is_time, found.values())) and any(found.values()) else None

    def _measure(self, module: ModuleType, key: str, ways: Sequence[Way], run: Run) -> dict[str, float | None]:
        times: dict[str, float | None] = {}
        self._compiling = True
        try:
            compile_launches(module, [functools.partial(run, way) for way in ways])
        finally:
            self._compiling = False
        for number, way in enumerate(ways):
            try:
                with warnings.catch_warnings(action="ignore"):  # PyTorch lists why a library does not take a call
                    times[way.name] = self._timer(functools.partial(run, way))
            except (RuntimeError, TritonError):
                if number == 0:
                    raise  # the module's own way: nothing else may hide what is wrong with it
                times[way.name] = None
        self._memory.write({key: times})
        return times


def _is_time(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0)


def _type(tensor: Tensor) -> str:
    last = "" if tensor.stride(-1) == 1 else "^T"
    return short_dtype(tensor.dtype) + last


def _class(size: int) -> str:
    """Sizes up to the next power of two are one class."""
    return f"<={triton.next_power_of_2(size)}"


def _exact(item: Any) -> Any:
    """An argument as a part of what calls are told apart by."""
    return (item.shape, item.stride(), item.dtype) if isinstance(item, Tensor) else item


def _said(item: Any) -> str:
    """An option in the description of a class: of a tensor the dtype and the number of its axes."""
    return f"{short_dtype(item.dtype)}[{item.dim()}]" if isinstance(item, Tensor) else str(item)


def _reach(name: str, item: Any) -> str:
    """`_said` of an option of attention: an end of its band lies further off with each token that a cache holds."""
    return _class(item) if name in ("left", "right") and item > 0 else _said(item)


def digest(*kernels: Any) -> str:
    """A short digest of the text of kernels and of the functions that they call."""
    texts: dict[str, str] = {}
    left = list(kernels)
    while left:
        function = left.pop()
        if function.__name__ not in texts:
            texts[function.__name__] = inspect.getsource(function.fn)
            called = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
            left += [item for item in called if hasattr(item, "fn") and hasattr(item, "run")]
    return hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:12]
