"""Digests of the code that numbers were made with."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sinklens.records.provenance import code_digest


def test_a_file_that_is_edited_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one from which a plain number comes, which does not say where it is from."""
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "an_analysis": "import torch\nfrom a_helper import helped\ndef run(study): return helped(study)\n",
        "a_helper": "from a_number import K\ndef helped(study): return K\n",
        "a_number": "K = 1\n",
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
        for name in ("an_analysis", "a_helper", "a_number"):
            before, path = code_digest(run), tmp_path / f"{name}.py"
            path.write_text(path.read_text() + "# edited\n")
            assert code_digest(run) != before
    finally:
        for name in texts:
            sys.modules.pop(name, None)


SCALE = {"k": 1.0}


def scaled(study: Any) -> float:
    return study * SCALE["k"]


def closed(k: float) -> Any:
    return lambda study: study * k


def test_what_changes_in_a_running_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are the same: a global, what is closed over, a partial function's arguments, an object's state."""
    digest = code_digest(scaled)
    assert code_digest(scaled) == digest
    monkeypatch.setitem(SCALE, "k", 2.0)
    assert code_digest(scaled) != digest
    assert code_digest(closed(1)) == code_digest(closed(1)) != code_digest(closed(2))
    assert code_digest(partial(pow, 2)) == code_digest(partial(pow, 2)) != code_digest(partial(pow, 3))
    assert code_digest(closed(1), closed(1)) != code_digest(closed(1), closed(2))


def test_of_what_cannot_be_told_no_two_digests_are_equal() -> None:
    """What it reads may have changed meanwhile."""

    def reads(_study: Any) -> str:
        return Path("numbers.txt").read_text(encoding="utf-8")

    assert code_digest(reads) != code_digest(reads)


def test_a_function_of_a_notebook_is_known_by_what_it_does() -> None:
    def cell(helped: str) -> Any:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(f"def helper(): return {helped}\ndef run(study): return helper()", names)  # noqa: S102
        return names["run"]

    assert code_digest(cell("1.0")) == code_digest(cell("1.0")) != code_digest(cell("2.0"))
