"""The memory of a generated forward: when each result is dead, and which ones take turns in the same memory.

Greedy by size (Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020): the largest results
choose first, and a smaller one takes memory that nothing else has while it is alive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy

from .sizes import text

PLACED = '''def placed(memory, shape, dtype):
    """A contiguous tensor at the beginning of some memory, which other tensors have had before it."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
'''


@dataclass(frozen=True)
class Buffer:
    """A result of a generated kernel, from the line that allocates it to the last one that reads it, or a view of it.

    Attributes:
        size: bytes, an expression of the program's sizes.
        bytes: what that is at the example's sizes.
        shape, dtype, device: as code.
    """

    name: str
    size: sympy.Expr
    bytes: int
    first: int
    last: int = -1
    shape: str = "()"
    dtype: str = "torch.float32"
    device: str = "torch.device('cpu')"

    def alone(self) -> str:
        """The line that allocates it."""
        return f"{self.name} = torch.empty({self.shape}, dtype={self.dtype}, device={self.device})"


@dataclass(frozen=True)
class Memory:
    """A piece of memory, and the buffers that have it one after the other."""

    buffers: tuple[Buffer, ...]

    @property
    def bytes(self) -> int:
        """Its size at the example's sizes."""
        return max(buffer.bytes for buffer in self.buffers)

    def lines(self, name: str) -> dict[int, str]:
        """What allocates it and places the buffers, by the lines that allocate these."""
        found = {
            buffer.first: f"{buffer.name} = placed({name}, {buffer.shape}, {buffer.dtype})" for buffer in self.buffers
        }
        first, sizes = self.buffers[0], [text(size) for size in dict.fromkeys(item.size for item in self.buffers)]
        largest = sizes[0] if len(sizes) == 1 else f"max({', '.join(sizes)})"
        whole = f"{name} = torch.empty({largest}, dtype=torch.uint8, device={first.device})"
        return {**found, first.first: f"{whole}\n{found[first.first]}"}


def shared(buffers: Iterable[Buffer]) -> list[Memory]:
    """The memory that buffers take turns in; no two that are alive at once have the same.

    A buffer is alive in its last line, too: a kernel may write one result while it reads another.
    """
    found: list[list[Buffer]] = []
    for buffer in sorted(buffers, key=lambda item: (-item.bytes, item.first)):
        free = [taken for taken in found if all(_apart(buffer, other) for other in taken)]
        if free:
            min(free, key=lambda taken: (taken[0].size != buffer.size, taken[0].bytes)).append(buffer)
        else:
            found.append([buffer])
    return [Memory(tuple(sorted(taken, key=lambda item: item.first))) for taken in found]


def _apart(one: Buffer, other: Buffer) -> bool:
    """Whether two buffers are never alive at once, and where the other is."""
    return (one.last < other.first or other.last < one.first) and one.device == other.device


def alive(buffers: Sequence[Buffer]) -> int:
    """Bytes that are alive at once at most, at the example's sizes: no plan takes less."""
    moments = [sum(item.bytes for item in buffers if item.first <= now.first <= item.last) for now in buffers]
    return max(moments, default=0)


def take_turns(
    lines: Sequence[str], made: Sequence[Buffer], parts: Mapping[str, Iterable[str]]
) -> tuple[list[str], dict[str, int]]:
    """The lines of a forward in which results take turns in memory; and how much there is of it.

    What is returned has memory of its own.

    Args:
        lines: of which each buffer's `first` allocates it, `alone`; the last one returns.
        parts: by the name of a tensor, the buffers that it may lie in.

    Returns:
        The lines; and at the example's sizes: the number of results and their bytes; in how many pieces of memory they
        lie, and its bytes; and the bytes that are alive at once.
    """
    last = {buffer.name: buffer.first for buffer in made}
    for number, line in enumerate(lines):
        for name in parts.keys() & _words(line):
            last.update(dict.fromkeys(parts[name], number))
    buffers = [Buffer(**{**vars(buffer), "last": last[buffer.name]}) for buffer in made]
    inner = [buffer for buffer in buffers if buffer.last < len(lines) - 1]
    found = [memory for memory in shared(inner) if len(memory.buffers) > 1]
    changed: dict[int, str] = {}
    for number, memory in enumerate(found):
        changed.update(memory.lines(f"memory_{number}"))
    total = sum(buffer.bytes for buffer in buffers)
    saved = sum(sum(buffer.bytes for buffer in memory.buffers) - memory.bytes for memory in found)
    pieces = len(buffers) - sum(len(memory.buffers) - 1 for memory in found)
    summary = {
        "results": len(buffers), "bytes": total, "pieces": pieces, "planned": total - saved, "alive": alive(buffers),
    }  # fmt: skip
    return [part for number, line in enumerate(lines) for part in changed.get(number, line).split("\n")], summary


def released(lines: Sequence[str], names: set[str]) -> list[str]:
    """The lines, each followed by the deletion of what nothing after it reads: its memory serves what comes."""
    names = names | {name for line in lines for name in re.findall(r"^(memory_\d+) = ", line)}
    last: dict[str, int] = {}
    for number, line in enumerate(lines):
        last.update(dict.fromkeys(names & _words(line), number))
    found: list[str] = []
    for number, line in enumerate(lines):
        found.append(line)
        dead = sorted(name for name, place in last.items() if place == number)
        if dead and not line.startswith("return "):
            found.append(f"del {', '.join(dead)}")
    return found


def _words(line: str) -> set[str]:
    """The names in a line of code, without its comment."""
    return set(re.findall(r"\b\w+\b", line.split("  # ")[0]))
