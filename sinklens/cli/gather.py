"""``sinklens gather``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinklens.cli.display import sweep_display
from sinklens.cli.mistakes import errors


def gather(
    folders: Annotated[list[Path], typer.Argument(help="Folders of one sweep, or of its parts.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
) -> None:
    """Join the shards of a sweep into one Parquet file, after making sure that none is missing."""
    with errors():
        from sinklens.sweeps.gather import gather as join

        with sweep_display() as display:
            display.step("joining shards")
            result = join(folders, out, progress=display.rows)
        print(f"{out}: {len(result):,} rows")  # noqa: T201  (the command's output)
