"""What every analysis shares: verdicts, saving and loading, options, being found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pandas.testing import assert_frame_equal

from sinklens.analysis.base import Analysis, AnalysisResult, Findings, verdict, verdict_of
from sinklens.analysis.corrections import parts_table
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.analyses import GIVEN, SIMPLE, draw, study

FOLDER = Path(__file__).parents[2] / "analyses"


def failing(error: Exception) -> Analysis:
    def run(_study: Study) -> Findings:
        raise error

    return Analysis("failing", "Fails", "It fails.", run, draw)


def test_a_statistic_without_a_value_is_not_measurable_whatever_the_rule_says():
    said = verdict("c", "s", Estimate(math.nan), "n", None, "r", holds=True)
    assert said.outcome == "not measurable" and said.reason


@pytest.mark.parametrize(("holds", "outcome"), [(True, "holds"), (False, "does not hold")])
def test_the_rule_decides(holds, outcome):
    assert verdict("c", "s", Estimate(1.0), "n", None, "r", holds).outcome == outcome


def test_what_is_saved_is_loaded(tmp_path):
    result = run_analysis(SIMPLE, study(), top=5)
    again = AnalysisResult.load(result.save(tmp_path / "simple"))
    assert again.findings.verdict == result.findings.verdict
    assert_frame_equal(again.findings.table, result.findings.table)
    assert again.findings.numbers["top"] == 5.0
    assert again.findings.numbers["mean"] == result.findings.numbers["mean"]
    assert math.isnan(float(again.findings.numbers["none"]))  # pyright: ignore[reportArgumentType]
    assert again.config == result.config and again.config["options"]["top"] == 5
    assert again.figure is not None and again.figure["data"]
    assert sorted(path.name for path in (tmp_path / "simple").iterdir()) == [
        "figure.json",
        "summary.json",
        "table.parquet",
    ]


def test_a_folder_of_before_verdicts_had_parts_is_read(tmp_path):
    folder = run_analysis(SIMPLE, study()).save(tmp_path / "simple")
    data = json.loads((folder / "summary.json").read_text())
    assert data["verdict"].pop("parts")
    (folder / "summary.json").write_text(json.dumps(data))
    again = AnalysisResult.load(folder).findings.verdict
    assert again.parts == () and again.outcome == "holds" and again.which == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [{"about": "nothing"}, {"outcome": "holds in part"}, {"name": 3}, {"p_value": "x"}, {"smallest": []}, {"more": 1}],
)
def test_a_damaged_part_is_told(tmp_path, wrong):
    folder = run_analysis(SIMPLE, study()).save(tmp_path / "simple")
    data = json.loads((folder / "summary.json").read_text())
    data["verdict"]["parts"][0] |= wrong
    (folder / "summary.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="damaged"):
        AnalysisResult.load(folder)


def test_a_verdict_of_parts_is_that_of_all_and_shows_the_first():
    good = verdict("c", "s", Estimate(1.0, 0.9, 1.1), "n", None, "r", holds=True).parts[0]
    bad = replace(good, name="cause", about="cause", outcome="does not hold", estimate=Estimate(0.1))
    said = verdict_of("A claim.", [good, bad])
    assert said.outcome == "holds in part" and said.estimate == good.estimate and said.part("cause") == bad
    assert said.which == "quantity: holds; cause: does not hold"
    with pytest.raises(KeyError, match="no part 'other': its parts are quantity, cause"):
        said.part("other")
    for parts in ([], [good, good]):
        with pytest.raises(InputError, match="a verdict needs parts"):
            verdict_of("A claim.", parts)


@pytest.mark.slow
def test_parts_of_several_analyses_are_corrected_together():
    def result(name: str, p_value: float) -> AnalysisResult:
        made = run_analysis(SIMPLE, study())
        part = replace(made.findings.verdict.parts[0], p_value=p_value)
        return replace(made, name=name, findings=replace(made.findings, verdict=verdict_of("It is so.", [part])))

    table = parts_table({"a": result("a", 0.01), "b": result("b", 0.04), "c": result("c", math.nan)})
    assert list(table.analysis) == ["a", "b", "c"] and list(table.part) == ["quantity"] * 3
    assert table.p_holm[:2].tolist() == pytest.approx([0.02, 0.04]) and math.isnan(table.p_holm[2])
    assert parts_table({}).empty


@pytest.mark.parametrize("name", ["summary.json", "table.parquet"])
def test_a_damaged_result_is_told_in_a_sentence(tmp_path, name):
    run_analysis(SIMPLE, study()).save(tmp_path / "simple")
    (tmp_path / "simple" / name).write_bytes(b"{")
    with pytest.raises(InputError, match="damaged"):
        AnalysisResult.load(tmp_path / "simple")


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="has no option bottom.*positions, strengths, axis, top"):
        run_analysis(SIMPLE, study(), bottom=1)


@pytest.mark.parametrize("error", [NoSinkError("no sink here"), NotApplicableError("no gate here")])
def test_what_cannot_be_asked_is_not_measurable(error, tmp_path):
    result = run_analysis(failing(error), study())
    assert (result.findings.verdict.outcome, result.findings.verdict.reason) == ("not measurable", str(error))
    assert result.figure is None
    assert AnalysisResult.load(result.save(tmp_path / "f")).findings.verdict.reason == str(error)


@pytest.mark.parametrize("error", [InputError("mistake"), RuntimeError("a bug")])
def test_mistakes_and_bugs_are_not_results(error):
    with pytest.raises(type(error), match=str(error)):
        run_analysis(failing(error), study())


@pytest.mark.slow
def test_the_configuration_tells_runs_apart():
    def config(*, changes: Any = (), **options: Any) -> dict[str, Any]:
        return run_analysis(SIMPLE, study(**dict(changes)), **options).config

    assert config() == config()
    assert config() != config(top=4)
    assert config() != config(changes={"seed": 1})
    assert config() != config(changes={"given": GIVEN | {"layer": 2}})


# -- Discovery and command line ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_file_that_has_an_analysis_is_listed_with_one_line():
    listed = list_analyses(alone=True)
    for name, line in listed.items():
        assert load_analysis(name).name == name
        assert line and "\n" not in line
    files = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert files == set(listed)


@pytest.mark.slow
def test_an_analysis_of_ones_own_is_loaded_by_its_path(tmp_path):
    assert load_analysis(FOLDER / "_template.py").name == "gate"
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="has no ANALYSIS"):
        load_analysis(tmp_path / "empty.py")
    with pytest.raises(InputError, match="there is no file"):
        load_analysis(tmp_path / "missing.py")
    with pytest.raises(InputError, match="there is no analysis 'nothing': the analyses are .*onset"):
        load_analysis("nothing")
