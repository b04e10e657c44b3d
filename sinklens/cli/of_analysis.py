"""The command of an analysis: the options that all have, and its own, read off the signature of its ``run``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sinklens.analysis.base import Analysis, AnalysisResult
from sinklens.analysis.replicate import replicate_into
from sinklens.analysis.run import run_analysis
from sinklens.analysis.suite import earlier_parts
from sinklens.cli.command import command_line
from sinklens.cli.display import progress
from sinklens.cli.fitting import show
from sinklens.cli.inputs import Inputs, with_inputs
from sinklens.cli.mistakes import errors, left_out
from sinklens.cli.options import ForceOption, JsonOption, OutOption
from sinklens.cli.pages import write_pages
from sinklens.cli.signature import Form, command_of, options_of, run_alone
from sinklens.cli.tables import console, verdict_table
from sinklens.cli.values import floats
from sinklens.errors import InputError
from sinklens.prompts import prompts_text
from sinklens.records.files import check_out
from sinklens.records.ranges import integers, names
from sinklens.study import Study


def _text(default: Sequence[float]) -> str:
    return ",".join(f"{item:g}" for item in default)


def _forms() -> dict[Any, Form]:
    """How lists are written, as whichever type an analysis asks for them."""
    found: dict[Any, Form] = {}
    for kind, read, write in ((int, integers, _text), (float, floats, _text), (str, names, ",".join)):
        found |= {tuple[kind, ...]: Form(read, write), Sequence[kind]: Form(read, write)}
        found[list[kind]] = Form(lambda option, text, read=read: list(read(option, text)), write)
    return found


FORMS = _forms()


def run_command(analysis: Analysis, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run an analysis as a command of its own; ends by SystemExit with the exit code."""
    with errors():
        command = _command(analysis)
    run_alone(command, _help(analysis), args, prog)


def _help(analysis: Analysis) -> str:
    paper = f"\n\nIn the paper: {analysis.paper}." if analysis.paper else ""
    left_to_python = [option.name for option in options_of(analysis.run, FORMS) if not option.possible]
    python = f"\n\nIn Python alone: {', '.join(left_to_python)}." if left_to_python else ""
    return f"{analysis.title}. The claim: {analysis.claim}{paper}{python}"


def _command(analysis: Analysis) -> Callable[..., None]:
    bare = [name for name, default in analysis.options.items() if default is inspect.Parameter.empty]
    if bare:
        raise InputError(f"the option {bare[0]!r} of {analysis.name} has no default: give it one")
    run = partial(_run, analysis, out=Path(f"runs/{analysis.name}"))
    # What cannot be written on a command line (a function, a table) is for Python alone.
    return command_of([option for option in options_of(analysis.run, FORMS) if option.possible], run)


@with_inputs()
def _run(
    analysis: Analysis,
    options: dict[str, Any],
    *,
    inputs: Inputs,
    out: OutOption = Path("runs"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    given, allowed = inputs.given(), inputs.bytes_allowed()
    if inputs.replicate is None:
        check_out(out, force=force)
    else:
        earlier_parts(out)
    with progress() as (step, rows):
        model, batch = inputs.load(step)
        step(analysis.title)
        study = Study(model, batch, seed=inputs.seed, memory_budget=allowed, given=given, progress=rows)
        if inputs.replicate is None:
            results = {"": _result(analysis, study, options)}
            results[""].save(out, force=force)
            agreement = None
        else:
            sizes = (inputs.replicate, inputs.n)
            results, agreement = _several_sets(analysis, study, options, out, sizes, fresh=force)
    _print_all(results, out, agreement, as_json)
    write_pages([out / name for name in results], as_json, besides=[out])


def _result(analysis: Analysis, study: Study, options: dict[str, Any]) -> AnalysisResult:
    result = run_analysis(analysis, study, **options)
    result.config["command"] = command_line()
    return result


def _several_sets(
    analysis: Analysis, study: Study, options: dict[str, Any], out: Path, sizes: tuple[int, int], *, fresh: bool
) -> tuple[dict[str, AnalysisResult], str]:
    """The analysis on every set of prompts, each in a folder of its own, and how far they agree."""
    sets, n = sizes
    suite, results, agreement = replicate_into(
        study,
        sets,
        out,
        lambda each: _result(analysis, each, options),
        AnalysisResult.load,
        n=n,
        options=analysis.options | options,
        analysis=analysis,
        config={"command": command_line()},
        fresh=fresh,
    )
    left_out(suite)
    return results, agreement


def _print_all(results: Mapping[str, AnalysisResult], out: Path, agreement: str | None, as_json: bool) -> None:
    """Print the verdicts by the names of their folders, or what was written as JSON: a list where there are several."""
    if as_json:
        texts = [(out / name / "summary.json").read_text(encoding="utf-8") for name in results]
        sys.stdout.write((texts[0] if agreement is None else f"[{','.join(texts)}]") + "\n")
        return
    for name, result in results.items():
        if name:
            console().print(name, markup=False)
        _print(result)
    if agreement is not None:
        console().print(agreement, markup=False, soft_wrap=True)


def _print(result: AnalysisResult) -> None:
    screen = console()
    show(screen, verdict_table(result))
    screen.print(prompts_text(result.config), markup=False)


def main(analysis: Analysis) -> None:
    """What ``python analyses/NAME.py`` does: the same as ``sinklens analyse NAME``."""
    run_command(analysis)
