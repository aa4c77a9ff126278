"""Compiled graphs on disk, so that a second process starts warm: a folder a graph, each an artefact that is checked.

The key holds everything that the product depends on: the graph, the weights' bytes, the sizes, the options, the code
of fxpress, the versions, the machine. Any fault of the disk costs a compilation, never a wrong answer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...backends.memory import cache_folder, check_owner, processor
from ...ir.errors import ArtifactError, FxpressError, InputError, one_line
from .. import artifact
from ..report import Report
from .binding import Binding, Finish
from .graph import WEIGHT, Argument
from .options import Options

ENTRY = "graph.json"
LIMIT = 4 * 2**30  # bytes of all graphs; the oldest go first
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A graph from the disk."""

    model: artifact.LoadedModel
    binding: Binding
    report: dict[str, Any]  # what the report of the graph says


class Cache:
    """The folder of compiled graphs."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder() / "graphs"

    def load(self, key: str, threads: int) -> Entry | None:
        """What is stored under a key; None where nothing is, or nothing that can be trusted."""
        folder = self._folder / key
        try:
            if not folder.exists():
                return None
            check_owner(self._folder)
            entry = _read(artifact.load(folder, threads), folder)
            os.utime(folder)
            return entry
        except (ArtifactError, InputError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            _warn(f"a compiled graph in {self._folder} is not used: {one_line(error)}")
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
            return None

    def store(
        self, key: str, files: Path, binding: Binding, saved: Report, leaves: Sequence[Any], signature: Any, said: Any
    ) -> bool:
        """Store a graph; False where that is not possible.

        Args:
            files: the folder with the ONNX model.
            leaves: of each flat output the model's output that it is, or a constant.
            said: what the report of the graph says.
        """
        folder = self._folder / key
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_owner(self._folder)
            if folder.exists():
                return True
            with tempfile.TemporaryDirectory(prefix="fxpress-") as staging:
                for file in files.iterdir():
                    os.symlink(file, Path(staging) / file.name)
                text = json.dumps({"format": _FORMAT, "binding": _plain(binding), "said": said})
                (Path(staging) / ENTRY).write_text(text, encoding="utf-8")
                artifact.write(folder, Path(staging), signature, leaves, None, saved, "")
            os.chmod(folder, 0o700)
            self._prune(keep=folder)
            return True
        except (FxpressError, OSError) as error:
            if folder.exists():  # another process was faster
                return True
            _warn(f"compiled graphs are not stored in {self._folder}: {one_line(error)}")
            return False

    def _prune(self, keep: Path) -> None:
        """Remove the graphs that were not used for the longest time, as far as all are too large."""
        found = []
        for folder in self._folder.iterdir():
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append((folder.stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in found)
        for _, size, folder in sorted(found):
            if total > LIMIT and folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


_warned: set[str] = set()


def _warn(text: str) -> None:
    """Warn of a kind of fault once in a process."""
    kind = text.partition(":")[0]
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _plain(binding: Binding) -> dict[str, Any]:
    finish = binding.finish
    return {
        "inputs": list(binding.inputs),
        "carriers": binding.carriers,
        "weights": dict(binding.weights),
        "outputs": [list(item) for item in finish.outputs],
        "changed": [list(item) for item in finish.changed],
    }


def _read(model: artifact.LoadedModel, folder: Path) -> Entry:
    found = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    if found["format"] != _FORMAT:
        raise ValueError(f"{ENTRY} has another format")
    given = found["binding"]
    finish = Finish(
        tuple((str(kind), value) for kind, value in given["outputs"]),
        tuple((int(place), int(index)) for place, index in given["changed"]),
    )
    binding = Binding(tuple(given["inputs"]), int(given["carriers"]), dict(given["weights"]), finish)
    return Entry(model, binding, dict(found["said"]))


# --- the key ----------------------------------------------------------------------------------------------------------


def key_of(gm: fx.GraphModule, found: Sequence[Argument], values: Sequence[Any], asked: Options) -> str | None:
    """What a compiled graph depends on, as a digest; None: the graph calls what is not PyTorch's and may change."""
    lines = [f"format {_FORMAT}", _code(), _versions(), repr(asked.given), asked.backend]
    lines.append(f"threads {torch.get_num_threads()}, default {torch.get_default_dtype()}")
    around = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    lines.append(f"autocast {around}")
    for argument, value in zip(found, values, strict=True):
        lines.append(f"{argument.kind} {argument.name} {_described(value)} as {_described(argument.fake)}")
    for name, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):  # the graph, and branches and loops in it
            text = _graph_text(module.graph)
            if text is None:
                return None
            lines += [f"graph {name!r}", *text]
    digest = hashlib.sha256("\n".join(lines).encode())
    tensors = [value for argument, value in zip(found, values, strict=True) if argument.kind == WEIGHT]
    for batch in asked.calibration:
        digest.update(repr(sorted(batch)).encode())
        tensors += [batch[name] for name in sorted(batch) if isinstance(batch[name], Tensor)]
    for tensor in tensors:
        digest.update(_described(tensor).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _graph_text(graph: fx.Graph) -> list[str] | None:
    """A line a node; None: it calls what is not PyTorch's."""
    nodes: dict[fx.Node, str] = {}
    lines = []
    for index, node in enumerate(graph.nodes):
        nodes[node] = f"%{index}"
        target = _target(node)
        given = repr(fx.node.map_arg((node.args, node.kwargs), lambda used: _Name(nodes[used])))
        if target is None or " at 0x" in given:
            return None
        stack = node.meta.get("nn_module_stack") or {}
        lines.append(f"{nodes[node]} = {node.op} {target} {given} in {[entry[0] for entry in stack.values()]}")
    return lines


class _Name(str):
    """A node's name in the text of a graph; fx lets nothing but nodes and plain values stand in arguments."""

    def __repr__(self) -> str:
        return str(self)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} strides {value.stride()}"
    return repr(value) if not isinstance(value, int) else f"size {value}"


_KNOWN = ("torch.", "_operator.", "operator.", "math.", "builtins.")


def _target(node: fx.Node) -> str | None:
    """A target's name; None: not PyTorch's own, so that its code may be another one day."""
    target: Any = node.target
    if isinstance(target, str):
        return target if node.op != "call_module" else None
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(target)
        return name if re.match(r"(aten|prims)[.:]", name) else None
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher order {target.name()}"
    home, function = getattr(target, "__module__", None), str(getattr(target, "__qualname__", None))
    if home is None and function.startswith("_VariableFunctionsClass."):
        home = "torch"
    text = f"{home}.{function}"
    return text if text.startswith(_KNOWN) else None


@functools.cache
def _code() -> str:
    """A digest of the code of fxpress."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for name in ("ir", "passes", "backends", "compiler"):
        for file in sorted((root / name).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions() -> str:
    names = (torch.__version__, *(version(name) for name in ("onnxruntime", "onnxscript")), platform.python_version())
    return f"torch, onnxruntime, onnxscript, python {names} on {processor()}"


def known_sizes(env: Any) -> tuple[int, int, str]:
    """What a symbolic environment knows: where compiling adds to it, the product holds under more than the key says."""
    if env is None:
        return 0, 0, ""
    return len(env.guards), len(env.replacements), str(sorted(map(str, env.var_to_range.items())))
