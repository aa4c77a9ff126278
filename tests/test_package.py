"""The wheel: built from the tracked files, installed away from the checkout, imported and run there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Neither the checkout nor anything that a developer exports is on the path of the processes started here.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that must succeed."""
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} exited {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip(*arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the files that git tracks or would track, beside folders that a checkout gathers."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "any name"
    for name in run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    for decoy in (".venv/lib/decoy.py", "build/decoy.py", "dist/decoy.py"):
        (source / decoy).parent.mkdir(parents=True)
        (source / decoy).write_text("raise AssertionError\n", encoding="utf-8")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_listed_packages_only(wheel: Path) -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {name.replace(".", "/") for name in config["tool"]["setuptools"]["packages"]}
    expected = {
        f"{folder}/{file.name}"
        for folder in folders
        for file in (ROOT / folder.removeprefix("fxpress").lstrip("/")).glob("*.py")
    }
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)


@pytest.mark.slow
def test_installed_wheel_imports_and_runs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # The dependencies of this environment, by path: a .pth file found this way is not processed, so neither is the
    # editable install of the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip("--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    imported = Path(run(python, "-c", "import fxpress; print(fxpress.__file__)", cwd=tmp_path).strip())
    assert imported.is_relative_to(environment)
    assert "Usage" in run(environment / "bin" / "fxpress", "--help", cwd=tmp_path)
