"""Commands as typer runs them, and the command line as it was given."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import typer.core

from sinklens.cli.choices import Bos
from sinklens.cli.mistakes import usage_errors
from sinklens.cli.words import words_of


class Commands(typer.core.TyperGroup):
    """Mistakes in the arguments are told like those in the input: one sentence, exit code 2."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the arguments."""
        with usage_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with usage_errors():
            return super().invoke(ctx)


class Command(typer.core.TyperCommand):
    """A command to which one may say ``--bos`` for ``--bos always``, and ``--no-bos`` for ``--bos never``; what goes
    wrong in it is told in its own words.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments."""
        return super().parse_args(ctx, spelt_out(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with words_of(self.params):
            return super().invoke(ctx)


def spelt_out(args: list[str]) -> list[str]:
    """The arguments with ``--bos`` and ``--no-bos`` as an option with a value."""
    found: list[str] = []
    for arg, after in zip(args, [*args[1:], ""], strict=False):
        if arg == "--no-bos":
            found += ["--bos", Bos.never.value]
        elif arg == "--bos" and (not after or after.startswith("-")):
            found += [arg, Bos.always.value]
        else:
            found.append(arg)
    return found


def command_line() -> str:
    """The command as it was given."""
    return shlex.join(["sinklens", *sys.argv[1:]])
