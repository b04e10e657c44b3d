"""Digests of the code that numbers were made with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from sinklens.records.provenance import code_digest


def test_the_users_own_files_count_and_those_that_they_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "an_analysis": "import torch\nfrom a_helper import helped\ndef run(study): return helped(study)\n",
        "a_helper": "import a_constant as c\ndef helped(study): return c.K\n",
        "a_constant": "K = 1\n",
        "another": "K = 1\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    try:
        run = importlib.import_module("an_analysis").run
        digest = code_digest(run)
        assert code_digest(run) == digest
        (tmp_path / "another.py").write_text("K = 2\n")
        assert code_digest(run) == digest
        for name in ("an_analysis", "a_helper", "a_constant"):
            before, path = code_digest(run), tmp_path / f"{name}.py"
            path.write_text(path.read_text() + "# edited\n")
            assert code_digest(run) != before
    finally:
        for name in texts:
            sys.modules.pop(name, None)


def test_a_plain_number_from_another_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say where it comes from; the import statement does, inside a function too."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_numbers.py").write_text("from number_one import K\ndef run(study):\n    from number_two import L\n")
    for name in ("number_one", "number_two"):
        (tmp_path / f"{name}.py").write_text("K = L = 1\n")
    try:
        run = importlib.import_module("of_numbers").run
        digest = code_digest(run)
        for name in ("number_one", "number_two"):
            (tmp_path / f"{name}.py").write_text("K = L = 2\n")
            assert code_digest(run) != digest
            digest = code_digest(run)
    finally:
        for name in ("of_numbers", "number_one"):
            sys.modules.pop(name, None)


def test_a_function_of_a_notebook_is_known_by_what_it_does() -> None:
    def cell(helped: str) -> Any:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(f"def helper(): return {helped}\ndef run(study): return helper()", names)  # noqa: S102
        return names["run"]

    assert code_digest(cell("1.0")) == code_digest(cell("1.0")) != code_digest(cell("2.0"))
