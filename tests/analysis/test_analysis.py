"""What every analysis shares: verdicts, saving and loading, options, the command line."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from sinklens import sites
from sinklens.analysis.base import Analysis, AnalysisResult, Findings, verdict
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.cli import of_analysis
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.prompts import from_tokens
from sinklens.readouts.base import Readout
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.tiny import tiny_model, tiny_tokens

GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}
FOLDER = Path(__file__).parents[2] / "analyses"


def study(**changes: Any) -> Study:
    model = tiny_model("llama")
    settings: dict[str, Any] = {"given": dict(GIVEN)} | changes
    return Study(model, from_tokens(model, tiny_tokens(3, 16)), **settings)


def simple(
    study: Study,
    *,
    positions: Annotated[tuple[int, ...], "positions to read"] = (2, 4),
    strengths: Annotated[tuple[float, ...], "strengths"] = (1.0, 2.5),
    axis: Annotated[Literal["prompts", "global"], "an axis"] = "prompts",
    top: Annotated[int, "how many"] = 3,
) -> Findings:
    table = pd.DataFrame({"position": positions, "value": [float(p) * len(strengths) for p in positions]})
    mean = study.mean(table.value.tolist())
    said = verdict("It is so.", f"value over {axis}", mean, "nothing", Estimate(0.0), "above 0", mean.above(0))
    return Findings(said, table, "A caption.", {"top": float(top), "none": math.nan, "mean": mean})


def draw(findings: Findings) -> Any:
    from sinklens import viz

    return viz.points(findings.table, "position", "value")


SIMPLE = Analysis("simple", "A simple thing", "It is so.", simple, draw, "figure 0")


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


def test_the_configuration_tells_runs_apart():
    def config(*, changes: Any = (), **options: Any) -> dict[str, Any]:
        return run_analysis(SIMPLE, study(**dict(changes)), **options).config

    assert config() == config()
    assert config() != config(top=4)
    assert config() != config(changes={"seed": 1})
    assert config() != config(changes={"given": GIVEN | {"layer": 2}})


# -- The study ---------------------------------------------------------------------------------------------------------


def test_measuring_is_what_a_cache_holds():
    here = study()
    _, cache = here.model.run_with_cache(here.batch.tokens)
    norms = here.measure([Readout("norm", sites.RESID_POST, (0, 2), lambda a, _: a.norm(dim=-1))])["norm"]
    expected = torch.stack([cache[f"blocks.{b}.hook_resid_post"].norm(dim=-1) for b in (0, 2)])
    torch.testing.assert_close(norms, expected, atol=1e-5, rtol=0)
    kept = here.activations(sites.MLP_POST, (1,))[1]
    torch.testing.assert_close(kept, cache["blocks.1.mlp.hook_post"], atol=1e-6, rtol=0)


def test_targets_and_lengths_fit_the_prompts_or_are_refused():
    here = study()
    sink = here.formation.sink_positions[0]
    assert here.targets((5, sink, 99, 0)) == ((5,) if sink != 5 else ())
    with pytest.raises(InputError, match=r"none of the positions \(0, 15, 40\)"):
        here.targets((0, 15, 40))
    assert here.lengths() == (4, 8, 16)
    with pytest.raises(InputError, match="must be in 2..16"):
        here.lengths((8, 17))


@pytest.mark.parametrize("led", [False, True])
def test_random_prompts_begin_with_a_bos_when_the_given_ones_do(led):
    here = study()
    model: Any = here.model
    model.tokenizer = types.SimpleNamespace(
        bos_token_id=1,
        all_special_ids=[1],
        added_tokens_decoder={},
        get_vocab=lambda: {str(i): i for i in range(101)},
        decode=lambda ids, **_: str(ids[0]),
    )
    if led:
        here.batch.tokens[:, 0] = 1
    random = here.random.batch
    assert (random.n, random.length) == (3, 16)
    assert bool((random.tokens[:, 0] == 1).all()) is led
    assert not (random.tokens[:, 1:] == 1).any()


def test_controls_are_as_many_others():
    here = study()
    for drawn in here.other_neurons("x", 5):
        assert len(set(drawn)) == 2 and not set(drawn) & {3, 7}
    assert here.other_dims("y", 3) == here.other_dims("y", 3) != here.other_dims("z", 3)


def test_a_study_of_the_last_block_has_no_later_ones():
    with pytest.raises(NotApplicableError, match="block 3 is the model's last"):
        study(given=GIVEN | {"layer": 3}).after_formation()


# -- Discovery and command line ----------------------------------------------------------------------------------------


def test_every_file_that_has_an_analysis_is_listed_with_one_line():
    listed = list_analyses()
    for name, line in listed.items():
        assert load_analysis(name).name == name
        assert line and "\n" not in line
    files = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert files == set(listed)


def test_an_analysis_of_ones_own_is_loaded_by_its_path(tmp_path):
    assert load_analysis(FOLDER / "_template.py").name == "gate"
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="has no ANALYSIS"):
        load_analysis(tmp_path / "empty.py")
    with pytest.raises(InputError, match="there is no file"):
        load_analysis(tmp_path / "missing.py")
    with pytest.raises(InputError, match="there is no analysis 'nothing': the analyses are .*onset"):
        load_analysis("nothing")


def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    model = tiny_model("llama")
    batch = from_tokens(model, tiny_tokens(3, 16))
    monkeypatch.setattr(of_analysis, "load", lambda *_, **__: (model, batch))
    with pytest.raises(SystemExit) as stopped:
        of_analysis.run_command(SIMPLE, [*args, "--out", str(tmp_path / "out")], "simple")
    return int(stopped.value.code or 0)


def test_the_command_has_the_analysis_s_own_options(tmp_path, monkeypatch, capsys):
    args = ("--positions", "1-3,9", "--strengths", "0.5,2", "--axis", "global", "--top", "7", "--json")
    assert command(tmp_path, monkeypatch, *args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["options"] == {
        "positions": [1, 2, 3, 9],
        "strengths": [0.5, 2.0],
        "axis": "global",
        "top": 7,
    }
    assert printed == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_the_command_prints_the_verdict(tmp_path, monkeypatch, capsys):
    assert command(tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "HOLDS" in out and "It is so." in out and "above 0" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--positions", "x"), "--positions 'x' must be whole numbers"),
        (("--strengths", "1,nan"), "--strengths '1,nan' must be numbers"),
        (("--axis", "sideways"), "sideways"),
        (("--bottom", "1"), "No such option"),
        (("--super-neurons", "one"), "--super-neurons 'one' must be whole numbers"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, args, message):
    import typer

    try:
        code = command(tmp_path, monkeypatch, *args)
    except typer.Exit as error:
        code = error.exit_code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and message in said.err and "Traceback" not in said.err
    assert not (tmp_path / "out").exists()
