"""Digests of the code that numbers were made with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

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
