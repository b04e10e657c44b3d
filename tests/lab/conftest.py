"""A text, and a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sinklens.lab import Trained
from tests.helpers.lab import trained

PASSAGES = Path(__file__).parents[2] / "sinklens/data/passages.jsonl"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's passages, as a folder of files."""
    folder = tmp_path_factory.mktemp("texts")
    for number, line in enumerate(PASSAGES.read_text(encoding="utf-8").splitlines()):
        (folder / f"{number:02d}.txt").write_text(json.loads(line)["text"], encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's cache; all use one."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("SINKLENS_CACHE", str(folder))
    return folder
