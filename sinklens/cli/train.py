"""``sinklens train``."""

from __future__ import annotations

import typer


def train(ctx: typer.Context) -> None:
    """Train small models with variants of attention, and watch their sinks form. Can be interrupted and taken up."""
    from sinklens.cli.of_training import run_command  # its options are read off the library's signature

    run_command(train.__doc__ or "", ctx.args)
