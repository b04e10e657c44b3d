"""The table of verdicts that change with BOS, length, seed and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sinklens.analysis import suite
from sinklens.analysis.base import Analysis, Findings, verdict
from sinklens.models.load import load_model
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers import flips
from tests.helpers.flips import BEGIN, CHANGES, END, README, measure, with_flips

SEEN: list[Study] = []


def _analysis(name: str) -> Analysis:
    def run(study: Study) -> Findings:
        SEEN.append(study)
        value = float(study.batch.length)
        return Findings(
            verdict("So.", "it", Estimate(value), "no", None, "", holds=value > 13), pd.DataFrame({"x": [1]})
        )

    # What has been seen counts in what the run does, and is another every time: it is left out.
    return Analysis(
        name, name, "So.", run, lambda _: pytest.importorskip("plotly.graph_objects").Figure(), code=verdict
    )


@pytest.mark.slow
def test_one_thing_is_changed_at_a_time(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "list_analyses", lambda: {"onset": ""})
    monkeypatch.setattr(suite, "load_analysis", _analysis)
    short: dict[str, Any] = {name: {"length": 16, **change} for name, change in CHANGES.items()}
    monkeypatch.setattr(flips, "CHANGES", {**short, "32 tokens": {"length": 12}})
    SEEN.clear()
    model = load_model(tiny_folder, device="cpu")
    measured = measure(model, tmp_path, 3, only=["onset"])
    usual, bos, length, seed, other = SEEN
    assert (usual.batch.bos, usual.batch.has_bos, usual.batch.n, usual.seed) == ("auto", False, 3, 0)
    assert bos.batch.has_bos and length.batch.length == 12 and seed.seed == 1
    assert not set(other.batch.groups) & set(usual.batch.groups) and other.batch.n == 3
    table = flips.flips(measured, 3).splitlines()
    assert table[2] == "| `onset` | holds (16) | = (16) | **does not hold** (12) | = (16) | = (16) |"
    assert table[-1].startswith("0 of 1 verdicts are the same whatever is changed (3 prompts")
    measure(model, tmp_path, 3, only=["onset"])
    assert len(SEEN) == 5  # kept


def test_the_readme_has_a_place_for_it() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    changed = with_flips(readme, "A table.")
    assert f"{BEGIN}\n\nA table.\n\n{END}" in changed and with_flips(changed, "A table.") == changed
