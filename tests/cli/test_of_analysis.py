"""The command of one analysis: its own options, its verdict, and bad input in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from sinklens.analysis import Findings
from sinklens.cli import of_analysis
from sinklens.cli.inputs import Inputs
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers.analyses import SIMPLE
from tests.helpers.tiny import tiny_model, tiny_tokens


def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    model = tiny_model("llama")
    batch = from_tokens(model, tiny_tokens(3, 16))
    monkeypatch.setattr(Inputs, "load", lambda *_, **__: (model, batch))
    with pytest.raises(SystemExit) as stopped:
        of_analysis.run_command(SIMPLE, [*args, "--out", str(tmp_path / "out")], "simple")
    return int(stopped.value.code or 0)


@pytest.mark.slow
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


@pytest.mark.slow
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
    try:
        code = command(tmp_path, monkeypatch, *args)
    except typer.Exit as error:
        code = error.exit_code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and message in said.err and "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def with_option(run):
    return replace(SIMPLE, run=run)


def block(study, *, block: int = 3): ...


def n(study, *, n: int = 3): ...


def layer(study, *, layer: int = 3): ...


def json_(study, *, json: bool = False): ...


def help_(study, *, help: int = 3): ...


def without_default(study, *, depth: int): ...


def unknown(study, *, depth: Nowhere = 3): ...  # noqa: F821  # pyright: ignore


@pytest.mark.parametrize(
    ("run", "message"),
    [
        *((run, "has the name of one that every such command has") for run in (block, n, layer, json_, help_)),
        (without_default, "the option 'depth' of simple has no default"),
        (unknown, "the annotations of unknown cannot be read (name 'Nowhere' is not defined)"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(capsys, run, message):
    with pytest.raises(typer.Exit) as stopped:
        of_analysis.run_command(with_option(run), ["--help"], "simple")
    told = capsys.readouterr().err
    assert stopped.value.exit_code == 2 and message in told and len(told.splitlines()) == 1


def test_an_option_without_an_annotation_has_the_type_of_its_default(capsys):
    def run(study, *, depth=3, table=None): ...

    with pytest.raises(SystemExit) as stopped:
        of_analysis.run_command(with_option(run), ["--help"], "simple")
    told = capsys.readouterr().out
    assert not stopped.value.code and "--depth" in told and "<int>" in told and "--table" not in told


def test_lists_of_any_kind_are_options_and_the_help_says_what_is_for_python_alone(tmp_path, monkeypatch, capsys):
    def run(
        study: Study,
        blocks: list[int] = [1, 2],  # noqa: B006
        doses: Sequence[float] = (0.5,),
        words: list[str] = [],  # noqa: B006
        weigh: Callable[[float], float] = abs,
    ) -> Findings:
        assert (blocks, doses, words, weigh) == ([3, 4], (1.0, 2.5), ["a", "b"], abs)
        return SIMPLE.run(study)

    model = tiny_model("llama")
    batch = from_tokens(model, tiny_tokens(3, 16))
    monkeypatch.setattr(Inputs, "load", lambda *_, **__: (model, batch))
    for args in (["--help"], ["--blocks", "3,4", "--doses", "1,2.5", "--words", "a,b", "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stopped:
            of_analysis.run_command(replace(SIMPLE, run=run), args)
        assert not stopped.value.code
        if args == ["--help"]:
            assert "In Python alone: weigh." in capsys.readouterr().out
