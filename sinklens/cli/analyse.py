"""``sinklens analyse``."""

from __future__ import annotations

from typing import Annotated

import typer

from sinklens.cli.mistakes import errors, fail


def analyse(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="An analysis, or a .py file that has one.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the analyses, one line each.")] = False,
) -> None:
    """Run an analysis: `sinklens analyse NAME --help` shows its options, `--list` all of them."""
    with errors():
        if name == "--help":
            print(ctx.get_help())  # noqa: T201  (the command's output)
            return
        if name is None and not listed:
            fail("name an analysis; sinklens analyse --list shows them")
        if listed:
            from sinklens.analysis.discovery import list_analyses

            for known, line in list_analyses(alone=True).items():
                print(f"{known:24}{line}")  # noqa: T201  (the command's output)
            return
        from sinklens.analysis.run import load_analysis

        assert name is not None
        analysis = load_analysis(name)
    from sinklens.cli.of_analysis import run_command

    run_command(analysis, ctx.args, f"sinklens analyse {name}")
