"""What a program takes and gives: names, dtypes, sizes, and the check of a call against them.

This module must stay importable without torch: a loaded ONNX artefact checks its inputs with it. Arrays are anything
with `.shape` and `.dtype` (torch tensors, numpy arrays).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .errors import InputError, nearest

Size = int | str  # a number, a symbol such as "d0", or an expression of symbols such as "d0 + 1"


@dataclass(frozen=True)
class TensorInput:
    """A tensor leaf of the inputs. `path` is how the user spells it, `name` the identifier it has in the graph."""

    path: str
    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class ConstantInput:
    """A leaf of the inputs that was no tensor at tracing (None, a flag, a number): its value is part of the graph."""

    path: str
    value: bool | int | float | str | None


class _Sized(NamedTuple):
    """What a check reads of an array."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs and the range of every symbolic size of a program."""

    inputs: tuple[TensorInput, ...]
    constants: tuple[ConstantInput, ...]
    positional: tuple[str, ...]  # names of the parameters that may be given by position, in order
    outputs: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int | None]]  # of each symbol: smallest and largest size that was traced

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors of a call, in the order of `inputs`; each checked.

        Raises:
            InputError: a missing, unknown or doubled argument, a changed constant, a wrong dtype, rank or size.
        """
        if len(args) > len(self.positional):
            raise InputError(f"{len(args)} positional arguments given, the program takes {len(self.positional)}")
        named = dict(zip(self.positional, args, strict=False))
        doubled = sorted(named.keys() & kwargs.keys())
        if doubled:
            raise InputError(f"argument {doubled[0]!r} is given twice, by position and by name")
        given = {path: value for name, item in {**named, **kwargs}.items() for path, value in leaves(item, name)}
        for constant in self.constants:
            value = given.pop(constant.path, constant.value)
            if value is not constant.value and (type(value) is not type(constant.value) or value != constant.value):
                raise InputError(
                    f"input {constant.path!r} was {constant.value!r} when the model was traced and is part of the "
                    f"graph; compile again with an example in which it is {describe(value)}"
                )
        wanted = {tensor.path for tensor in self.inputs}
        for path, value in given.items():
            if path not in wanted and value is not None:
                raise InputError(f"unknown input {path!r}: {nearest(path, wanted)}")
        missing = [tensor.path for tensor in self.inputs if given.get(tensor.path) is None]
        if missing:
            raise InputError(f"missing input {', '.join(map(repr, missing))}; the program takes {sorted(wanted)}")
        tensors = [given[tensor.path] for tensor in self.inputs]
        self._check(tensors)
        return tensors

    def _check(self, tensors: Sequence[Any]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if not (hasattr(tensor, "shape") and hasattr(tensor, "dtype")):
                raise InputError(f"input {spec.path!r} must be a tensor, found {describe(tensor)}")
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype != spec.dtype:
                raise InputError(f"input {spec.path!r} must have dtype {spec.dtype}, found {dtype}")
            if len(tensor.shape) != len(spec.shape):
                raise InputError(f"input {spec.path!r} must have shape {list(spec.shape)}, found {list(tensor.shape)}")
            for axis, (want, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
                place = f"axis {axis} of input {spec.path!r}"
                if isinstance(want, int):
                    if size != want:
                        raise InputError(
                            f"{place} must be {want}, found {size}; to let it vary, compile with an example of another "
                            "size there (2 or more) or with dynamic_shapes"
                        )
                    continue
                low, high = self.ranges.get(want, (0, None))
                if size < low or (high is not None and size > high):
                    bound = f"at least {low}" if size < low else f"at most {high}"
                    raise InputError(f"{place} is {size}, the traced program is valid for {bound}")
                first, where = sizes.setdefault(want, (size, place))
                if first != size:
                    raise InputError(f"{place} is {size}, but must equal {where}, which is {first}")

    def shapes(self, sizes: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
        """The shapes of all `inputs` where some are given by path; the rest follows from sizes that inputs share.

        Raises:
            InputError: an unknown input, sizes that the program does not take, or an input whose sizes do not follow.
        """
        if not isinstance(sizes, Mapping):
            raise InputError(f"sizes must be given by input, {{name: (size, ...)}}, found {sizes!r}")
        wanted = {spec.path: spec for spec in self.inputs}
        known: dict[str, int] = {}
        for path, shape in sizes.items():
            if path not in wanted:
                raise InputError(f"sizes of an unknown input {path!r}: {nearest(path, wanted)}")
            if not (isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)):
                raise InputError(f"sizes of input {path!r} must be integers of at least 0, found {shape!r}")
            known |= {want: size for want, size in zip(wanted[path].shape, shape, strict=False) if type(want) is str}
        found: list[tuple[int, ...]] = []
        for spec in self.inputs:
            shape = sizes.get(
                spec.path, [known.get(want, -1) if isinstance(want, str) else want for want in spec.shape]
            )
            if min(shape, default=0) < 0:
                raise InputError(f"sizes of input {spec.path!r} are missing: {list(spec.shape)}")
            found.append(tuple(shape))
        self._check([_Sized(shape, spec.dtype) for spec, shape in zip(self.inputs, found, strict=True)])
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest of an artefact."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signature:
        """The inverse of `as_dict`."""
        return cls(
            inputs=tuple(TensorInput(**{**item, "shape": tuple(item["shape"])}) for item in data["inputs"]),
            constants=tuple(ConstantInput(**item) for item in data["constants"]),
            positional=tuple(data["positional"]),
            outputs=tuple(data["outputs"]),
            ranges={name: (low, high) for name, (low, high) in data["ranges"].items()},
        )


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a nested argument with their paths: `past.0.key`. Other containers are read by torch's pytree."""
    if isinstance(value, Mapping) and type(value) is dict:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    elif "torch" in sys.modules and type(value) in sys.modules["torch"].utils._pytree.SUPPORTED_NODES:
        for keys, item in sys.modules["torch"].utils._pytree.tree_flatten_with_path(value)[0]:
            yield path_of(path, keys), item
    else:
        yield path, value


def path_of(root: str, keys: Sequence[Any]) -> str:
    """The dotted path of a pytree key path below `root`."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]
    return ".".join([root, *parts] if root else parts)


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:60]
    return f"a {type(value).__name__}"
