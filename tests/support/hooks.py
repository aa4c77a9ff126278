"""A copy of a kernel's module with an epilogue of the test's own, as generated code has."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

HOOK = re.compile(r"^( *)# hook: (\w+)[^\n]*\n(.*?)^ *# end\n", re.DOTALL | re.MULTILINE)
IMPORT = re.compile(r"^from \.(\w+) import [^\n]*\n", re.MULTILINE)


def generate(source: Path, target: Path, parameters: str, epilogue: str) -> ModuleType:
    """Write the module, and those with hooks that it imports, with the lines of the hooks replaced, and import it."""
    lines = {"parameters": parameters, "before": "", "epilogue": epilogue}
    text = HOOK.sub(lambda hook: textwrap.indent(textwrap.dedent(lines[hook[2]]), hook[1]), _whole(source))
    target.write_text(text, encoding="utf-8")
    # Under a name in the package: what the copy imports relatively is found.
    spec = importlib.util.spec_from_file_location(f"fxpress.kernels.{target.stem}", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _whole(source: Path) -> str:
    """The text of a module, with that of modules with hooks in place of their imports."""

    def inlined(found: re.Match[str]) -> str:
        other = source.with_name(f"{found[1]}.py")
        return _whole(other) if HOOK.search(other.read_text("utf-8")) else found[0]

    return IMPORT.sub(inlined, source.read_text("utf-8"))
