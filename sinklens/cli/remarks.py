"""What the user is told besides results and mistakes: remarks of the commands, and the library's warnings."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sinklens.cli.words import in_own_words


def note(message: str) -> None:
    """Tell the user something besides the results, in the command line's words."""
    typer.echo(f"sinklens: note: {in_own_words(message)}", err=True)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Warnings and log records of sinklens as lines like our own; those of others as they come."""
    logger, show = logging.getLogger("sinklens"), warnings.showwarning
    here, said = str(Path(__file__).parents[1]), set[str]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    def say(message: str) -> None:
        if message not in said:  # once, wherever it comes from
            said.add(message)
            note(message)

    def ours(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if filename.startswith(here):
            say(str(message))
        else:
            show(message, category, filename, *rest)

    handler = Handler(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = ours
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
