"""Command lines that nobody would write, made from the commands' own options: each ends with one sentence or works.

A few hundred by default, always the same; ``SINKLENS_FUZZ=5000`` makes that many, and ``SINKLENS_FUZZ_SEED`` others.
"""

from __future__ import annotations

import os
import random
import re
import shlex
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import typer.main

from sinklens import cli
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import load_analysis
from sinklens.cli import of_analysis, of_sweep
from sinklens.cli.signature import command_of
from tests.helpers.command_line import LINE, Outcome, invoke, snapshot

pytestmark = pytest.mark.slow

N = int(os.environ.get("SINKLENS_FUZZ", "300"))
SEED = int(os.environ.get("SINKLENS_FUZZ_SEED", "0"))
BASE = ["--prompts", "texts.txt", "--length", "16", "--n", "2", "--device", "cpu"]
GIVEN = ["--block", "1", "--super-neurons", "3,7", "--outlier-dims", "1"]
ANALYSES = list(list_analyses())
TAKES_UP = ("all", "sweep")
"""Commands that go on in the folder that they have left."""

NUMBERS = "0 1 2 3 7 16 -1 -0 1.5 nan inf -inf 1e300 1e-300 -1e5 0x10 1_0 9223372036854775807 -9223372036854775808"
RANGES = "0-2 2-0 0-999999999999 1-3:0 0,0,0 0-3:2 all ,, 1, -3 a-b 99 0-9999999 ² 1-² 1/2 0/0 ³/³ 3/2"
WORDS = "natural target formation last denoise noise zero mean exact screen heads neurons cpu cuda:9 auto ray"
PATHS = "texts.txt folder . .. / /dev/null /proc/self/mem missing/deep texts.txt/x run"
ODD = ("", " ", "\n", "ü", "☃" * 20, "w" * 300, "x" * 5000, "9" * 5000, "-" + "9" * 5000, "'", "%s{}", "--", "\ud800")
POOL = [*f"{NUMBERS} {RANGES} {WORDS} {PATHS}".split(), *ODD]


def options_of(name: str) -> list[Any]:
    """The options and arguments of a command as typer knows them, flags and all."""
    if name == "sweep":
        own = [option for option in of_sweep.OPTIONS if option.possible and option.name not in of_sweep.ON_ALL]
        return parameters(command_of(own, of_sweep._run))
    if name in ANALYSES:
        return parameters(of_analysis._command(load_analysis(name)))
    group: Any = typer.main.get_command(cli.app)
    return group.commands[name].params


def parameters(command: Any) -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return typer.main.get_command(app).params  # pyright: ignore[reportReturnType]: a list


def value(draw: random.Random, option: Any) -> str:
    """Something for an option: mostly what it does not want."""
    if isinstance(option.default, StrEnum) and draw.random() < 0.4:
        return str(draw.choice(list(type(option.default))))
    numeric = isinstance(option.default, (int, float))
    return draw.choice([*NUMBERS.split(), *ODD]) if numeric and draw.random() < 0.7 else draw.choice(POOL)


def words(draw: random.Random, options: list[Any], most: int) -> Iterator[str]:
    """Some options with values, a few of them twice, misspelt or without one."""
    for option in draw.choices(options, k=draw.randint(1, most)):
        if not option.opts[0].startswith("-"):  # an argument
            yield value(draw, option)
            continue
        name = draw.choice(option.opts)
        if name in ("--help", "--capabilities", "--model", "--devices") and draw.random() < 0.8:
            continue  # slow, or dull
        yield name if draw.random() < 0.97 else name + "s"
        if not isinstance(option.default, bool) and draw.random() < 0.97:
            yield value(draw, option)


def command_line(draw: random.Random, name: str, options: list[Any], model: Path) -> list[str]:
    line = ["analyse", name] if name in ANALYSES else [name]
    if name in ("report", "gather", "models"):
        return [*line, *words(draw, options, 2)]
    given = GIVEN if draw.random() < 0.3 else []
    out = ["--out", "new/run"] if name != "find" and draw.random() < 0.8 else []
    if name == "all" and draw.random() < 0.9:  # every part takes long
        line += ["--only", draw.choice(["formation", "chain,onset", value(draw, options[0])])]
    return [*line, "--model", str(model), *BASE, *given, *out, *words(draw, options, 3)]


def check(line: list[str], outcome: Outcome, before: dict[str, Any], here: Path) -> None:
    """One sentence or none, and nothing half-written."""
    after = snapshot(here)
    assert not [name for name in after if name.endswith((".tmp", ".old"))]
    failed_part = outcome.code == 1 and line[0] == "all" and re.search(r"\d parts? failed", outcome.err)
    assert outcome.code in (0, 2, 130) or failed_part, outcome
    assert "Traceback" not in outcome.err
    if outcome.code == 2:
        assert outcome.sentence and len(outcome.sentence) < 2000
        begun = [name for name in after if name.endswith(("run.json", "sweep.json"))]
        assert after == before or (line[0] in TAKES_UP and begun), sorted(set(after) ^ set(before))


@pytest.fixture(scope="module")
def known() -> dict[str, list[Any]]:
    names = ("chain", "find", "all", "report", "gather", "models", "sweep", *ANALYSES)
    return {name: options_of(name) for name in names}


@pytest.mark.usefixtures("quick_load")
@pytest.mark.parametrize("part", range(10))
def test_no_command_line_ends_in_a_traceback(
    part: int, known: dict[str, list[Any]], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, wrong = random.Random(f"{SEED}/{part}"), []
    for number in range(part, N, 10):
        here = tmp_path / str(number)
        (here / "folder").mkdir(parents=True)
        (here / "texts.txt").write_text(f"{LINE}\n{' '.join(reversed(LINE.split()))}\n")
        monkeypatch.chdir(here)
        # Analyses have most of the names, but little that the others have not.
        some = draw.sample(ANALYSES, 5)
        name = draw.choice([*["chain", "find", "all", "sweep"] * 2, "report", "gather", "models", *some])
        line = command_line(draw, name, known[name], tiny_folder)
        before = snapshot(here)
        try:
            check(line, invoke(*line), before, here)
        except Exception as error:
            wrong.append(f"sinklens {shlex.join(line)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
