"""What is wrong is told in the words of the command that runs, and in Python's where none does."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sinklens as sl
from sinklens.cli import app
from sinklens.cli.words import in_own_words, words_of
from tests.helpers.command_line import Run, invoke, refused
from tests.helpers.folders import earlier_run
from tests.helpers.references import ROOT

PARAMETERS = [
    SimpleNamespace(name=name, opts=opts)
    for name, opts in {
        "out": ["--out"],
        "force": ["--force"],
        "bos": ["--bos"],
        "block": ["--block", "--layer"],
        "min_gap": ["--min-gap"],
        "super_neurons": ["--super-neurons"],
        "backend": ["--backend"],
        "n": ["--n"],
        "runs": ["RUNS"],
    }.items()
]


@pytest.mark.parametrize(
    ("python", "written"),
    [
        (
            "it is there: choose another folder (out=), or use force=True",
            "it is there: choose another --out, or use --force",
        ),
        ('use backend="bridge" for this model.', "use --backend bridge for this model."),
        ("use n=32 or fewer", "use --n 32 or fewer"),
        ('prepend_bos="auto" puts it there', "--bos auto puts it there"),
        ("min_gap -1 must be 0 or more", "--min-gap -1 must be 0 or more"),
        ("super_neurons are given: leave them out", "--super-neurons are given: leave them out"),
        ("name neurons yourself (super_neurons=)", "name neurons yourself (--super-neurons)"),
        ('no such token; leave prepend_bos at "auto" or "never".', "no such token; leave --bos at auto or never."),
        # What no option of this command is stays, and so do stages, files and URLs that have such names.
        ("give the patch source=Source(...), tokenizer=", "give the patch source=Source(...), tokenizer="),
        ("stage super_neurons: runs/n=3/x?n=3 and a.min_gap", "stage super_neurons: runs/n=3/x?n=3 and a.min_gap"),
    ],
)
def test_an_argument_is_told_as_the_option_that_it_is(python: str, written: str) -> None:
    assert in_own_words(python) == python
    with words_of(PARAMETERS):
        assert in_own_words(python) == written
    assert in_own_words(python) == python


@pytest.mark.slow
@pytest.mark.usefixtures("quick_load")
def test_commands_say_what_one_can_type(chain: Run, here: Path, tiny_folder: Path) -> None:
    earlier_run(here / "run")
    refused(chain("--out", "run"), "choose another --out, or replace it with --force")
    refused(chain("--prompts", "passages", "--n", "33"), "use --n 32 or fewer", "--prompts FILE or --prompts random")
    on_tiny = ["--model", str(tiny_folder), "--prompts", "texts.txt", "--length", "16", "--n", "2", "--device", "cpu"]
    on_tiny += ["--block", "1", "--super-neurons", "3,7", "--outlier-dims", "1"]
    refused(invoke("analyse", "onset", *on_tiny, "--lengths", "99"), "use longer prompts (--length)")
    refused(invoke("sweep", *on_tiny, "--min-gap", "-1"), "--min-gap -1.0 must be a finite number, 0 or more")
    refused(invoke("sweep", *on_tiny, "--ray-address", "x"), "--ray-address is for engine ray")


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OF_OTHERS = {"--no-deps", "--force-reinstall", "--capabilities"}
"""pip's, and of a command that a message names."""


def _texts(node: ast.AST) -> str:
    found = [
        inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    ]
    return " ".join(found)


@pytest.mark.slow
def test_the_library_speaks_of_arguments() -> None:
    """Who calls a function has no ``--force`` to give: options are named in the commands' own files alone."""
    files = [*(ROOT / "sinklens").rglob("*.py"), *(ROOT / "analyses").glob("*.py")]
    seen, said = 0, []
    for path in files:
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call: Any = node.func if isinstance(node, ast.Call) else None
            name = getattr(call, "id", getattr(call, "attr", ""))
            if name.endswith(("Error", "warn", "warning", "writing")) or name == "cannot_write":
                seen += 1
                said += [(str(path.relative_to(ROOT)), option) for option in OPTION.findall(_texts(node))]
    assert seen > 200
    assert [pair for pair in said if pair[1] not in OF_OTHERS] == []


@pytest.mark.parametrize(("command", "function"), [("chain", "run_chain"), ("circuit", "circuit")])
def test_what_is_not_said_is_what_python_would_take(command: str, function: str) -> None:
    """The commands load no torch to show their help, so that some write their defaults themselves."""
    import typer.main

    group: Any = typer.main.get_command(app)
    options = {option.name: option.default for option in group.commands[command].params}
    parameters = inspect.signature(getattr(sl, function)).parameters.values()
    shared = {one.name: one.default for one in parameters if one.default is not one.empty and one.name in options}
    numbers = {name: value for name, value in shared.items() if type(value) in (int, float) and name != "target"}
    assert len(numbers) > 2
    assert {name: options[name] for name in numbers} == numbers
