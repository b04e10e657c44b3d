"""``sinklens sweep``."""

from __future__ import annotations

import typer


def sweep(ctx: typer.Context) -> None:
    """Patch a whole grid: stage x layer x position x unit x edit x direction. Can be interrupted and taken up."""
    from sinklens.cli.of_sweep import run_command  # its options are read off the library's signature

    run_command(sweep.__doc__ or "", ctx.args)
