"""The pages say what is so: results are those of this code, commands, options, links and names exist, examples run."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sinklens as sl
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis, run_analysis
from sinklens.pairs import EDITS
from sinklens.prompts import from_tokens, natural
from sinklens.readouts import READOUTS
from sinklens.study import Study
from tests.helpers.pages import README, blocks, headings, links, readmes, table
from tests.helpers.readme import CIRCUITS, GROUP, HEAD, ORDER, marks, with_table
from tests.helpers.readme import README as RESULTS
from tests.helpers.readme import table as results_of
from tests.helpers.references import ROOT
from tests.helpers.sweeps import FORMATION
from tests.helpers.tiny import tiny_tokens

each_page = pytest.mark.parametrize("page", readmes(), ids=lambda page: str(page.relative_to(ROOT)))
TEXT = README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """The results table: verdict, statistic, value, control, paper by analysis."""
    return table(RESULTS.read_text(encoding="utf-8"), HEAD)


def named_commands(text: str) -> list[list[str]]:
    """Every line of the fenced blocks that is a command of this project, in words, without a comment."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    return [
        shlex.split(line, comments=True) for line in lines if re.match(r"sinklens |python -m tests\.benchmark", line)
    ]


def help_of(words: list[str]) -> str:
    """What the command says of itself."""
    if words[0] == "python":
        from tests.benchmark.__main__ import app

        command = ["--help"]
    else:
        from sinklens.cli import app

        name = words[1:3] if words[1] == "analyse" and "/" not in words[2] else words[1:2]  # not path/to/yours.py
        command = [*name, "--help"]
    found = CliRunner().invoke(app, command, env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    assert found.exit_code == 0, f"{words}: {found.output}"
    return found.output


def test_the_first_page_is_short():
    assert len(TEXT.splitlines()) <= 160


@pytest.mark.slow
def test_every_analysis_has_its_row(rows):
    assert set(rows) == set(list_analyses())
    assert [name for name in ORDER if name in rows] == list(rows)
    for group in (GROUP, CIRCUITS):
        others = table(results_of(RESULTS.read_text(encoding="utf-8"), *marks(group)), HEAD)
        assert list(others) == list(list_analyses(group=group))


def test_the_survey_s_map_names_every_analysis_of_other_sinks():
    survey = RESULTS.read_text(encoding="utf-8").split("## The survey as a map")[1].split("## ")[0]
    assert {name for name in list_analyses(group=GROUP) if f"]({name}.py)" not in survey} == set()


def test_a_new_table_takes_the_place_of_the_old_one_and_of_nothing_else():
    text = RESULTS.read_text(encoding="utf-8")
    assert results_of(text).startswith(HEAD)
    assert with_table(text, results_of(text)) == text
    assert with_table(with_table(text, "| new |"), results_of(text)) == text


def test_the_first_page_s_results_are_those_of_the_table(rows):
    claims = table(TEXT, "| the claim | analysis |")
    assert claims
    for name, outcome, value in claims.values():
        row = rows[name.strip("`")]
        assert (outcome, value) == (row[0], row[2]), name
    outcomes = [row[0].strip("*") for row in rows.values()]
    whole, part = outcomes.count("holds"), outcomes.count("holds in part")
    assert f"Of {len(rows)} analyses {whole} hold and {part} hold in part" in TEXT.replace("\n", " ")


def test_the_map_has_every_room_in_order():
    code = (path for path in (ROOT / "sinklens").iterdir() if path.is_dir() or path.suffix == ".py")
    rooms = {path.stem for path in code if not path.name.startswith("__")}
    above = re.findall(r'^    "(\w+)",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    layers = [name for name in reversed(above) if name in rooms]
    named = re.findall(r"^\| `(\w+)` \|", TEXT[TEXT.index("## The map") :], re.MULTILINE)
    assert named == [*layers, "data"]
    assert set(named) == rooms


@each_page
def test_every_command_that_is_named_exists(page: Path):
    from sinklens.cli import app

    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert set(re.findall(r"`sinklens ([a-z]+)", page.read_text(encoding="utf-8"))) <= known


@pytest.mark.slow
@each_page
def test_every_command_in_a_block_has_its_options(page: Path):
    for words in named_commands(page.read_text(encoding="utf-8")):
        shown = help_of(words)
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), f"{shlex.join(words)}: {option}"


@each_page
def test_every_link_leads_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), link


@each_page
def test_every_file_that_is_named_exists(page: Path):
    for name in re.findall(r"`((?:sinklens|tests|analyses|tutorials)/[\w/.-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.fixture
def loaded_once(monkeypatch, smollm2) -> None:
    """Examples share the model that their first line loads: on a bridge that takes longer than all the rest."""

    def load(name: str) -> Any:
        assert name == "smollm2"
        return smollm2

    monkeypatch.setattr(sl, "load_model", load)


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.usefixtures("loaded_once")
def test_the_first_page_s_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(TEXT, "python")
    names: dict[str, Any] = {}
    small = example.replace("n=8, length=32", "n=2, length=16").replace("8-12", "10")
    assert small != example
    exec(small, names)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert names["logits"].shape[:2] == (2, 16)


def test_the_first_page_s_example_can_be_run_twice():
    """What it writes may be there already: a folder that is saved into is replaced, a sweep's is taken up."""
    (example,) = blocks(TEXT, "python")
    for line in example.splitlines():
        assert ".save(" not in line or "force=True" in line, line


@pytest.mark.slow
@pytest.mark.backend
def test_your_own_question_runs(tiny_llama, capsys):
    """Every block of the page, one after the other, on a tiny model in place of the real one."""
    page = ROOT / "tutorials" / "your_own_question.md"
    first, *others = blocks(page.read_text(encoding="utf-8"), "python")
    assert "sl.load_model" in first and "find_formation" in first and len(others) >= 5
    batch = from_tokens(tiny_llama, tiny_tokens(3, 12))
    names: dict[str, Any] = {"sl": sl, "model": tiny_llama, "batch": batch}
    names["formation"] = replace(FORMATION, sink_positions=(0, 0, 0))
    known = (READOUTS, EDITS)
    before = [dict(each) for each in known]
    try:
        for block in others:
            exec(block, names)
    finally:  # the names of the page are its own
        for each, own in zip(known, before, strict=True):
            for name in each.keys() - own.keys():
                del each[name]
    capsys.readouterr()


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.usefixtures("loaded_once")
def test_the_sweep_s_example_prints_what_the_page_says(capsys):
    pytest.importorskip("plotly")
    (example,) = blocks((ROOT / "sinklens" / "sweeps" / "README.md").read_text(encoding="utf-8"), "python")
    code, _, comment = example.rpartition("\n\n")
    exec(code, {})
    printed, said = capsys.readouterr().out.split(), re.sub(r"^# ", "", comment, flags=re.MULTILINE).split()
    assert printed[:5] == said[:5]  # the head: position, its numbers, layer
    assert [float(x) for x in printed[5:]] == pytest.approx([float(x) for x in said[5:]], abs=0.011)


@pytest.fixture(scope="module")
def study(smollm2) -> Study:
    return Study(smollm2, natural(smollm2, 32, 64))


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("name", ["onset", "super_neurons", "down_projection", "selective_activation"])
def test_the_results_are_those_of_this_code(study, rows, name):
    found = run_analysis(load_analysis(name), study).findings.verdict
    outcome, statistic, value, control, _ = rows[name]
    assert (outcome.strip("*"), statistic.replace("\\|", "|")) == (found.outcome, found.statistic)
    for text, estimate in ((value, found.estimate), (control, found.control_estimate)):
        assert estimate is not None
        said = [float(found) for found in re.findall(r"-?[\d.]+(?:e-?\d+)?", text.replace("−", "-"))]
        assert said == pytest.approx([estimate.value, estimate.low, estimate.high][: len(said)], rel=0.006, abs=1e-4)
