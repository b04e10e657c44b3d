"""What commands are run on: an empty folder, a tiny model that is loaded once, or none at all."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinklens.models.load import load_model
from tests.helpers.command_line import LINE, QUICK, Outcome, Run, invoke, snapshot
from tests.helpers.synthetic import synthetic_result


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder: Path) -> Any:
    return load_model(tiny_folder, device="cpu")


@pytest.fixture
def quick_load(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tiny_loaded: Any) -> None:
    """The tiny model is loaded once for all tests; everything else is left to the real function."""

    def load(model: str, **options: Any) -> Any:
        usual = model == str(tiny_folder) and options["device"] == "cpu"
        return tiny_loaded if usual else load_model(model, **options)

    monkeypatch.setattr("sinklens.models.load.load_model", load)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with a file of two usable prompts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text(f"{LINE}\n{LINE} w4\n")
    return tmp_path


@pytest.fixture
def chain(here: Path, tiny_folder: Path, quick_load: None) -> Run:
    """`sinklens chain` in this process, on the tiny model unless told otherwise; checks that nothing is left."""
    del quick_load

    def run(*arguments: str, changes: bool = False) -> Outcome:
        defaults = {"--model": str(tiny_folder), "--prompts": "texts.txt", "--length": "16", "--device": "cpu"}
        given = [part for pair in defaults.items() if pair[0] not in arguments for part in pair]
        before = snapshot(here)
        outcome = invoke("chain", *given, *arguments)
        assert changes or snapshot(here) == before
        return outcome

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, quick_load: None) -> None:
    """Loading a model is an error: what is wrong must be said before that."""

    del quick_load  # asked for so that this comes after it

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sinklens.models.load.load_model", refuse)


@pytest.fixture
def fake_chain(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The main job answers at once with a synthetic result; gives the arguments that it was called with."""
    called: dict[str, Any] = {}

    def run_chain(model: object, batch: object, *, progress: Callable[[int, int], None], **options: Any) -> Any:
        progress(1, 2)
        called.update(options, model=model, batch=batch)
        return synthetic_result()

    def report(folder: Path) -> Path:
        (folder / "report.html").write_text("<p>a report</p>")
        return folder / "report.html"

    fake_report = types.ModuleType("sinklens.pages.page")
    fake_report.report = report  # pyright: ignore[reportAttributeAccessIssue]: a module made here
    monkeypatch.setattr("sinklens.cli.of_chain.run_chain", run_chain)
    monkeypatch.setitem(sys.modules, "sinklens.pages.page", fake_report)
    return called


@pytest.fixture
def sweep(here: Path, tiny_folder: Path, quick_load: None) -> Any:
    """`sinklens sweep` in this process on the tiny model."""
    del quick_load, here
    return lambda *arguments: invoke("sweep", "--model", str(tiny_folder), *QUICK, *arguments)
