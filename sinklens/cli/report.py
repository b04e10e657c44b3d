"""``sinklens report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinklens.cli.mistakes import errors


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a chain, of an analysis, or of a run that holds such folders.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write; `report.html` in that folder by default.")] = None,
) -> None:
    """Write one HTML page of a run: verdicts, figures, views. It works offline and can be sent as it is."""
    with errors():
        from sinklens.pages.page import report as write

        page = write(run, out)
        print(page)  # noqa: T201  (the command's output)
