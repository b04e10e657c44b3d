"""The README says what is so: its results are those of this code, its commands exist."""

from __future__ import annotations

import re

import pytest

from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.prompts import natural
from sinklens.study import Study
from tests.helpers.readme import HEAD, README

TEXT = README.read_text(encoding="utf-8")
ROWS = {
    cells[0].strip(" `"): [cell.strip() for cell in cells[1:]]
    for cells in (re.split(r"(?<!\\)\|", line)[1:-1] for line in TEXT[TEXT.index(HEAD) :].split("\n\n")[0].split("\n"))
}
"""The results table: verdict, statistic, value, control, paper by analysis."""


def test_every_analysis_has_its_row():
    assert set(ROWS) >= set(list_analyses())


def test_every_command_that_is_named_exists():
    from sinklens.cli import app

    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert set(re.findall(r"`sinklens ([a-z]+)", TEXT)) <= known


@pytest.fixture(scope="module")
def study(smollm2) -> Study:
    return Study(smollm2, natural(smollm2, 32, 64))


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("name", ["onset", "super_neurons", "down_projection", "selective_activation"])
def test_the_results_are_those_of_this_code(study, name):
    found = run_analysis(load_analysis(name), study).findings.verdict
    outcome, statistic, value, control, _ = ROWS[name]
    assert (outcome.strip("*"), statistic.replace("\\|", "|")) == (found.outcome, found.statistic)
    for text, estimate in ((value, found.estimate), (control, found.control_estimate)):
        assert estimate is not None
        said = [float(found) for found in re.findall(r"-?[\d.]+(?:e-?\d+)?", text.replace("−", "-"))]
        assert said == pytest.approx([estimate.value, estimate.low, estimate.high][: len(said)], rel=0.006, abs=1e-4)
