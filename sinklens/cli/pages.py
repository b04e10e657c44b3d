"""The page of a run, which is written when its results are printed, and where both are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import typer

from sinklens.cli.display import progress
from sinklens.cli.mistakes import fail
from sinklens.cli.words import in_own_words


def write_report(out: Path) -> Path | None:
    """Write the report of a run; None, and a remark, where what it needs is not installed.

    Ends the command with one sentence where there is no room for it.
    """
    from sinklens.errors import InputError, WriteError

    try:
        from sinklens.pages.page import report

        return report(out)
    except WriteError as error:
        fail(f"{in_own_words(str(error))}; the numbers are saved in {out}: sinklens report {out} writes the page")
    except InputError as error:  # plotly or circuitsvis is missing, or of another version: the numbers are saved
        typer.echo(f"no report.html: {in_own_words(str(error))}", err=True)
        return None


def results_line(out: Path, page: Path | None) -> str:
    """Where results and their page are."""
    return f"Results: {out}" + (f"; report: {page}" if page else "")


def write_pages(folders: Iterable[Path], as_json: bool, *, besides: Iterable[Path] = ()) -> None:
    """Write the pages of finished runs, which nobody has to wait for to see the results, and say where they are.

    Those of ``besides`` come first, and are not told of.
    """
    from sinklens.cli.tables import console

    sys.stdout.flush()
    told = tuple(folders)
    with progress() as (step, _):
        step("writing the report")
        pages = {folder: write_report(folder) for folder in dict.fromkeys([*besides, *told])}
    if not as_json:
        for folder in told:
            console().print(results_line(folder, pages[folder]), markup=False, soft_wrap=True)
