"""The options that name a model and prompts: one list of them, and what is made of it."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from sinklens.cli import app
from sinklens.cli.inputs import EventInputs, Inputs, with_inputs
from tests.helpers.command_line import LINE, invoke

NAMES = [field.name for field in fields(Inputs)]
LEFT_OUT = {
    "chain": (),
    "all": (),
    "circuit": ("replicate",),
    "find": ("replicate", "memory_budget"),
    "mitigate": ("block", "event", "super_neurons", "outlier_dims", "replicate", "memory_budget"),
}
SAID: list[Any] = []


@with_inputs(n=3, without=("event",))
def command(*, first: int = 1, inputs: Inputs, last: bool = False) -> None:
    """A command."""
    SAID.append((first, inputs, last))


def bare(*, inputs: Inputs) -> None:
    """A function that no options are put into."""


def run(*arguments: str) -> Any:
    alone = typer.Typer(add_completion=False)
    alone.command()(command)
    alone(list(arguments), standalone_mode=False)
    return SAID.pop()


def test_the_options_stand_where_the_parameter_stood() -> None:
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["first", *(name for name in NAMES if name != "event"), "last"]
    assert parameters["n"].default == 3 and parameters["length"].default == Inputs().length
    assert command.__doc__ == "A command."


def test_what_is_said_arrives_and_the_command_s_own_defaults_where_nothing_is() -> None:
    assert run() == (1, Inputs(n=3), False)
    given = run("--n", "5", "--layer", "2", "--bos", "never", "--last", "--first", "4")
    assert given == (4, replace(Inputs(), n=5, block=2, bos="never"), True)


def test_a_slip_in_the_name_of_an_option_is_told_at_once() -> None:
    for slip in (with_inputs(number=3), with_inputs(without=("events",))):
        with pytest.raises(TypeError, match="there is no such option"):
            slip(bare)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_commands_have_the_same_options(name: str) -> None:
    """Order and help are the fields' own, so that no command says of an option what another does not."""
    commands: Any = typer.main.get_command(app)
    options = {option.name: option for option in commands.commands[name].params}
    assert [option for option in options if option in NAMES] == [one for one in NAMES if one not in LEFT_OUT[name]]
    of_all = {option.name: option.help for option in commands.commands["all"].params}
    shared = [one for one in NAMES if one in options and one != "event"]
    assert [options[one].help for one in shared] == [of_all[one] for one in shared]


def test_the_help_shows_how_a_data_set_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert "NAME[:CONFIG][@SPLIT], such as" in " ".join(invoke("find", "--help").out.split())


def test_what_is_known_of_the_formation() -> None:
    known = Inputs(block=2, super_neurons="3,7", outlier_dims="0-2")
    assert known.given() == {"layer": 2, "super_neurons": (3, 7), "outlier_dims": (0, 1, 2)}
    assert Inputs().given() == {} and Inputs(event=2).given() == {"event": 2}
    assert EventInputs(event="2").given() == {"event": 2} and not EventInputs(event="2").every_event
    assert EventInputs(event="all").given() == {} and EventInputs(event="all").every_event


def test_a_budget_in_bytes() -> None:
    assert Inputs().bytes_allowed() is None
    assert Inputs(memory_budget=0.5).bytes_allowed() == 2**29
    assert Inputs(memory_budget=1e-12).bytes_allowed() == 1


@pytest.mark.usefixtures("quick_load")
def test_several_sets_take_all_texts_where_none_may_be_in_two(here: Path, tiny_folder: Path) -> None:
    """Of six passages of two texts, two sets of one prompt may need any: with one text a line, two are enough."""
    on_tiny = Inputs(model=str(tiny_folder), device="cpu", length=16, n=1, replicate=2)
    lines = [json.dumps({"text": LINE, "group": f"text {number // 3}"}) for number in range(6)]
    (here / "grouped.jsonl").write_text("\n".join(lines))
    assert replace(on_tiny, prompts="grouped.jsonl").load(lambda _: None)[1].n == 6
    (here / "plain.txt").write_text(f"{LINE}\n" * 6)
    assert replace(on_tiny, prompts="plain.txt").load(lambda _: None)[1].n == 2
    assert replace(on_tiny, prompts="random").load(lambda _: None)[1].n == 2
    assert replace(on_tiny, prompts="grouped.jsonl", replicate=None).load(lambda _: None)[1].n == 1
