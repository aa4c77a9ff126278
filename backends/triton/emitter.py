"""The body of a kernel: values of nodes at an index, each computed once, as lines of Triton.

A kernel has a frame: the shape that it runs over, its axes parted into rows and columns. One program of it has a tile
of ROWS by COLS. What a node is at an index is asked for by `Emitter.value`; a lowering asks for its arguments' values
at the indices that it wants them at, so that views, broadcasts, gathers and concatenations are arithmetic on indices.
A reduction runs over the columns, in one tile or, where the columns may be too many for one, in a loop for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import sympy
import torch
from torch import fx

from ...ir.ops.float8 import FLOAT8
from .sizes import Sizes, contiguous, product, text, unflatten

TRITON_TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
# What PyTorch makes of a number that float8_e4m3 has no room for depends on its version.
FLOAT8_CAST = "float8_e4m3" if torch.tensor(1e4).to(FLOAT8).float().isfinite() else "float8_e4m3_or_nan"
LONGEST = 1000  # lines of a kernel: what is read at several places, over and over, doubles each time
NARROW = (torch.float16, torch.bfloat16, FLOAT8)
Index = tuple[Any, ...]  # a sympy expression for each axis


class CannotFuse(Exception):
    """A group of nodes is no kernel; the message says why."""


@dataclass(frozen=True)
class Value:
    """A variable, or a short expression, of a kernel."""

    text: str
    dtype: torch.dtype  # that it is computed in: half precision is computed in fp32
    moving: bool  # differs between columns

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Frame:
    """What a kernel runs over: a shape, and which of its axes are the columns of its tiles; the others are rows."""

    shape: tuple[sympy.Expr, ...]
    columns: tuple[int, ...]
    reduces: bool = False  # each program sees whole rows
    looped: bool = False  # in several tiles
    batched: bool = False  # a product's: the last axis but one is its rows, those before are `batch`
    names: tuple[str, ...] = ()  # of the axes, where a template has them

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes that are rows."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.columns)

    @cached_property
    def index(self) -> Index:
        """The symbol of each axis, 0 for one of size 1: `rows`, `cols`, or `i0`, `i1`, ... where several axes make up
        rows or columns."""
        found: list[Any] = []
        for axis, size in enumerate(self.shape):
            if size == 1:
                found.append(sympy.Integer(0))
                continue
            if self.names:
                found.append(_symbol(self.names[axis]))
                continue
            group, name = next((axes, name) for axes, name in self._groups if axis in axes)
            found.append(_symbol(name if len(group) == 1 else f"i{axis}"))
        return tuple(found)

    @property
    def _groups(self) -> list[tuple[tuple[int, ...], str]]:
        """The axes that are counted together, and the variable that counts them."""
        if self.names:
            return []
        if not self.batched:
            return [(self.rows, "rows"), (self.columns, "cols")]
        return [(self.rows[:-1], "batch"), (self.rows[-1:], "rows"), (self.columns, "cols")]

    def size(self, axes: Sequence[int]) -> sympy.Expr:
        """How many indices some axes have together."""
        return product([self.shape[axis] for axis in axes])

    def offset(self, index: Index, strides: Sequence[Any]) -> sympy.Expr:
        """Where an index is in a tensor of such strides, in elements; without divisions where it lies as the frame."""
        trailing = tuple(range(len(self.shape) - len(self.columns), len(self.shape)))
        alike = all(stride == want for stride, want in zip(strides, contiguous(self.shape), strict=False))
        if tuple(index) == self.index and self.columns == trailing and alike and not (self.batched or self.names):
            return sympy.Add(_symbol("rows") * self.size(self.columns), _symbol("cols"))
        return sympy.Add(*(place * stride for place, stride in zip(index, strides, strict=True)))

    def definitions(self, used: set[str]) -> Iterator[tuple[str, sympy.Expr]]:
        """The axes that make up rows or columns with others, by `rows` and `cols`."""
        for group, name in self._groups:
            if len(group) > 1:
                places = unflatten(_symbol(name), [self.shape[axis] for axis in group])
                for axis, place in zip(group, places, strict=True):
                    if str(self.index[axis]) in used:
                        yield str(self.index[axis]), place


@cache
def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


@dataclass(frozen=True)
class Input:
    """A tensor that a kernel reads: its node, its name in the kernel, strides by axis that are known or arguments."""

    node: fx.Node
    name: str
    strides: tuple[sympy.Expr, ...]
    given: tuple[int, ...]  # the axes whose strides are arguments, `x0_s1`


@dataclass
class _Scope:
    lines: list[str] = field(default_factory=list)
    values: dict[Any, Value] = field(default_factory=dict)


class Emitter:
    """Collects the lines of one kernel.

    Args:
        sizes: the program's.
        lower: what a node that is computed here is at an index; None: the node is read from memory.
        frame: of the kernel.
        strides: those of a tensor that is read, where they are known when code is generated.
        known: values that a template computes, by node: at the frame's own index alone.
    """

    def __init__(
        self,
        sizes: Sizes,
        lower: Callable[[fx.Node], Callable[[Emitter, fx.Node, Index], Value] | None],
        frame: Frame,
        strides: Callable[[fx.Node], tuple[sympy.Expr, ...] | None],
        known: Mapping[fx.Node, Value] | None = None,
    ) -> None:
        self.sizes = sizes
        self.frame = frame
        self.inputs: dict[fx.Node, Input] = {}
        self.symbols: dict[str, None] = {}  # sizes and axes that the lines name
        self._lower = lower
        self._strides = strides
        self._known = dict(known or {})
        self._top = _Scope()
        self._tile = _Scope() if frame.looped else self._top
        self._count = 0
        self._guards: list[Value] = []
        self._moving = {str(frame.index[axis]) for axis in frame.columns} | {"cols"}
        self._still = {str(frame.index[axis]) for axis in frame.rows} | {"rows", "batch"}

    # --- values ------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node, index: Index) -> Value:
        """What a node is at an index.

        Raises:
            CannotFuse: it cannot be had there.
        """
        shape = self.sizes.shape(node)
        index = tuple(sympy.Integer(0) if size == 1 else place for place, size in zip(index, shape, strict=True))
        if node in self._known:
            if index != self.frame.index:
                raise CannotFuse(f"{node.name} is read at another index than that at which it is computed")
            return self._known[node]
        key = (node, index, *(guard.text for guard in self._guards))
        for scope in (self._tile, self._top):
            if key in scope.values:
                return scope.values[key]
        lower = self._lower(node)
        found = self._load(node, index) if lower is None else lower(self, node, index)
        (self._tile if found.moving else self._top).values[key] = found
        return found

    def operand(self, argument: Any, index: Index, dtype: torch.dtype) -> Value:
        """An argument, tensor (which broadcasts to what has this index) or number, in the dtype that is computed in."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
            return self.cast(self.value(argument, self.broadcast(argument, index)), dtype)
        if isinstance(argument, fx.Node):
            return self.number(self.sizes.of(argument), dtype)
        return self.number(argument, dtype)

    def broadcast(self, node: fx.Node, index: Index) -> Index:
        """The index of a tensor that broadcasts to what has `index`."""
        shape = self.sizes.shape(node)
        return tuple(
            sympy.Integer(0) if size == 1 else place
            for size, place in zip(shape, index[len(index) - len(shape) :], strict=True)
        )

    def number(self, number: Any, dtype: torch.dtype) -> Value:
        """A number as a value; a size may be an expression."""
        if isinstance(number, sympy.Expr) and not number.is_number:
            return self.position(number, dtype)
        if isinstance(number, sympy.Expr):
            number = float(number) if dtype.is_floating_point else int(number)
        return Value(f"tl.full([1, 1], {literal(number, dtype)}, {TRITON_TYPES[dtype]})", dtype, False)

    def position(self, place: Any, dtype: torch.dtype) -> Value:
        """An index, or a size, as a value."""
        place = sympy.sympify(place)
        if place.is_number:
            return self.number(place, dtype)
        if any(symbol.name in self._moving | self._still for symbol in place.free_symbols):
            return self.let("index", f"({self.text(place)}).to({TRITON_TYPES[dtype]})", dtype, moving=self.moves(place))
        return self.let("size", f"tl.full([1, 1], {self.text(place)}, {TRITON_TYPES[dtype]})", dtype)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """A value in another dtype, as PyTorch converts it."""
        if value.dtype == dtype:
            return value
        if dtype is torch.bool:
            return Value(f"({value} != 0)", dtype, value.moving)
        return Value(f"{value}.to({TRITON_TYPES[dtype]})", dtype, value.moving)

    def let(self, name: str, code: str, dtype: torch.dtype, *parts: Value, moving: bool | None = None) -> Value:
        """A new variable, which moves between columns if one of the values in it does."""
        if self._count > LONGEST:
            raise CannotFuse(f"it would be more than {LONGEST} lines")
        moving = any(part.moving for part in parts) if moving is None else moving
        variable = f"{name}_{self._count}"
        self._count += 1
        (self._tile if moving else self._top).lines.append(f"{variable} = {code}")
        return Value(variable, dtype, moving)

    def rounded(self, value: Value, dtype: torch.dtype) -> Value:
        """A value as it is after a cast to `dtype` that the model asks for: half precision rounds."""
        if dtype in NARROW:
            kept = computed(value.dtype)
            if dtype is FLOAT8:
                code = f"{FLOAT8_CAST}({value}.to(tl.float32))"
            else:
                code = f"{value}.to({TRITON_TYPES[dtype]}).to(tl.float32)"
            return self.let("rounded", code, torch.float32, value) if kept != dtype else value
        return self.cast(value, dtype)

    def at(self, value: Value, name: str = "place") -> sympy.Symbol:
        """An integer value as something to index by."""
        named = value if value.text.isidentifier() else self.let(name, value.text, value.dtype, value)
        (self._moving if named.moving else self._still).add(named.text)
        return _symbol(named.text)

    @contextmanager
    def only_where(self, condition: Value) -> Iterator[None]:
        """Within, nothing is read where a condition does not hold; what is computed there is of no use."""
        self._guards.append(condition)
        yield
        self._guards.pop()

    # --- reductions --------------------------------------------------------------------------------------------

    def over_columns(self, node: fx.Node, index: Index, axes: Sequence[int]) -> Index:
        """The index of a node with the frame's columns along some axes.

        Args:
            index: of the node, with anything along `axes`.

        Raises:
            CannotFuse: the kernel does not have these axes as its columns, or the index differs between columns.
        """
        shape = self.sizes.shape(node)
        wide = [axis for axis in axes if shape[axis] != 1]
        columns = [axis for axis in self.frame.columns if self.frame.shape[axis] != 1]
        if not self.frame.reduces or [shape[axis] for axis in wide] != [self.frame.shape[axis] for axis in columns]:
            raise CannotFuse(f"{node.name} is reduced over other axes than the kernel's columns")
        found = [sympy.Integer(0) if axis in axes else place for axis, place in enumerate(index)]
        if any(self.moves(place) for place in found) or self._guards:
            raise CannotFuse(f"{node.name} is reduced at a place that differs between columns")
        for axis, column in zip(wide, columns, strict=True):
            found[axis] = self.frame.index[column]
        return tuple(found)

    def reduce(self, kind: str, read: Callable[[], Value]) -> Value:
        """A row's "sum", "max" or "min" of what `read` gives in each column; a NaN among them counts for nothing in
        the last two."""
        if not self.frame.looped:
            value = read()
            code = f"tl.{kind}({self._within(value, kind)}, axis=1, keep_dims=True)"
            return self.let(kind, code, value.dtype, moving=False)
        outer, self._tile = self._tile, _Scope()
        value = read()
        body, self._tile = self._tile, outer
        name = f"{kind}_{self._count}"
        self._count += 1
        kept, combined = f"{name}_tile", self._within(value, kind)
        if kind == "sum":
            body.lines.append(f"{kept} += {combined}")
        else:
            body.lines.append(f"{kept} = tl.{kind}imum({kept}, {combined})")
        kind_type = TRITON_TYPES[value.dtype]
        self._top.lines.append(f"{kept} = tl.full([ROWS, COLS], {_neutral(kind, value.dtype)}, {kind_type})")
        self._top.lines += self.loop(body.lines)
        self._top.lines.append(f"{name} = tl.{kind}({kept}, axis=1, keep_dims=True)")
        return Value(name, value.dtype, False)

    def _within(self, value: Value, kind: str) -> str:
        return f"tl.where(inside, {value}, {_neutral(kind, value.dtype)})"

    # --- lines -------------------------------------------------------------------------------------------------

    def store(self, name: str, value: Value, offset: Any, dtype: torch.dtype) -> None:
        """Store a value at an offset into an output, in every column or once a row."""
        mask = "inside" if self.moves(offset) else "row_inside"
        converted = f"float8_bits({value})" if dtype is FLOAT8 else self.cast(value, dtype)
        place = self.text(offset) if sympy.sympify(offset).free_symbols else "rows"  # one number: row 0
        line = f"tl.store({name} + {place}, {converted}, mask={mask})"
        (self._tile if self.moves(offset) else self._top).lines.append(line)

    def lines(self) -> list[str]:
        """All lines, those of the last loop included."""
        if not self.frame.looped:
            return list(self._top.lines)
        return [*self._top.lines, *(self.loop(self._tile.lines) if self._tile.lines else [])]

    def loop(self, body: Sequence[str]) -> list[str]:
        """A loop over the tiles of a row."""
        count = self.text(self.frame.size(self.frame.columns))
        head = [
            "cols = (start + tl.arange(0, COLS).to(INDEX))[None, :]",
            f"col_inside = cols < {count}",
            "inside = row_inside & col_inside",
        ]
        used = {str(axis) for axis in self.symbols}
        axes = [f"{name} = {self.text(place)}" for name, place in self.frame.definitions(used) if name in self._moving]
        return [f"for start in range(0, {count}, COLS):", *(f"    {line}" for line in (*head, *axes, *body))]

    def text(self, expression: Any) -> str:
        """An expression as text; what it names is noted."""
        expression = sympy.sympify(expression)
        self.symbols.update(dict.fromkeys(sorted(symbol.name for symbol in expression.free_symbols)))
        written = text(expression)
        return written if expression.is_Atom else f"({written})"

    def moves(self, expression: Any) -> bool:
        """Whether an expression differs between columns."""
        return any(symbol.name in self._moving for symbol in sympy.sympify(expression).free_symbols)

    def _load(self, node: fx.Node, index: Index) -> Value:
        source = self.read(node)
        offset = self.frame.offset(index, source.strides)
        names = {symbol.name for symbol in sympy.sympify(offset).free_symbols}
        moving, still = bool(names & self._moving), bool(names & self._still)
        masks = ["inside" if moving and still else "col_inside" if moving else "row_inside" if still else ""]
        if self._guards:
            masks = [mask for mask in masks if mask] + [guard.text for guard in self._guards]
        masks = [mask for mask in masks if mask]
        dtype = node.meta["val"].dtype
        if dtype not in (*TRITON_TYPES, FLOAT8):
            raise CannotFuse(f"{node.name} has dtype {dtype}, which generated kernels do not read")
        other = "0.0" if dtype.is_floating_point and dtype is not FLOAT8 else "0"
        mask = f", mask={' & '.join(masks)}, other={other}" if masks else ""
        code = f"tl.load({source.name} + {self.text(offset)}{mask})"
        if not moving and not still:  # one number, at a stride's distance or a known one: as blocks of [1, 1]
            code = f"tl.load({source.name} + tl.full([1, 1], {self.text(offset)}, tl.int64){mask})"
        if dtype is FLOAT8:  # as bytes: not every architecture has such numbers
            code = f"float8_value({code}).to(tl.float32)"
        elif dtype in NARROW:
            code += ".to(tl.float32)"
        elif dtype is torch.bool:
            code += ".to(tl.int1)"
        return self.let("x", code, computed(dtype), moving=moving or any(guard.moving for guard in self._guards))

    def read(self, node: fx.Node) -> Input:
        """The argument of the kernel through which a tensor is read."""
        if node not in self.inputs:
            name = f"in{len(self.inputs)}"
            shape, known = self.sizes.shape(node), self._strides(node)
            if known is None:
                axes = tuple(axis for axis, size in enumerate(shape) if size != 1)
                strides = tuple(_symbol(f"{name}_s{axis}") for axis in range(len(shape)))
            else:
                axes, strides = (), known
            self.inputs[node] = Input(node, name, strides, axes)
        return self.inputs[node]


def computed(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in."""
    return torch.float32 if dtype in NARROW else dtype


def literal(number: Any, dtype: torch.dtype) -> str:
    """A number as code; an integer that a dtype has no room for loses its upper bits, as in PyTorch."""
    if dtype is torch.bool:
        return str(int(bool(number)))
    if not dtype.is_floating_point:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return repr((int(number) - low) % (high - low + 1) + low)
    number = float(number)
    if number != number:
        return 'float("nan")'
    if number in (float("inf"), float("-inf")):
        return f'float("{number}")'
    return repr(number)


def _neutral(kind: str, dtype: torch.dtype) -> str:
    if kind == "sum":
        return "0.0" if dtype.is_floating_point else "0"
    if dtype.is_floating_point:
        return literal(float("-inf" if kind == "max" else "inf"), dtype)
    limits = torch.iinfo(torch.uint8 if dtype is torch.bool else dtype)
    return str(limits.min if kind == "max" else limits.max)
