"""The command line: one command a file.

Exit codes: 0 done; 2 a mistake in arguments or input, told in one sentence; 1 anything else. Results go to stdout,
progress and remarks to stderr. torch and transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Annotated, Any

import typer

from sinklens.cli import all as all_
from sinklens.cli import analyse, chain, circuit, compare, find, gather, mitigate, models, report, sweep, train
from sinklens.cli.command import Command, Commands

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Causal interpretability of attention sinks: per-stage scores of the proposed chain, on any model.",
)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from sinklens import __version__
    from sinklens.records.provenance import versions

    known = {"sinklens": __version__, **versions()}
    for name in ("sinklens", "transformer-lens", "torch", "transformers", "python"):
        print(name, known.get(name, "is not installed"))  # noqa: T201  (the command's output)
    raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Versions of sinklens and of what it stands on."
        ),
    ] = False,
) -> None:
    """Causal interpretability of attention sinks."""
    del version  # answered before any command


# Commands whose options are not known before the library is loaded: they read their arguments themselves.
late: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

app.command(cls=Command)(chain.chain)
app.command(cls=Command)(circuit.circuit)
app.command(**late)(sweep.sweep)
app.command(**late)(train.train)
app.command(cls=Command)(gather.gather)
app.command(cls=Command)(find.find)
app.command(**late)(analyse.analyse)
app.command(name="all", cls=Command)(all_.everything)
app.command(cls=Command)(mitigate.mitigate)
app.command(cls=Command)(report.report)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(models.models)


def main() -> None:
    """Entry point of the ``sinklens`` command."""
    _keep_freed_memory()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk under the output must be told here: at exit Python has its own words
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, but Python would say so at exit.
        _forget_output()
        sys.exit(1)
    except OSError as error:
        _forget_output()
        typer.echo(f"sinklens: the output cannot be written ({error.strerror}): choose another place", err=True)
        sys.exit(2)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 2 GiB, for what is asked for next.

    Every block of a forward pass on a CPU frees some 100 MiB and asks for as much again. Given back to the system in
    between, each page comes back through a fault and is zeroed: on two cores a third of the time of a chain.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: its largest, as setting one of the two ends glibc's own adjustment
        mallopt(-1, (2 << 30) - 1)  # M_TRIM_THRESHOLD


def _forget_output() -> None:
    """What is left in the buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
