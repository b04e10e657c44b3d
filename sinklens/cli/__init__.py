"""The command line: ``sinklens chain``, ``sweep``, ``gather``, ``find``, ``analyse``, ``report`` and ``models``.

Exit codes: 0 done; 2 a mistake in arguments or input, told in one sentence; 1 anything else. Results go to stdout,
progress and remarks to stderr. torch and transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from sinklens.cli import all as all_
from sinklens.cli import analyse, chain, find, gather, models, report, sweep
from sinklens.cli.common import Commands

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Causal interpretability of attention sinks: per-stage scores of the proposed chain, on any model.",
)


@app.callback()
def _app() -> None:
    """Causal interpretability of attention sinks."""


# Commands whose options are not known before the library is loaded: they read their arguments themselves.
late: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

app.command()(chain.chain)
app.command(**late)(sweep.sweep)
app.command()(gather.gather)
app.command()(find.find)
app.command(**late)(analyse.analyse)
app.command(name="all")(all_.everything)
app.command()(report.report)
app.command()(models.models)


def main() -> None:
    """Entry point of the ``sinklens`` command."""
    try:
        app()
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, but Python would say so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
