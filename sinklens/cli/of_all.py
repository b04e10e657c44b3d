"""The runs of ``sinklens all``, one or one for every event or set of prompts, and the tables of verdicts at the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from sinklens.analysis.replicate import AGREEMENT
from sinklens.analysis.several import EVENTS, SETS, Several, of_events, of_sets, run_several
from sinklens.analysis.suite import CHAIN, SuiteResult, check_folder, run_all
from sinklens.chain.agree import agreement_text
from sinklens.cli import pages
from sinklens.cli.command import command_line
from sinklens.cli.display import SuiteDisplay, progress, suite_display
from sinklens.cli.fitting import show
from sinklens.cli.inputs import EventInputs
from sinklens.cli.mitigate import mitigate_into
from sinklens.cli.remarks import note
from sinklens.cli.tables import agreement_table, console, verdicts_table
from sinklens.prompts import PromptBatch, prompts_text
from sinklens.study import Study


@dataclass(frozen=True)
class _Run:
    """A run of everything."""

    name: str
    """Its folder's name, where there are several."""
    result: SuiteResult
    """What became of its parts."""
    batch: PromptBatch
    """Its prompts."""


def run_everything(
    inputs: EventInputs,
    out: Path,
    *,
    given: dict[str, Any],
    memory_budget: int | None,
    options: dict[str, Any],
    mitigations: Path | None,
    as_json: bool,
) -> None:
    """Run every part, write the report, print the verdicts; exit code 1 when a part failed.

    For each event, or on each set of prompts, in a folder of their own where ``inputs`` ask for that.

    Args:
        inputs: model and prompts.
        out: folder for the results.
        given: what the user says of the formation.
        memory_budget: bytes for one forward pass's activations.
        options: arguments of :func:`sinklens.analysis.suite.run_all`.
        mitigations: folder for what takes the sink away; none: it is left alone.
        as_json: print JSON instead of tables.
    """
    kind = EVENTS if inputs.every_event else SETS if inputs.replicate is not None else None
    check_folder(out, *(() if kind is None else (kind.record, kind.run)))  # before the model is loaded
    with suite_display() as display:
        study = Study(*inputs.load(display.step), inputs.seed, memory_budget, given, display.rows)
        options = {**options, "config": {"command": command_line()}, "begins": display.begins, "ends": display.ends}
        several = None if kind is None else _several(study, inputs, display)
        runs = [_one(study, out, options)] if several is None else _each(study, several, out, display, options)
    _print_all(runs, several, as_json)
    sys.stdout.flush()
    if mitigations is not None:
        _mitigate(study, mitigations)
    if several is None:
        pages.write_report(out)  # which nobody has to wait for to see the result
    if not as_json:
        _print_folders(runs)
    _end(runs)


def _one(study: Study, out: Path, options: dict[str, Any]) -> _Run:
    """Everything once."""
    return _Run("", run_all(study, out, **options), study.batch)


def _several(study: Study, inputs: EventInputs, display: SuiteDisplay) -> Several:
    """What is run more than once: on sets of prompts, or for every event."""
    if inputs.replicate is not None:
        return of_sets(study, inputs.replicate, inputs.n)
    display.step("looking for the formation events")
    several = of_events(study)
    for name, reason in several.left_out.items():
        note(f"{name} is left out: {reason}")
    return several


def _each(study: Study, several: Several, out: Path, display: SuiteDisplay, options: dict[str, Any]) -> list[_Run]:
    """Everything for each of ``several``, with a report in each folder and one over all."""
    runs: list[_Run] = []

    def starts(name: str) -> None:
        display.of_set = f"{name} "

    def finished(name: str, result: SuiteResult) -> None:
        display.step("writing the report")
        runs.append(_Run(name, result, several.studies[name].batch))
        pages.write_report(out / name)

    run_several(study, several, out, starts=starts, finished=finished, **options)
    pages.write_report(out)
    return runs


def _mitigate(study: Study, out: Path) -> None:
    """What takes the sink away, and what that costs, in a folder beside the analyses."""
    with progress() as (step, rows):
        reason = mitigate_into(out, study, step, rows)
    if reason:
        note(f"{out.name} are left out: {reason}")


def _end(runs: list[_Run]) -> None:
    """Exit code 1 when a part failed."""
    failed = [f"{run.name}/{part}".lstrip("/") for run in runs for part in run.result.failed]
    if failed:
        parts = "1 part" if len(failed) == 1 else f"{len(failed)} parts"
        typer.echo(f"sinklens: {parts} failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _print_all(runs: list[_Run], several: Several | None, as_json: bool) -> None:
    """The verdicts of every run, and how far they agree where there are several."""
    if as_json:
        texts = [(run.result.folder / "run.json").read_text(encoding="utf-8") for run in runs]
        sys.stdout.write((texts[0] if several is None else f"[{','.join(texts)}]") + "\n")
        return
    for run in runs:
        if several is not None:
            typer.echo(several.titles[run.name])
        _print(run)
    if several is not None:
        _print_agreement(runs, several.over)


def _print(run: _Run) -> None:
    show(console(), verdicts_table(run.result))
    console().print(prompts_text(run.batch.record()), markup=False)


def _print_agreement(runs: list[_Run], over: str) -> None:
    """A table and two lines on how far the runs agree, on the chain and on the analyses."""
    folder = runs[0].result.folder.parent
    table, screen = pd.read_parquet(folder / f"{AGREEMENT}.parquet"), console()
    if table.empty or len(runs) < 2:
        return
    of_analyses, of_chain = table.query("what == 'verdict'"), table.query("what != 'verdict'")
    show(screen, agreement_table(of_analyses))
    for what, rows in (("Analyses", of_analyses), (CHAIN.capitalize(), of_chain)):
        if len(rows):
            screen.print(f"{what}: {agreement_text(rows, over)}", markup=False, soft_wrap=True)
    screen.print(
        f"Agreement: {folder / AGREEMENT}.parquet; report: {folder / 'report.html'}", markup=False, soft_wrap=True
    )


def _print_folders(runs: list[_Run]) -> None:
    """Where every run and its page are."""
    for run in runs:
        page = run.result.folder / "report.html"
        line = pages.results_line(run.result.folder, page if page.exists() else None)
        console().print(line, markup=False, soft_wrap=True)
