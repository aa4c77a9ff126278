"""A copy of a kernel's module with an epilogue of the test's own, as generated code has."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

HOOK = re.compile(r"^ *# hook: (\w+)[^\n]*\n(.*?)^ *# end\n", re.DOTALL | re.MULTILINE)


def generate(source: Path, target: Path, parameters: str, epilogue: str) -> ModuleType:
    """Write the module with the lines of its hooks replaced, wherever they are, and import it."""
    lines = {"parameters": parameters, "epilogue": epilogue}
    text = HOOK.sub(lambda hook: textwrap.indent(textwrap.dedent(lines[hook[1]]), "    "), source.read_text("utf-8"))
    target.write_text(text, encoding="utf-8")
    # Under a name in the package: what the copy imports relatively is found.
    spec = importlib.util.spec_from_file_location(f"fxpress.kernels.{target.stem}", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
