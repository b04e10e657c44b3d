"""``sinklens compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinklens.cli.mistakes import errors
from sinklens.cli.options import ForceOption, JsonOption


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of trained models, of `sinklens all`, of chains or analyses, or folders that hold such."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write tables and the page to.")] = Path("runs/compared"),
    reference: Annotated[
        str | None,
        typer.Option(help="Trained arm that others are compared with; softmax by default, or the first."),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Put several models side by side: verdicts and scores, and for trained ones what was watched in training."""
    with errors():
        from sinklens.cli.tables_compare import print_comparison
        from sinklens.lab.compare import compare as put_side_by_side
        from sinklens.pages.comparison import comparison_report
        from sinklens.records.files import check_out

        check_out(out, force=force)
        found = put_side_by_side(runs, reference=reference)
        found.save(out, force=force)
        print_comparison(found, comparison_report(found, out / "report.html"), as_json=json)
