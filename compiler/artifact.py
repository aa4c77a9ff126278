"""Artefacts: a compiled model as a folder that can be checked before it is used.

manifest.json       format, backend, signature, SHA-256 and size of every other file
model.onnx          the graph, for the onnx and openvino backends; loading it imports no torch
program.json        the graph, for the triton backend: triton_files.py
model.safetensors   its weights (ONNX external data; also readable by itself)
program.txt         the rewritten program as text
report.json         the report of the compilation
config.json, generation_config.json    of a decoder that was compiled with its cache: transformers' own

A model with an encoder that was compiled with its cache is a folder of two artefacts, encoder and decoder; the latter
says in encoder.sha256 which encoder it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ..backends.onnx.files import check_weight_files
from ..backends.onnx.session import Session
from ..ir import checks
from ..ir.errors import ArtifactError, InputError
from ..ir.signature import Signature
from .report import Report

FORMAT, VERSION = "fxpress-artifact", 1
MANIFEST, MODEL, REPORT = "manifest.json", "model.onnx", "report.json"
PROGRAM, WEIGHTS = "program.json", "model.safetensors"
CONFIG, GENERATION = "config.json", "generation_config.json"
ENCODER, DECODER = "encoder", "decoder"  # folders, artefacts both, of a model that has an encoder
PAIR = "encoder.sha256"  # of the encoder's manifest, in the decoder's folder
NEEDED = {  # files, by backend
    "onnx": {MODEL, REPORT},
    "openvino": {MODEL, REPORT},
    "triton": {PROGRAM, WEIGHTS, REPORT},
}
_GROWS = "{!r} generates, and its cache grows by each token; give no sizes"
SPARE = (".cubin.json", ".cubin")  # files that can be made anew


class Outputs(dict[str, Any]):
    """Named outputs of a loaded model; also read as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class LoadedModel:
    """A saved artefact, ready to run.

    Called with numpy arrays it gives `Outputs` of numpy arrays and imports no torch. Called with torch tensors it
    gives what the model gave, structure included; a structure whose class is not loaded is given as `Outputs`.
    """

    encoder: LoadedModel | None = None  # of a decoder that has one
    _decoder: Any = None
    _shapes: Sequence[tuple[int, ...]] | None = None  # of the inputs, where it was loaded for these alone

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        threads: int | None,
        sizes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._read(folder, manifest)
        self._shapes = None if sizes is None else self.signature.shapes(sizes)
        check_weight_files(folder / MODEL, set(manifest["files"]))
        self.session = _session(folder / MODEL, manifest, threads, self._shapes)
        self._check_leaves(folder, len(self.session.outputs))

    def _read(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.signature = Signature.from_dict(manifest["signature"])
        self.report = Report.from_dict(json.loads((folder / REPORT).read_text(encoding="utf-8")))
        self.leaves: list[tuple[int | None, Any]] = [(item["index"], item["constant"]) for item in manifest["outputs"]]
        self._structure: str | None = manifest["structure"]
        self._folder = folder if CONFIG in manifest["files"] else None

    def _check_leaves(self, folder: Path, count: int) -> None:
        places = [index for index, _ in self.leaves if index is not None]
        if len(self.leaves) != len(self.signature.outputs) or any(not 0 <= index < count for index in places):
            raise ArtifactError(f"{str(folder)!r} names outputs that its model does not have")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: arguments that the model was not compiled for.
        """
        values = self.signature.bind(args, kwargs)
        if self._shapes is not None:
            self._check_shapes(values)
        torch = sys.modules.get("torch")
        if torch is not None and any(isinstance(value, torch.Tensor) for value in values):
            return self._rebuild([torch.from_numpy(item) for item in self.run([_to_numpy(value) for value in values])])
        return Outputs(zip(self.signature.outputs, self._place(self.run(values)), strict=True))

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' `generate`, with every step computed by this model; of one that was compiled with cache=True.

        Raises:
            InputError: it was compiled without, or transformers is missing.
            ArtifactError: the installed transformers does not know the model.
        """
        from . import generation

        if self._decoder is None and self._folder is not None:
            self._decoder = generation.from_folder(self._folder)
        return generation.generate(self._decoder, self, self.encoder)(*args, **options)

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """Run on flat arrays, in the order of `signature.inputs`."""
        return list(self.session.run(arrays))

    def _check_shapes(self, values: Sequence[Any]) -> None:
        for spec, value, shape in zip(self.signature.inputs, values, self._shapes or (), strict=True):
            if tuple(value.shape) != shape:
                raise InputError(
                    f"input {spec.path!r} has sizes {list(value.shape)}, the model was loaded for {list(shape)} alone; "
                    "load it once more for these, or without sizes for any"
                )

    def _place(self, found: Sequence[Any]) -> list[Any]:
        return [constant if index is None else found[index] for index, constant in self.leaves]

    def _rebuild(self, found: Sequence[Any]) -> Any:
        from . import hf
        from .structure import rebuild

        leaves = self._place(found)
        hf.register_caches()
        structure = rebuild(self._structure, leaves)
        return Outputs(zip(self.signature.outputs, leaves, strict=True)) if structure is None else structure


def _session(
    file: Path, manifest: Mapping[str, Any], threads: int | None, shapes: Sequence[tuple[int, ...]] | None
) -> Any:
    if manifest.get("backend", "onnx") == "onnx":
        return Session(file, threads)
    try:
        from ..backends.openvino.session import OpenVinoSession
    except ModuleNotFoundError as error:
        raise InputError(f"a model of the openvino backend needs the package {error.name}: pip install it") from error
    return OpenVinoSession(file, threads, manifest.get("dtype"), shapes)


def _to_numpy(value: Any) -> numpy.ndarray[Any, Any]:
    found: numpy.ndarray[Any, Any] = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    return found


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    device: str | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> LoadedModel:
    """Load an artefact that `Compiled.save` wrote; every file is checked before it is used.

    Args:
        path: the folder; of a model with an encoder that was compiled with its cache, the one that holds both.
        threads: threads inside one operator, for the onnx and openvino backends; None: one a physical core.
        device: where a model of the triton backend is to run, "cuda:1"; None: where it was compiled, if that is here,
            else on the GPU.
        sizes: of the inputs by name, `{"input_ids": (1, 128)}`, where no others will come; those that follow need not
            be given. For the openvino backend, which plans for them; None: any that the model was compiled for.

    Raises:
        ArtifactError: no artefact there, or a file that is missing, truncated or altered.
        InputError: it cannot run here, or an option is that of another backend.
    """
    folder = Path(path)
    if (folder / DECODER).is_dir() and not (folder / MANIFEST).exists():
        if sizes is not None:
            raise InputError(_GROWS.format(str(folder)))
        for name in (DECODER, ENCODER):
            _read_manifest(folder / name)
        pair = folder / DECODER / PAIR
        if not pair.is_file() or pair.read_text(encoding="utf-8") != digest(folder / ENCODER):
            raise ArtifactError(f"the encoder and the decoder in {str(folder)!r} were not saved together")
        decoder = load(folder / DECODER, threads, device)
        decoder.encoder = load(folder / ENCODER, threads, device)
        return decoder
    manifest = _read_manifest(folder)
    backend = manifest.get("backend", "onnx")
    checks.threads(threads)
    if sizes is not None and CONFIG in manifest["files"]:
        raise InputError(_GROWS.format(str(folder)))
    if sizes is not None and backend != "openvino":
        raise InputError(f"{str(folder)!r} is of the {backend} backend, which plans for no sizes; give none")
    damaged = [problem for name, entry in manifest["files"].items() if (problem := _spare_problem(folder, name, entry))]
    try:
        if backend != "triton":
            if device is not None:
                raise InputError(
                    f"{str(folder)!r} is a model of the {backend} backend, which runs on the CPU; give no device"
                )
            return LoadedModel(folder, manifest, threads, sizes)
        if threads is not None:
            raise InputError(f"{str(folder)!r} is of the triton backend, whose work is not the CPU's; give no threads")
        return _load_kernels(folder, manifest, damaged, device)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise ArtifactError(f"{str(folder)!r} has a {MANIFEST} or {REPORT} of another form: {error!r}") from error


def _load_kernels(folder: Path, manifest: Mapping[str, Any], damaged: Sequence[str], device: str | None) -> LoadedModel:
    try:
        from .triton_files import LoadedKernels
    except ModuleNotFoundError as error:
        raise InputError(f"a model of the triton backend needs the package {error.name}: pip install it") from error
    return LoadedKernels(folder, manifest, damaged, device)


def _spare_problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that can be made anew; a fault of another one is an error."""
    try:
        _check_file(folder, name, entry)
    except ArtifactError as error:
        if not name.endswith(SPARE) or name != Path(name).name:
            raise
        return str(error)
    return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(f"{str(folder)!r} is no directory; give one that compiled.save(...) wrote")
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{str(folder)!r} is no fxpress artefact: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{str(file)!r} is no manifest of an fxpress artefact")
    if manifest.get("version") != VERSION:
        raise ArtifactError(f"{str(file)!r} has version {manifest.get('version')}; this fxpress reads {VERSION}")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _digest_of(body):
        raise ArtifactError(f"{str(file)!r} is altered: its own SHA-256 does not fit; compile and save again")
    backend, files = manifest.get("backend", "onnx"), manifest.get("files")
    if backend not in NEEDED:
        raise ArtifactError(f"{str(file)!r} is of a backend {backend!r}; this fxpress reads {', '.join(NEEDED)}")
    if not (
        isinstance(files, dict)
        and NEEDED[backend] <= files.keys()
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values())
    ):
        wanted = " and ".join(sorted(NEEDED[backend]))
        raise ArtifactError(f"{str(file)!r} does not list {wanted} with sizes and digests")
    return manifest


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    if name != Path(name).name or name in ("", ".", ".."):
        raise ArtifactError(f"the manifest names a file outside the artefact: {name!r}")
    file = folder / name
    if file.is_symlink() or not file.is_file():
        raise ArtifactError(f"{str(folder)!r} is damaged: {name} is missing")
    if file.stat().st_size != entry["bytes"]:
        raise ArtifactError(f"{name} is truncated or altered: {file.stat().st_size} bytes, expected {entry['bytes']}")
    try:
        found = _sha256(file)
    except OSError as error:
        raise ArtifactError(f"cannot read {str(file)!r}: {error.strerror}") from error
    if found != entry["sha256"]:
        raise ArtifactError(f"{name} is altered: its SHA-256 does not fit the manifest; compile and save again")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """Of an artefact: of its manifest, which holds those of all files."""
    return _sha256(folder / MANIFEST)


def write(
    folder: Path,
    files: Path,
    signature: Signature,
    outputs: Sequence[Mapping[str, Any]],
    structure: str | None,
    report: Report,
    program: str,
    backend: str = "onnx",
    dtype: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write an artefact: all of it appears at once, or nothing.

    Args:
        folder: the folder to make; it must not exist.
        files: a folder with the graph and its weights, which are copied.
        dtype: that openvino computes in.
        extra: more files, as text by name.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    with new_folder(folder) as temporary:
        for file in sorted(files.iterdir()):
            shutil.copyfile(file, temporary / file.name)
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / "program.txt").write_text(program, encoding="utf-8")
        (temporary / REPORT).write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")
        body = {
            "format": FORMAT,
            "version": VERSION,
            "backend": backend,
            **({} if dtype is None else {"dtype": dtype}),
            "signature": json.loads(json.dumps(signature.as_dict())),
            "outputs": list(outputs),
            "structure": structure,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
                for file in sorted(temporary.iterdir())
            },
        }
        text = json.dumps({**body, "sha256": _digest_of(body)}, indent=1)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")


class new_folder:
    """`with new_folder(path) as temporary`: fill `temporary`; it becomes `path` at the end, or vanishes on an error.

    Raises:
        InputError: `path` exists, its parent does not, or it cannot be written. Raised before any work is done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_new(path)

    def __enter__(self) -> Path:
        try:
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        except OSError as error:
            raise InputError(f"cannot write to {str(self.path.parent)!r}: {error.strerror}") from error
        return self._temporary

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                os.chmod(self._temporary, 0o755)
                os.rename(self._temporary, self.path)
        except OSError as failure:
            raise InputError(f"cannot write {str(self.path)!r}: {failure.strerror}") from failure
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from error


def check_new(path: Path) -> None:
    """Refuse an output path that exists or cannot be made.

    Raises:
        InputError: says which.
    """
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is no path that can be written: it holds a NUL character")
    try:
        exists = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:80]!r} is no path that can be written: {error}") from error
    if exists:
        raise InputError(f"{str(path)!r} exists already; give a new path, or remove it first")
    if len(os.fsencode(path.name)) > 200:
        raise InputError(f"the name {path.name[:40] + '...'!r} is too long; give one of 200 bytes at most")
    parent = path.parent
    if not parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}: {str(parent)!r} is no directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {str(path)!r}: no permission in {str(parent)!r}")
