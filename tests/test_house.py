"""The house in order: rooms have tests of their names, tests stand alone, and the public names are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import sinklens as sl
from tests.helpers.command_line import environment

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "sinklens", ROOT / "tests"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
TOP = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
PUBLIC = re.findall(r"^from (\S+) import (\w+) as (\w+)$", (PACKAGE / "__init__.pyi").read_text("utf-8"), re.M)


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, and ``module.name`` for what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.slow
def test_no_test_is_imported() -> None:
    """What two tests share is in ``helpers`` or in a ``conftest.py``."""
    files = [path for folder in ("tests", "sinklens", "analyses") for path in (ROOT / folder).rglob("*.py")]
    assert TESTS / "test_house.py" in files
    taken = [(str(path.relative_to(ROOT)), name) for path in files for name in imported(path)]
    assert [pair for pair in taken if re.search(r"(^|\.)test_|^tests\..*conftest", pair[1])] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_tests(room: str) -> None:
    assert list((TESTS / room).glob("test_*.py")), f"tests/{room} holds no test"


@pytest.mark.parametrize("name", TOP)
def test_every_file_at_the_top_has_its_tests(name: str) -> None:
    assert (TESTS / f"test_{name}.py").is_file()


def test_no_file_begins_with_an_underscore() -> None:
    names = {path.name for path in PACKAGE.rglob("_*") if "__pycache__" not in path.parts}
    assert names == {"__init__.py", "__init__.pyi", "__main__.py"}


@pytest.mark.parametrize("name", [name for _, _, name in PUBLIC])
def test_a_public_name_loads(name: str) -> None:
    assert getattr(sl, name) is not None


def test_public_names_are_listed_once() -> None:
    lines = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8").splitlines()
    assert len(PUBLIC) == sum("import" in line for line in lines), "a line of another form"
    assert [name for name, times in Counter(name for _, _, name in PUBLIC).items() if times > 1] == []
    assert all(original == name for _, original, name in PUBLIC)
    assert set(dir(sl)) == {name for _, _, name in PUBLIC}


# -- What can be run by its name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("-m sinklens.cli --help", ("chain", "sweep", "analyse")),
        pytest.param("-m sinklens.analysis.capabilities_page --help", ("usage", "FAMILY"), marks=pytest.mark.slow),
        pytest.param("analyses/onset.py --help", ("--model", "--prompts"), marks=pytest.mark.slow),
    ],
    ids=["cli", "capabilities", "analysis"],
)
def test_modules_and_files_say_how_they_are_run(command: str, words: tuple[str, ...]) -> None:
    run = [sys.executable, *command.split()]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT, env=environment(), timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(word in done.stdout for word in words)
