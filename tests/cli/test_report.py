"""``sinklens report``: the page, or what is wrong in one sentence."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sinklens.cli import app
from sinklens.cli.pages import write_report
from tests.helpers.made_results import made_analysis, made_result, put

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


def command(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["report", *arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_writes_the_page(tmp_path):
    put(tmp_path / "run", onset=made_analysis())
    code, out, err = command(str(tmp_path / "run"), "--out", str(tmp_path / "sent" / "page.html"))
    assert (code, out.strip(), err) == (0, str(tmp_path / "sent" / "page.html"), "")
    assert command(str(tmp_path / "run"))[1].strip() == str(tmp_path / "run" / "report.html")


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "there is no folder"), ("empty", "holds no chain.json"), ("file", "no folder")]
)
def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(str(tmp_path / name))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_run_is_one_sentence(tmp_path):
    made_analysis().save(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text("{")
    code, _, err = command(str(tmp_path / "a"))
    assert code == 2 and "is damaged" in err and err.count("\n") == 1
    made_result().save(tmp_path / "b")
    path = tmp_path / "b" / "chain.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {}}))
    code, _, err = command(str(tmp_path / "b"))
    assert code == 2 and "is damaged" in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("report.html"))


@pytest.mark.slow
@pytest.mark.parametrize("made", [made_analysis, made_result])
def test_a_command_that_made_a_result_also_writes_its_page(tmp_path, made):
    made().save(tmp_path / "run")
    assert write_report(tmp_path / "run") == tmp_path / "run" / "report.html"
    assert (tmp_path / "run" / "report.html").stat().st_size > 4_000_000
