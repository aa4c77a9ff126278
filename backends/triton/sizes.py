"""Sizes and indices as sympy expressions, and their text in generated code."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv, Mod
from torch.utils._sympy.printers import PythonPrinter

from ...ir.errors import LoweringError
from ...ir.graph import Program, describe_value, short_dtype, size_text, source_of
from ...ir.printer import target_name

_PRINTER = PythonPrinter()
HINT = 64  # of a size that no example shows


class Size(int):
    """A size of a program that was read from data: what it was in the example, and what it is."""

    expression: sympy.Expr

    def __new__(cls, expression: sympy.Expr, hint: int) -> Size:
        """`hint` is the size in the example."""
        found = super().__new__(cls, hint)
        found.expression = expression
        return found

    def __str__(self) -> str:
        return str(self.expression)


class Described(Tensor):
    """A tensor of a program that was read from data: dtype, sizes, strides and device are known, and nothing else.

    PyTorch's fake tensors can be computed with, too: for that they load modules for a second, and an environment of
    shapes for each program.
    """

    _sizes: tuple[int, ...]
    _steps: tuple[int, ...]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Described:
        """Sizes and strides, in elements, are an int or a `Size` each."""
        hints, steps = [int(size) for size in shape], [int(step) for step in stride]
        found: Described = torch.Tensor._make_wrapper_subclass(cls, hints, strides=steps, dtype=dtype, device=device)
        found._sizes, found._steps = tuple(shape), tuple(stride)
        return found

    @property
    def shape(self) -> Any:  # type: ignore[override]
        """The sizes, an int or a `Size` each."""
        return self._sizes

    def stride(self, *args: Any) -> Any:
        """The strides, an int or a `Size` each."""
        return self._steps[args[0]] if args else self._steps

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a tensor that is only described")


class Sizes:
    """The sizes of a program: torch's symbols under the names that the program prints, `d0`.

    Raises:
        LoweringError: where a size depends on values, as that of a nonzero does.
    """

    def __init__(self, program: Program) -> None:
        self._names = dict(program.symbols)
        self._hints: dict[sympy.Symbol, int] = {}
        self._renamed: dict[sympy.Expr, sympy.Expr] = {}

    def of(self, value: Any) -> sympy.Expr:
        """A size, or a node whose value is one, as an expression; also a fraction of sizes or a condition on them."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self._named(value)
        if isinstance(value, Size):
            if isinstance(value.expression, sympy.Symbol):
                self._hints[value.expression] = int(value)
            return value.expression
        return sympy.sympify(value)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """The shape of a node's tensor."""
        return tuple(self.of(size) for size in node.meta["val"].shape)

    def strides(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """The strides of a node's tensor as PyTorch computed them."""
        return tuple(self.of(size) for size in node.meta["val"].stride())

    def describe(self, value: Any) -> str:
        """`f32[d0, 384]` for a tensor, `d0` for a size, `(a, b)` for several."""
        if isinstance(value, Tensor):
            return f"{short_dtype(value.dtype)}[{', '.join(str(self.of(size)) for size in value.shape)}]"
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self.describe, value))})"
        return str(self.of(value))

    def hint(self, size: sympy.Expr) -> int:
        """What a size was in the example."""
        known = {symbol: self._hints.get(symbol, HINT) for symbol in size.free_symbols}
        return int(size.xreplace(known)) if known else int(size)

    def known_hints(self) -> dict[sympy.Symbol, int]:
        """What the example's sizes were, of those that have been asked for."""
        return dict(self._hints)

    def hints(self, shape: Sequence[sympy.Expr]) -> int:
        """How many elements a shape had in the example."""
        return math.prod(self.hint(size) for size in shape)

    def bound(self, size: sympy.Expr, ranges: Mapping[str, tuple[int, int | None]]) -> int | None:
        """The largest that a size can be; None: no limit is known."""
        if size.is_Integer:
            return int(size)
        if not isinstance(size, sympy.Symbol):
            return None
        return ranges.get(str(size), (0, None))[1]

    def _named(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
        expression = value.node.expr
        if expression in self._renamed:
            return self._renamed[expression]
        renamed = {}
        for symbol in expression.free_symbols:
            if symbol.name not in self._names and symbol.name.startswith("u"):
                raise LoweringError(
                    f"a size depends on values ({size_text(value)}), which generated kernels cannot have"
                )
            renamed[symbol] = sympy.Symbol(self._names.get(symbol.name, symbol.name), integer=True, nonnegative=True)
        if isinstance(expression, sympy.Symbol) and value.node.has_hint():
            self._hints[renamed[expression]] = int(value.node.hint)
        self._renamed[expression] = expression.xreplace(renamed)
        return self._renamed[expression]


def refuse_unknown(program: Program) -> None:
    """Refuse a program with a size that only its values tell.

    Raises:
        LoweringError: names the first node that has one.
    """
    sizes = Sizes(program)
    for node in program.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            try:
                sizes.shape(node)
            except LoweringError as error:
                kind = f"{target_name(node)}: {describe_value(value)}"
                raise LoweringError(f"{kind}: {error}; backend='onnx' takes it{source_of(node)}") from error


def text(expression: Any) -> str:
    """An expression as Python and Triton write it; both floor where nothing is negative."""
    return _written(sympy.sympify(expression))


@functools.lru_cache(maxsize=4096)
def _written(expression: sympy.Expr) -> str:
    found: str = _PRINTER.doprint(expression)
    return found


def product(sizes: Sequence[Any]) -> sympy.Expr:
    """The product of sizes; 1 for none."""
    return sympy.Mul(*sizes) if sizes else sympy.Integer(1)


def contiguous(shape: Sequence[Any]) -> tuple[sympy.Expr, ...]:
    """The strides, in elements, of a row-major tensor."""
    return tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))


def flatten(index: Sequence[Any], shape: Sequence[Any]) -> sympy.Expr:
    """The position, row-major, of an index in a shape."""
    found: sympy.Expr = sympy.Integer(0)
    for place, size in zip(index, shape, strict=True):
        found = found * size + place
    return sympy.expand(found)


def unflatten(position: Any, shape: Sequence[Any]) -> tuple[sympy.Expr, ...]:
    """The index in a shape, row-major, of a position below its product."""
    found: list[sympy.Expr] = []
    inner: sympy.Expr = sympy.Integer(1)
    for axis in range(len(shape) - 1, -1, -1):
        place = divided(position, inner)
        found.append(place if axis == 0 else remainder(place, shape[axis]))
        inner = inner * shape[axis]
    return tuple(reversed(found))


def divided(value: Any, by: Any) -> sympy.Expr:
    """floor(value / by), nothing negative."""
    value, by = sympy.sympify(value), sympy.sympify(by)
    return value if by == 1 else FloorDiv(value, by)


def remainder(value: Any, by: Any) -> sympy.Expr:
    """value mod by, nothing negative."""
    value, by = sympy.sympify(value), sympy.sympify(by)
    if by == 1 or value == 0:
        return sympy.Integer(0)
    return Mod(value, by)


def reshaped(index: Sequence[Any], shape: Sequence[Any], source: Sequence[Any]) -> tuple[sympy.Expr, ...]:
    """Where an index in `shape` is in a tensor of shape `source` that was reshaped to it.

    Axes that both have, and groups of axes with one product, are mapped apart, so that what only one axis takes part
    in stays free of divisions.
    """
    wide = [axis for axis, size in enumerate(source) if size != 1]
    places = _between([place for place, size in zip(index, shape, strict=True) if size != 1],
                      [size for size in shape if size != 1], [source[axis] for axis in wide])  # fmt: skip
    found = [sympy.Integer(0)] * len(source)
    for axis, place in zip(wide, places, strict=True):
        found[axis] = place
    return tuple(found)


def _between(index: Sequence[Any], shape: Sequence[Any], source: Sequence[Any]) -> list[sympy.Expr]:
    """`reshaped` where no size is known to be 1."""
    found: list[sympy.Expr] = []
    left, right = 0, 0
    while left < len(shape) or right < len(source):
        here, there = left, right
        mine: sympy.Expr = sympy.Integer(1)
        theirs: sympy.Expr = sympy.Integer(1)
        while True:
            if here == left and here < len(shape):
                mine, here = mine * shape[here], here + 1
            elif there == right and there < len(source):
                theirs, there = theirs * source[there], there + 1
            elif sympy.expand(mine - theirs) == 0:
                break
            elif here < len(shape) and (there == len(source) or _smaller(mine, theirs)):
                mine, here = mine * shape[here], here + 1
            elif there < len(source):
                theirs, there = theirs * source[there], there + 1
            else:
                mine, theirs, here, there = product(shape), product(source), len(shape), len(source)
                left, right, found = 0, 0, []
                break
        found += unflatten(flatten(index[left:here], shape[left:here]), source[right:there])
        left, right = here, there
    return found


def _smaller(mine: sympy.Expr, theirs: sympy.Expr) -> bool:
    """Whether more axes of the first shape are needed to reach the second."""
    quotient = sympy.cancel(mine / theirs)
    return bool(quotient.is_Rational and quotient < 1) or (
        not quotient.is_Rational and sympy.fraction(quotient)[0].is_Integer
    )
