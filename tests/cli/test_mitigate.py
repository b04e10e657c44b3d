"""`sinklens mitigate`: a planted sink taken away and reported, and one sentence for every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens.cli.inputs import Inputs
from sinklens.prompts import from_tokens
from tests.helpers.command_line import invoke
from tests.helpers.planted import MINUS, PLUS, planted_model


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The planted model is what is loaded."""

    def load(inputs: Inputs, _step: Any) -> tuple[Any, Any]:
        model, pairs = planted_model(), torch.tensor([[PLUS, MINUS], [MINUS, PLUS]])
        drawn = pairs[torch.randint(0, 2, (inputs.n, 7), generator=torch.Generator().manual_seed(0))].flatten(1)
        return model, from_tokens(model, torch.cat([pairs[:1].expand(inputs.n, 2), drawn], 1))

    monkeypatch.setattr(Inputs, "load", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_prints_its_table_and_writes_its_page(planted: Path) -> None:
    done = invoke("mitigate", "--what", "massive-zero,bias,silence", "--n", "6", "--generate", "2", "--out", "out")
    assert done.code == 0, done.err
    assert "massive-zero" in done.out and "untouched" in done.out and "Results: out" in done.out
    assert "note: silence is left out" in done.err
    assert {path.name for path in (planted / "out").iterdir()} == {
        "mitigation.json",
        "report.html",
        "table.parquet",
        "values.parquet",
    }
    data = json.loads((planted / "out" / "mitigation.json").read_text())
    assert data["config"]["command"].startswith("sinklens")
    assert [row["name"] for row in data["rows"]] == ["massive-zero", "bias"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--what", "softness"], "--what 'softness' is not known: choose from massive-zero"),
        (["--n", "1"], "fitted on some prompts and measured on others"),
        (["--fit", "0"], "--fit"),
    ],
)
def test_bad_input_is_one_sentence(planted: Path, arguments: list[str], words: str) -> None:
    done = invoke("mitigate", *arguments, "--out", "out")
    assert done.code == 2 and words in done.err
    assert not (planted / "out").exists()


@pytest.mark.slow
def test_all_takes_them_with_it_and_keeps_them(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinklens.mitigation.run import mitigate

    arguments = ["all", "--only", "formation", "--with", "mitigations", "--n", "6", "--target", "4", "--out", "out"]
    done = invoke(*arguments)
    assert done.code == 0, done.err
    found = planted / "out" / "mitigations"
    assert (found / "mitigation.json").is_file()
    assert "massive-zero" in (planted / "out" / "report.html").read_text()
    before = (found / "mitigation.json").read_bytes()
    monkeypatch.setattr("sinklens.mitigation.run.mitigate", lambda *_, **__: pytest.fail("they were there"))
    assert invoke(*arguments).code == 0
    assert (found / "mitigation.json").read_bytes() == before
    monkeypatch.setattr("sinklens.mitigation.run.mitigate", mitigate)
    done = invoke(*arguments, "--seed", "1")
    assert done.code == 0 and (found / "mitigation.json").read_bytes() != before, done.err


@pytest.mark.slow
def test_all_has_mitigations_of_one_run_alone(planted: Path) -> None:
    done = invoke("all", "--with", "mitigations", "--event", "all", "--out", "out")
    assert done.code == 2 and "one event and one set of prompts" in done.err
    assert not (planted / "out").exists()
