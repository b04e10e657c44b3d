"""The user's own files that code is made of, found without importing anything."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sinklens.records.own_files import own_files

FILES = {
    "an_analysis.py": """
import json, torch
from a_package import helper
from a_package.inner import PLAIN
from a_module import helped
import a_namespace.part
def run(study):
    from later import L
    import late_package.deep.part
    return helped(study)
class Runs:
    def __call__(self, study): return 1
""",
    "a_module.py": "import a_constant as c\ndef helped(study): return c.K\n",
    "a_constant.py": "K = 1\n",
    "a_package/__init__.py": "from .first import *\nfrom . import second\n",
    "a_package/first.py": "K = 1\n",
    "a_package/second.py": "from .inner.deep import L\n",
    "a_package/helper.py": "K = 1\n",
    "a_package/inner/__init__.py": "PLAIN = 1\n",
    "a_package/inner/deep.py": "from ..first import K\nfrom ..sibling import M\nL = 1\n",
    "a_package/sibling.py": "M = 1\n",
    "a_namespace/part.py": "K = 1\n",
    "later.py": "L = 1\n",
    "late_package/__init__.py": "from . import other\n",
    "late_package/other.py": "K = 1\n",
    "late_package/deep/__init__.py": "",
    "late_package/deep/part.py": "from ..other import K\nraise RuntimeError('nobody imports this')\n",
}
NOT_READ = {"a_package/unused.py": "K = 1\n", "unused.py": "K = 1\n"}
"""Nothing imports these."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in (FILES | NOT_READ).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)) or name == "a_namespace":
            del sys.modules[name]


def names(folder: Path, *functions: Callable[..., Any]) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in own_files(*functions)}


def test_all_that_is_imported_is_found_and_nothing_else(folder: Path) -> None:
    """By statements at the top and inside functions, of packages, relative ones, and what is not imported yet."""
    module = importlib.import_module("an_analysis")
    assert names(folder, module.run) == set(FILES)
    assert "later" not in sys.modules and "late_package" not in sys.modules
    assert names(folder, functools.partial(module.run, None)) == set(FILES)
    assert names(folder, module.Runs()) == names(folder, module.Runs().__call__) == set(FILES)


def test_it_starts_at_a_module_inside_a_package(folder: Path) -> None:
    (folder / "a_package" / "runs.py").write_text("from .sibling import M\ndef run(study): ...\n")
    run = importlib.import_module("a_package.runs").run
    inside = ("runs", "sibling", "__init__", "first", "second", "inner/__init__", "inner/deep")
    assert names(folder, run) == {f"a_package/{name}.py" for name in inside}


def test_what_no_statement_names_is_found_by_its_values(folder: Path) -> None:
    (folder / "by_text.py").write_text(
        "import importlib\nhelped = importlib.import_module('a_module').helped\ndef run(study): return helped(study)\n"
    )
    assert names(folder, importlib.import_module("by_text").run) == {"by_text.py", "a_module.py", "a_constant.py"}


def test_what_has_no_file_has_none() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec("def run(study): ...", scope)  # noqa: S102
    assert own_files(scope["run"]) == [] == own_files(len)
