"""How mistakes are told: in one sentence, and with an exit code.

2 is a mistake in arguments or input, 1 a refusal of the engine.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from sinklens.cli.remarks import note, warnings_as_notes
from sinklens.cli.words import in_own_words

if TYPE_CHECKING:
    from sinklens.analysis.suite import SuiteResult


def fail(sentence: str) -> NoReturn:
    """Tell the user's mistake on one line, and exit with 2; what is too long to be a name is cut."""
    sentence = " ".join(part.strip() for part in sentence.splitlines())  # a name may hold line ends
    told = re.sub(r"\S{400,}", lambda match: f"{match[0][:80]}...{match[0][-40:]}", sentence)
    typer.echo(f"sinklens: {told}", err=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """The user's mistakes as one sentence and exit code 2, the engine's refusals as one and exit code 1."""
    from sinklens.errors import EngineError, InputError
    from sinklens.records.files import cannot_write

    try:
        with warnings_as_notes():
            yield
    except InputError as error:
        fail(in_own_words(str(error)))
    except BrokenPipeError:
        raise  # the reader of the output has gone
    except OSError as error:  # a full disk under the output, most of all
        fail(str(cannot_write(error.filename or "the output", error, "choose another place")))
    except MemoryError:
        fail("there is not enough memory for this: ask for fewer or shorter prompts, or for less at once")
    except EngineError as error:
        typer.echo(f"sinklens: {in_own_words(str(error))}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Typer's own mistakes as one sentence."""
    try:
        yield
    except Exception as error:
        # Typer's own exceptions have no public base class. The one that shows the help is no mistake to explain.
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = " ".join(error.format_message().split()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        where = getattr(getattr(error, "ctx", None), "command_path", "sinklens")
        fail(f"{message}; see {where} --help")


def left_out(suite: SuiteResult) -> None:
    """Name the sets of prompts that could not be scored; ends the command with the first's reason when none could."""
    lost = [part for part in suite.parts.values() if part.status != "done"]
    for part in lost:
        note(f"{part.name} is left out: {part.reason}")
    if len(lost) == len(suite.parts):
        fail(in_own_words(lost[0].reason))
