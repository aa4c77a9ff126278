"""Artefacts of the triton backend: the graph as data, from which the kernels are written again, and machine code.

program.json           the prepared program as data; of each weight, where it is and its strides; versions
model.safetensors      the weights
KEY.sm_90.cubin        machine code of a kernel for sm_90, under the digest of all that it depends on; what Triton knows
KEY.sm_90.cubin.json   of it

The text of kernels is not stored: fxpress writes it from the graph. Machine code that does not fit, is damaged or is
not there costs a compilation.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backends.triton.aot import LIMITS
from ..backends.triton.machine_code import Code
from ..backends.triton.runner import TritonRunner, arch_here, interpreted, triton_version, tuner_here
from ..backends.triton.serial import restore
from ..ir.errors import ArtifactError, InputError, LoweringError, one_line
from ..ir.signature import Signature
from . import artifact
from .artifact import LoadedModel
from .precision import DTYPES, narrow_inputs
from .report import Report
from .runners import Runner, without_collector


def check_archs(archs: Sequence[int] | None) -> list[int]:
    """The architectures to compile for: those given, else that of the GPU that is here.

    Raises:
        InputError: nothing is known of one.
    """
    if archs is None:
        here = arch_here()
        return [] if here is None else [here]
    for arch in archs:
        if arch not in LIMITS:
            raise InputError(f"nothing is known of the architecture {arch!r} (valid: {', '.join(map(str, LIMITS))})")
    return sorted(set(archs))


def write(
    folder: Path,
    runner: Runner,
    batches: Iterable[Sequence[Tensor]],
    archs: Sequence[int],
    dtype: torch.dtype | None,
    tune: bool,
    signature: Signature,
    structure: str | None,
    report: Report,
    text: str,
    extra: Mapping[str, str],
) -> None:
    """Write an artefact: all of it appears at once, or nothing.

    Args:
        folder: the folder to make; it must not exist.
        batches: flat inputs, for each of which machine code is made.
        archs: compute capabilities, 90 for sm_90.
        dtype: that float inputs are cast to.
        tune: whether products and attention are measured where it runs; then all candidates are compiled.
        text: the rewritten program, for people.

    Raises:
        InputError: the folder exists, or cannot be written.
        LoweringError: something in the program has no form as data, or a kernel cannot be compiled.
    """
    assert isinstance(runner, TritonRunner)
    artifact.check_new(folder)
    program = runner.program()
    tensors, places = _packed(runner.weights())
    with tempfile.TemporaryDirectory(prefix="fxpress-") as name:
        files = Path(name)
        try:
            save_file(tensors, files / artifact.WEIGHTS)
        except SafetensorError as error:
            raise InputError(
                f"cannot write to {name!r}: {one_line(error)}; set TMPDIR if there is more room elsewhere"
            ) from error
        for arch, found in (runner.machine_code(batches, archs, tune) if archs else {}).items():
            for key, code in found.items():
                (files / f"{key}.sm_{arch}.cubin").write_bytes(code.binary)
                (files / f"{key}.sm_{arch}.cubin.json").write_text(code.metadata, encoding="utf-8")
        data = {
            "program": program,
            "weights": places,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "tune": tune,
            "source": _digest(runner.source),
            "triton": triton_version(),
            "archs": list(archs),
        }
        (files / artifact.PROGRAM).write_text(json.dumps(data), encoding="utf-8")
        outputs = [{"index": index, "constant": None} for index in range(len(signature.outputs))]
        artifact.write(folder, files, signature, outputs, structure, report, text, "triton", extra=extra)


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def _packed(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to write, tied ones once, and where each weight is in them; strides, where it is not contiguous."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    known: dict[int, str] = {}
    for name, weight in weights.items():
        first = known.setdefault(id(weight), name)
        places[name] = {"tensor": first, "shape": list(weight.shape), "stride": None}
        if not weight.is_contiguous():
            places[name]["stride"] = list(weight.stride())
        if first == name:
            tensors[name] = _memory(weight.detach())
    return tensors, places


def _memory(weight: Tensor) -> Tensor:
    """A copy of a tensor; where it is not contiguous, of the memory that it spans, as a row."""
    if not weight.is_contiguous():
        span = 1 + sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
        weight = weight.as_strided((span,), (1,))
    return weight.to("cpu", copy=True)


def _unpacked(folder: Path, places: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / artifact.WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{artifact.WEIGHTS} is damaged: {one_line(error)}") from error
    known: dict[str, Tensor] = {}
    found = {}
    for name, place in places.items():
        tensor = tensors[place["tensor"]]
        if place["stride"] is not None:
            try:
                tensor = known.setdefault(place["tensor"], tensor.as_strided(place["shape"], place["stride"]))
            except RuntimeError as error:  # beyond its memory
                raise ArtifactError(f"the weight {name!r} has no such strides: {one_line(error)}") from error
        if list(tensor.shape) != place["shape"]:
            raise ArtifactError(f"the weight {name!r} is {list(tensor.shape)}, its program says {place['shape']}")
        found[name] = tensor
    return found


class LoadedKernels(LoadedModel):
    """A saved model of the triton backend. Called with torch tensors or numpy arrays, it gives what the model gave, in
    torch tensors; a structure whose class is not loaded is given as `Outputs`."""

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], damaged: Sequence[str], device: str | None = None
    ) -> None:
        self._read(folder, manifest)
        data = json.loads((folder / artifact.PROGRAM).read_text(encoding="utf-8"))
        place = _device(data["program"], device)
        weights = _unpacked(folder, data["weights"], place)
        ready = restore(data["program"], self.signature, weights, place)
        self._dtype = None if data["dtype"] is None else DTYPES[data["dtype"]]
        try:
            code = read_code(folder, manifest["files"], data, damaged, arch_here(place))
            with without_collector():
                self.runner = TritonRunner.restored(ready, code, tuner_here() if data["tune"] else None)
        except LoweringError as error:
            raise ArtifactError(f"{str(folder)!r} holds a program that this fxpress cannot run: {error}") from error
        if code and _digest(self.runner.source) != data["source"]:
            warnings.warn(
                f"{str(folder)!r} was saved by another fxpress, with other kernels; they are compiled when first used",
                stacklevel=5,
            )
        self._place_of_inputs = place
        self._check_leaves(folder, len(ready.graph.output_node().args[0]))  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: arguments that the model was not compiled for.
        """
        args, kwargs = narrow_inputs((args, kwargs), self._dtype)
        return self._rebuild(self.run(self.signature.bind(args, kwargs)))

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """Run on flat tensors or arrays, in the order of `signature.inputs`."""
        return self.runner.run([torch.as_tensor(item, device=self._place_of_inputs) for item in arrays])

    @property
    def source(self) -> str:
        """The text of the generated module."""
        return self.runner.source


def _device(program: Mapping[str, Any], asked: str | None) -> torch.device:
    """Where a saved program is to run: as asked, else where it was, if that is here."""
    if asked is not None:
        try:
            return torch.device(asked)
        except RuntimeError as error:
            raise InputError(f"{asked!r} is no device: {one_line(error)}") from error
    found = [torch.device(value["device"]) for node in program["nodes"] if "device" in (value := node["value"] or {})]
    before = next((device for device in found if device.type == "cuda"), torch.device("cpu"))
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("a model of the triton backend needs a GPU, and there is none (or Triton's interpreter)")
    count = torch.cuda.device_count()
    return before if before.type == "cuda" and (before.index or 0) < count else torch.device("cuda", 0)


def read_code(
    folder: Path, files: Mapping[str, Any], data: Mapping[str, Any], damaged: Sequence[str], arch: int | None
) -> dict[str, Code]:
    """The saved machine code for an architecture, by key; where some is of no use, one warning says why.

    Args:
        files: what the manifest lists.
        data: of program.json.
        damaged: what is wrong with files, a line each.
        arch: of the GPU that is to run it; None: none does.
    """
    if arch is None or not data["archs"]:
        return {}
    reason = damaged[0] if damaged else None
    if data["triton"] != triton_version():
        reason = f"it is of triton {data['triton']}, this is {triton_version()}"
    elif arch not in data["archs"]:
        reason = f"it is for {', '.join(f'sm_{known}' for known in data['archs'])}, this is sm_{arch}"
    if reason is not None:
        warnings.warn(
            f"the machine code saved in {str(folder)!r} is not used, kernels are compiled when first used: {reason}",
            stacklevel=6,
        )
        return {}
    ending = f".sm_{arch}.cubin"
    names = [name.removesuffix(ending) for name in files if name.endswith(ending)]
    return {
        key: Code(
            (folder / f"{key}{ending}.json").read_text(encoding="utf-8"), (folder / f"{key}{ending}").read_bytes()
        )
        for key in names
        if f"{key}{ending}.json" in files
    }
