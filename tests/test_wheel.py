"""The wheel: what is in it, and that it works where there is no checkout.

It is installed into an empty environment that borrows the packages of this one, so that the tests are quick. CI names
one in ``SINKLENS_WHEEL_VENV`` in which pip has installed the wheel with all that it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sinklens.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands)

Run = Callable[..., subprocess.CompletedProcess[str]]


def checked(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command's output; it must end well, and finds no checkout by ``PYTHONPATH``."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    checked(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's commands, with the wheel in it."""
    if "SINKLENS_WHEEL_VENV" in os.environ:
        return Path(os.environ["SINKLENS_WHEEL_VENV"]).resolve() / "bin"
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    checked(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file adds that folder and leaves its own .pth files alone, such as one of an editable sinklens.
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """A command of that environment, in an empty folder."""
    return lambda name, *arguments: checked(installed / name, *arguments, cwd=tmp_path)


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "sinklens").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"sinklens/__init__.pyi", "sinklens/data/passages.jsonl", "sinklens/viz/templates/frame.css"} <= files
    analyses = {f"sinklens/analyses/{path.name}" for path in (ROOT / "analyses").glob("*.py")}
    assert len(analyses) > 10
    assert files | analyses <= names
    others = {name for name in names - files - analyses if not name.split("/")[0].endswith(".dist-info")}
    assert {name for name in others if not name.startswith("sinklens/analyses/")} == set()
    parts = {part for name in names for part in name.split("/")}
    assert not [part for part in parts if part.startswith(("test_", "benchmark")) or part in ("tests", "conftest.py")]
    assert not [part for part in parts if part.endswith(".pyc")]


def test_it_is_the_wheel_that_is_run(run: Run, installed: Path) -> None:
    where = run("python", "-c", "import sinklens; print(sinklens.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed.parent) and ROOT / "sinklens" not in Path(where).parents


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS), ["analyse", "onset"]], ids=" ".join)
def test_help(run: Run, arguments: list[str]) -> None:
    done = run("sinklens", *arguments, "--help")
    assert "Usage" in done.stdout and done.stderr == ""


def test_analyses_and_models_are_listed(run: Run) -> None:
    listed = run("sinklens", "analyse", "--list").stdout
    names = [path.stem for path in (ROOT / "analyses").glob("[!_]*.py")]
    assert names and all(name in listed for name in names)
    assert "smollm2" in run("sinklens", "models").stdout
