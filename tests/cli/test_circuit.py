"""``sinklens circuit``: a folder that can be read back, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sinklens.circuits import Circuit
from tests.helpers.command_line import QUICK, invoke

OPTIONS = [*QUICK, "--target", "5", "--min-gap", "0", "--sample", "8", "--control-draws", "2", "--readout-blocks", "1"]


def circuit(folder, *arguments):
    return invoke("circuit", "--model", str(folder), *OPTIONS, *arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("here", "quick_load")
def test_a_folder_is_written(tiny_folder) -> None:
    outcome = circuit(tiny_folder, "--share", "0.6", "--out", "found")
    assert (outcome.code, outcome.err) == (0, "")
    assert "lost without it" in outcome.out and "Results: found; report: found/report.html" in outcome.out
    assert 'id="figure-circuit-graph"' in Path("found/report.html").read_text(encoding="utf-8")
    found = Circuit.load("found")
    assert found.config["command"].startswith("sinklens") and found.config["share"] == 0.6
    tests = found.tests.set_index(["what", "ablation"]).effect
    assert tests["circuit", "other run"] >= 0.6
    again = circuit(tiny_folder, "--share", "0.6", "--out", "found", "--force", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["kept"] == [edge.name for edge in found.kept]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "5,7"], "a circuit is of one target"),
        (["--share", "2"], "--share"),
        (["--target", "40"], "40"),
    ],
)
@pytest.mark.usefixtures("here", "no_model")
def test_mistakes_are_told_in_a_sentence(tiny_folder, arguments, said) -> None:
    outcome = circuit(tiny_folder, *arguments)
    assert outcome.code == 2 and said in outcome.sentence
