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
from sinklens.cli.words import FUNCTIONS, in_own_words, words_of
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
        "event": ["--event"],
        "strength": ["--strength"],
        "stages": ["--stages"],
        "edits": ["--edits"],
        "metric": ["--metric"],
        "companions": ["--with"],
        "layers": ["--layers"],
        "units": ["--units"],
        "engine": ["--engine"],
        "workers": ["--workers"],
        "ray_address": ["--ray-address"],
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
        # A sentence that begins with an argument, and its value or what is said of it.
        ("strength inf must be a finite number", "--strength inf must be a finite number"),
        ("n must be at least 1, and it is 0.", "--n must be at least 1, and it is 0."),
        ("layers 4, 5: the model's blocks are 0-3", "--layers 4, 5: the model's blocks are 0-3"),
        ("layers '5-2' runs backwards: write 2-5", "--layers '5-2' runs backwards: write 2-5"),
        ("layers is empty: write all", "--layers is empty: write all"),
        ("units heads: mlp_out has none of these", "--units heads: mlp_out has none of these"),
        ("block [99] is not in 0..3", "--block [99] is not in 0..3"),
        # One of the things that it lists; what only Python can be given is not said.
        ("edit 'no' is not known: choose from zero, or give an Edit", "--edits 'no' is not known: choose from zero"),
        ("companion 'x': write PLACE:EDIT, or give a Companion", "--with 'x': write PLACE:EDIT"),
        ("engine ray needs workers: how many copies", "--engine ray needs --workers: how many copies"),
        (
            "ray_address is for engine ray, and this is local: leave it out, or choose engine ray",
            "--ray-address is for engine ray, and this is local: leave it out, or choose --engine ray",
        ),
        ("it runs on one device: leave backend and devices out.", "it runs on one device: leave --backend out."),
        ("workers is for engine ray, and this is local", "--workers is for engine ray, and this is local"),
        ("readout 'no' is not known: choose from kl", "--metric 'no' is not known: choose from kl"),
        ("none of the positions (99,) will do", "none of the positions 99 will do"),
        (
            "not with {'a': 1}: Variant.__init__() got an unexpected keyword argument 'a'.",
            "not with {'a': 1}: it has no option 'a'.",
        ),
        # Nouns of the field, and things that are not what one typed.
        ("block 3 is the model's last: no later block attends", "block 3 is the model's last: no later block attends"),
        ("event 1 (block 0) is left out: why", "event 1 (block 0) is left out: why"),
        ("readout 'kl' is not finite in the run 'base'", "readout 'kl' is not finite in the run 'base'"),
        ("stages of the chain are scored: leave it out", "stages of the chain are scored: leave it out"),
        # What no option of this command is stays, and so do stages, files and URLs that have such names.
        ("give the patch source=Source(...), tokenizer=", "give the patch source=Source(...), tokenizer="),
        ("stage super_neurons: runs/n=3/x?n=3 and a.min_gap", "stage super_neurons: runs/n=3/x?n=3 and a.min_gap"),
    ],
)
def test_an_argument_is_told_as_the_option_that_it_is(python: str, written: str) -> None:
    assert in_own_words(python) == python, "where no command runs"
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
    refused(invoke("sweep", *on_tiny, "--engine", "ray"), "--engine ray needs --workers: how many copies of the model")
    known = invoke("sweep", *on_tiny, "--edits", "nope")
    refused(known, "--edits 'nope' is not known: choose from transplant")
    assert "Edit" not in known.err
    refused(invoke("sweep", *on_tiny, "--with", "z"), "--with 'z': write PLACE:EDIT")
    refused(invoke("sweep", *on_tiny, "--with", "z:nope"), "--with z:nope: edit 'nope' is not known")
    refused(invoke("sweep", *on_tiny, "--with", "nope:zero"), "--with nope:zero: stage 'nope' is not known")
    refused(invoke("analyse", "mask_intervention", *on_tiny, "--positions", "99"), "none of the positions 99 will do")
    refused(chain("--metric", "nope"), "--metric 'nope' is not known: choose from")
    refused(chain("--target", "40"), "--target 40 must be in 1..14")
    refused(chain("--length", "0"), "prompts of 0 tokens must be at least 3 long")


def _said() -> list[str]:
    """All that the library says when something is wrong, a call's texts as one."""
    files = [*(ROOT / "sinklens").rglob("*.py"), *(ROOT / "analyses").glob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files if path.parent.name != "cli"]
    return [_texts(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.slow
def test_what_is_said_shorter_is_still_said() -> None:
    said = _said()
    assert [sentence for sentence in FUNCTIONS if not any(sentence in text for text in said)] == []


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


@pytest.mark.parametrize(
    ("command", "function"), [("chain", "run_chain"), ("circuit", "circuit"), ("mitigate", "mitigate")]
)
def test_what_is_not_said_is_what_python_would_take(command: str, function: str) -> None:
    """The commands load no torch to show their help, so that some write their defaults themselves."""
    import typer.main

    group: Any = typer.main.get_command(app)
    options = {option.name: option.default for option in group.commands[command].params}
    parameters = inspect.signature(getattr(sl, function)).parameters.values()
    shared = {one.name: one.default for one in parameters if one.default is not one.empty and one.name in options}
    plain = {name: value for name, value in shared.items() if type(value) in (int, float, str) and name != "target"}
    assert len(plain) > 1
    assert {name: options[name] for name in plain} == plain
