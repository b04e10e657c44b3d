"""Reports of folders: what is gathered, what is missing and why, and how to run it again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import sinklens as sl
from sinklens.analysis.base import AnalysisResult, verdict_of
from sinklens.analysis.replicate import save_agreement
from sinklens.chain.agree import Said, compare
from sinklens.chain.rules import Part
from sinklens.errors import InputError
from sinklens.pages.claims import OUTCOMES, claim, counted
from sinklens.pages.gather import gather, of_result
from sinklens.pages.page import report
from sinklens.pages.run import reproduce
from sinklens.statistics import Estimate
from tests.helpers.made_circuit import made_circuit
from tests.helpers.made_results import made_analysis, made_result, put
from tests.helpers.parsed import Parsed
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.slow

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


def told(folder: Path) -> dict[str, tuple[str, str]]:
    return {item.name: (item.status, item.reason) for item in gather(folder).missing}


def in_parts(name: str, p_value: float) -> AnalysisResult:
    """A made-up analysis with a quantity that holds and a cause that does not."""
    result = made_analysis(name)
    details = {"statistic": "what was measured", "rule": "holds when it is above 0.5", "smallest": 0.05}
    parts = (
        Part("quantity", "first", "A sentence of the first.", "holds", estimate=Estimate(0.8, 0.7, 0.9, 8), **details),
        Part("cause", "second", "A sentence of the second.", "does not hold", estimate=Estimate(0.2, 0.1, 0.3, 8)),
    )
    second = replace(parts[1], **details, p_value=1.0, detail="median 0.2, beyond one half in 10% of the prompts")
    said = verdict_of("A claim.", [replace(parts[0], p_value=p_value), second])
    return replace(result, findings=replace(result.findings, verdict=said))


def test_a_folder_of_chains_and_analyses_is_one_page(tmp_path):
    put(
        tmp_path,
        first=made_result(),
        second=made_result(natural=True),
        onset=made_analysis(),
        rank=made_analysis("rank", "does not hold"),
        gate=made_analysis("gate", "not measurable"),
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "today.txt").write_text("not ours")
    (tmp_path / ".sinklens-abc").mkdir()
    gathered = gather(tmp_path)
    assert [part.name for part in gathered.parts] == ["first", "second", "gate", "onset", "rank"]
    assert gathered.missing == []
    text = re.sub(r"\s+", " ", Parsed(report(tmp_path).read_text(encoding="utf-8")).text)
    assert "Of 3 claims put to the test by analyses, 1 holds, 1 does not hold and 1 could not be measured." in text
    for part in ("The chain: first", "The chain: second", "Title of onset", "0.750 [0.610, 0.880], n = 16", "0.012"):
        assert part in text
    assert "it has no such part" in text  # the reason of what is not measurable


def test_outcomes_are_equally_loud(tmp_path):
    put(tmp_path, **{f"part_{i}": made_analysis(f"part_{i}", outcome) for i, outcome in enumerate(OUTCOMES)})
    page = report(tmp_path).read_text(encoding="utf-8")
    for outcome, (mark, kind) in OUTCOMES.items():
        badge = f'<span class="outcome {kind}"><span aria-hidden="true">{mark} </span>{outcome}</span>'
        assert page.count(badge) == 3  # summary, table, section


def test_a_verdict_that_is_none_of_the_three_is_damage(tmp_path):
    put(tmp_path, a=made_analysis("a"), b=made_analysis("b", "proves everything"))
    page = report(tmp_path).read_text(encoding="utf-8")
    assert "none of holds, holds in part, does not hold, undecided and not measurable" in Parsed(page).text


def test_claims_are_counted():
    part, result = of_result(made_analysis()).analyses[0]
    holds = claim(part, result, "a")
    fails, unknown = replace(holds, outcome="does not hold"), replace(holds, outcome="not measurable")
    start = "claims put to the test by analyses"
    assert counted([holds] * 3) == f"Of 3 {start}, 3 hold and 0 do not hold."
    assert counted([holds, fails, unknown]) == f"Of 3 {start}, 1 holds, 1 does not hold and 1 could not be measured."
    partly, unclear = replace(holds, outcome="holds in part"), replace(holds, outcome="undecided")
    said = "1 holds, 2 hold in part, 0 do not hold and 1 is undecided"
    assert counted([holds, partly, partly, unclear]) == f"Of 4 {start}, {said}."
    assert counted([]) == ""


def test_parts_of_a_verdict_are_shown_with_p_corrected_for_their_number(tmp_path):
    put(tmp_path, a=in_parts("a", 0.01), b=in_parts("b", 0.02))
    text = Parsed(report(tmp_path).read_text(encoding="utf-8")).text
    for said in (
        "holds in part",
        "first: holds; second: does not hold",
        "quantity: first",
        "cause: second",
        "A sentence of the second.",
        "median 0.2, beyond one half in 10% of the prompts",
        "Holm 0.040",
        "Holm 0.060",
        "could have seen 0.050",
    ):
        assert said in text, said


def test_a_single_analysis_has_nothing_to_correct_for(tmp_path):
    text = Parsed(report(in_parts("a", 0.01).save(tmp_path / "a")).read_text(encoding="utf-8")).text
    assert "cause: second" in text and "Holm" not in text


def test_an_analysis_s_own_folder_has_no_chain(tmp_path):
    made_analysis().save(tmp_path / "onset")
    parsed = Parsed(report(tmp_path / "onset").read_text(encoding="utf-8"))
    assert "Title of onset" in parsed.text and "Where the sink sets in" not in parsed.text
    assert "2 prompts of 8 tokens: passages" in parsed.text
    assert not any(tag in ("iframe", "svg") for tag, _ in parsed.tags)
    assert [a["data-figure"] for _, a in parsed.tags if "data-figure" in a] == ["analysis-onset"]
    assert "circuitsvis" not in parsed.text.lower()


def test_an_analysis_in_memory(tmp_path):
    assert sl.report(made_analysis(), tmp_path / "page.html").is_file()
    with pytest.raises(InputError, match="say where"):
        sl.report(made_analysis())


def test_parts_that_are_not_there_are_listed_with_the_reason(tmp_path):
    put(tmp_path, chain=made_result(), cut=made_analysis("cut"), left=made_analysis("left"), fine=made_analysis("fine"))
    (tmp_path / "cut" / "summary.json").write_text('{"analysis": "cut"')
    (tmp_path / "left" / "summary.json").unlink()
    entries = {
        "formation": {"status": "done"},
        "fine": {"status": "done", "seconds": 2},
        "broke": {"status": "failed", "reason": "ValueError: no such thing", "seconds": 1},
        "gating": {"status": "not measurable", "reason": "it has no gate"},
        "gone": {"status": "done"},
        "odd": None,
    }
    (tmp_path / "run.json").write_text(json.dumps({"parts": entries, "config": {"command": "sinklens all --n 2"}}))
    found = told(tmp_path)
    assert found.pop("cut")[0] == "damaged"
    assert found.pop("left")[0] == "unfinished"
    assert found == {
        "broke": ("failed", "ValueError: no such thing"),
        "gating": ("not measurable", "it has no gate"),
        "gone": ("missing", "it was run, but its folder is not here"),
        "odd": ("unknown", "no reason was recorded"),
    }
    text = Parsed(report(tmp_path).read_text(encoding="utf-8")).text
    for word in ("ValueError: no such thing", "it has no gate", "sinklens all --n 2", "Title of fine", "6 parts"):
        assert word in text


@pytest.mark.parametrize("text", ["", "[]", "3", '{"parts": [1]}', '{"parts": {"a": 1}, "config": 7}', "[" * 100_000])
def test_a_damaged_record_breaks_nothing(tmp_path, text):
    put(tmp_path, fine=made_analysis("fine"))
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "formation.json").write_text(text)
    assert "Title of fine" in report(tmp_path).read_text(encoding="utf-8")


def test_a_run_in_which_all_failed_says_so(tmp_path):
    (tmp_path / "run.json").write_text('{"parts": {"onset": {"status": "failed", "reason": "no sink"}}}')
    assert "no sink" in Parsed(report(tmp_path).read_text(encoding="utf-8")).text


@pytest.mark.slow
def test_figures_that_are_none_leave_the_rest_as_it_is(tmp_path):
    put(tmp_path, **{f"a{i}": made_analysis(f"a{i}") for i in range(4)})
    huge = {"data": [{"type": "scatter", "y": list(range(400_000))}], "layout": {}}
    for name, content in (("a0", "[1]"), ("a1", '{"data": {"x": 1}}'), ("a2", json.dumps(huge))):
        (tmp_path / name / "figure.json").write_text(content)
    page = report(tmp_path).read_text(encoding="utf-8")
    assert re.findall('data-figure="([^"]*)"', page) == ["analysis-a3"]
    text = Parsed(page).text
    assert text.count("figure.json holds no plotly figure") == 2 and "too large for this page (2.7 MB)" in text


@pytest.mark.parametrize(
    ("file", "change"),
    [
        pytest.param("chain.json", {"config": {}}, marks=pytest.mark.slow),
        ("chain.json", {"runs": 3}),
        ("chain.json", {"tokens": []}),
        ("summary.json", {"verdict": {"outcome": "holds", "claim": 3, "estimate": None, "control_estimate": None}}),
        pytest.param("summary.json", {"config": 3}, marks=pytest.mark.slow),
        ("summary.json", {"seconds": "long", "caption": None}),
    ],
)
def test_a_part_of_the_wrong_shape_is_listed_or_shown(tmp_path, file, change):
    put(tmp_path, chain=made_result(), bad=made_analysis("bad"), fine=made_analysis("fine"))
    path = tmp_path / ("chain" if file == "chain.json" else "bad") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    text = Parsed(report(tmp_path).read_text(encoding="utf-8")).text
    assert "Title of fine" in text
    assert "damaged" in text or "verdict" in change


def test_a_run_inside_a_run_is_left_out_and_said(tmp_path):
    put(tmp_path, fine=made_analysis("fine"))
    put(tmp_path / "inner", deep=made_analysis("deep"))
    (tmp_path / "inner" / "run.json").write_text("{}")
    assert told(tmp_path) == {"inner": ("left out", "it holds a run of its own: report that folder by itself")}


def test_the_formation_comes_from_whatever_part_has_it(tmp_path):
    made = made_analysis("a")
    found = {"layer": 7, "super_neurons": [3], "outlier_dims": list(range(8)), "sink_positions": [0, 2]}
    made.provenance["formation"] = found
    put(tmp_path, a=made, b=made_analysis("b"))
    text = "block 7; sink at position 0, 2; super neurons 3; outlier dimensions 0, 1, 2, 3, 4, 5, …"
    assert text in Parsed(report(tmp_path).read_text(encoding="utf-8")).text


@pytest.mark.parametrize("asks", [True, False])
def test_an_analysis_keeps_the_formation_that_it_asked_for(asks):
    model = tiny_model("llama")
    batch = sl.prompts.from_tokens(model, [[5, 6, 7, 8, 9, 10, 11, 12]] * 2)
    study = sl.Study(model, batch, given={"layer": 1, "super_neurons": [3, 7], "outlier_dims": [2]})
    holds = made_analysis().findings

    def run(study: sl.Study) -> sl.Findings:
        return holds if not asks or study.formation else holds

    result = sl.run_analysis(
        sl.Analysis("a", "A", "It is.", run, lambda _: sl.viz.points(holds.table, "x", "y")), study
    )
    expected = {"layer": 1, "super_neurons": [3, 7], "outlier_dims": [2], "sink_positions": [0]}
    found = result.provenance.get("formation", {})
    assert {**found, "super_neurons": sorted(found.get("super_neurons", [])), "sink_positions": [0]} == (
        expected if asks else {"super_neurons": [], "sink_positions": [0]}
    )


def test_mixed_set_ups_are_told_apart(tmp_path):
    other = replace(made_analysis("b"), provenance={**made_analysis().provenance, "model": "another"})
    put(tmp_path, a=made_analysis("a"), b=other)
    parsed = Parsed(report(tmp_path).read_text(encoding="utf-8"))
    assert "tiny (a)" in parsed.text and "another (b)" in parsed.text and "2 models" in parsed.text


@pytest.mark.slow
def test_a_full_run_stays_small(tmp_path):
    put(tmp_path, chain=made_result(), **{f"a{i}": made_analysis(f"a{i}") for i in range(15)})
    path = report(tmp_path)
    page = path.read_text(encoding="utf-8")
    assert page.count("plotly.js v") == page.count("var CircuitsVis=") == 1
    assert path.stat().st_size < 7_500_000  # leaves 150 kB for each figure


# -- How to run it again ----------------------------------------------------------------------------------------------


def test_an_analysis_made_in_python_has_a_command_that_does_the_same():
    assert reproduce(made_analysis()) == (
        "sinklens analyse onset --model tiny --n 2 --length 8 --prompts passages --seed 0 --dtype float32 "
        "--lengths 8,16"
    )
    given = made_analysis(prompts="random_tokens(seed=0)")
    given.config.update(given={"layer": 1, "super_neurons": [3, 7]}, options={"steps": True, "pairs": None})
    assert reproduce(given).endswith("--prompts random --seed 0 --block 1 --super-neurons 3,7 --dtype float32 --steps")
    given.config["command"] = "sinklens analyse onset --n 3"
    assert reproduce(given) == "sinklens analyse onset --n 3"


def test_an_analysis_of_one_s_own_has_code_that_does_the_same():
    code = reproduce(made_analysis("mine", prompts="file:a.txt"))
    assert "sl.analysis.load_analysis('mine.py')" in code and "lengths=(8, 16)" in code and "'file:a.txt'" in code
    compile(code.replace("batch = ...", "batch = None"), "code", "exec")


def test_a_command_takes_the_short_name_of_the_model():
    result = made_analysis()
    result.provenance["model"] = sl.models.REGISTRY["smollm2"].title
    assert "--model smollm2 " in reproduce(result)


def agreeing(folder: Path) -> None:
    runs = {"<b>one</b>": 0.5, "two": 0.7}
    said = {
        name: [Said("chain", "sink", "agrees", 1.0), Said("<i>rank</i>", "verdict", "holds", value)]
        for name, value in runs.items()
    }
    said["two"][1] = replace(said["two"][1], verdict="undecided")
    said["two"].append(Said("chain", "beside it", "agrees", 0.0, control=True))
    put(folder, **{"target-5": made_result(), "target-7": made_result()})
    save_agreement(compare(said), folder)


def test_runs_that_are_compared_have_a_section(tmp_path):
    agreeing(tmp_path)
    page = report(tmp_path).read_text()
    assert "1 of 2 verdicts are the same for all 2 runs." in Parsed(page).text
    table = page[page.index("Do the runs agree?</h2>") :]
    assert table.index("undecided (0.700)") < table.index("agrees (1)"), "what differs stands first"
    assert "<i>rank" not in page and "<b>one" not in page and "beside it" not in page


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"agreement": 3}', '{"agreement": [{"part": "x"}]}', '{"agreement": [{"part": {"a": 1}}]}'],
)
def test_a_damaged_comparison_is_named_and_the_rest_is_shown(tmp_path, text):
    agreeing(tmp_path)
    (tmp_path / "agreement.json").write_text(text)
    page = report(tmp_path).read_text()
    assert "Do the runs agree?" not in page and "agreement.json" in Parsed(page).text and "target-7" in page


def test_a_run_with_nothing_to_compare_has_no_such_section(tmp_path):
    put(tmp_path, one=made_result())
    save_agreement(compare({"one": [Said("chain", "sink", "agrees", 1.0)]}), tmp_path)
    assert "Do the runs agree?" not in report(tmp_path).read_text()


def test_circuits_stand_behind_chains(tmp_path):
    """With what they keep in words, their figures, and what is left of one that is not whole."""
    put(tmp_path, chain=made_result(), onset=made_analysis())
    made_circuit().save(tmp_path / "circuit")
    found = gather(tmp_path)
    assert [part.name for part in found.parts] == ["chain", "circuit", "onset"]
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "9 of 400 edges keep 0.930 [0.880, 0.980] of the sink (asked: 0.900)." in text
    assert "All but these keep 0.040 [−0.010, 0.090], as many random ones 0.100 [0.050, 0.150]." in text
    for name in ("graph", "graph-narrow", "tests", "pruning", "contributions", "interactions"):
        assert f'id="figure-circuit-{name}"' in text
    assert 'id="views-circuit-tokens"' in text and 'id="views-circuit-attention"' in text
    assert "sl.circuit(" in reproduce(made_circuit())
    (tmp_path / "circuit" / "circuit.json").unlink()
    assert told(tmp_path)["circuit"][0] == "unfinished"
    none = replace(made_circuit(), kept=(), pruning=made_circuit().pruning[:0], attention={})
    text = report(none, tmp_path / "none.html").read_text(encoding="utf-8")
    assert 'id="figure-circuit-graph"' not in text and 'id="figure-circuit-tests"' in text
    assert 'id="verdicts"' not in text
