"""The command of the lab: the arguments of :func:`sinklens.lab.train` as options."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sinklens.cli.command import command_line
from sinklens.cli.options import JsonOption
from sinklens.cli.signature import Form, command_of, options_of, run_alone
from sinklens.cli.tables import console
from sinklens.lab.arms import train as function
from sinklens.lab.training import Report, Trained
from sinklens.records.ranges import one_of_several
from sinklens.records.text import number, seconds_text

FORMS = {
    str | Sequence[str]: Form(lambda _option, text: text.split(","), lambda value: value),
    str | Path: Form(),
    int | str: Form(),
    tuple[int, int]: Form(one_of_several),
}
"""How the arguments are written."""
ON_ALL = ("command", "report")
"""Arguments that the command sets itself."""
OPTIONS = [option for option in options_of(function, FORMS) if option.name not in ON_ALL]


def run_command(about: str, args: Sequence[str]) -> None:
    """Run the command; ends by SystemExit with the exit code."""
    run_alone(command_of([option for option in OPTIONS if option.possible], _run), about, args, "sinklens train")


def _run(
    options: dict[str, Any],
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write curves for TensorBoard, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    began = time.monotonic()
    try:
        with _bar() as report:
            trained = function(**options, command=command_line(), report=report)
    except KeyboardInterrupt as error:
        told = str(error) or "interrupted"
        typer.echo(f"sinklens: {told}; run the same command again to go on", err=True)
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", "0")):
        return
    if tensorboard:
        from sinklens.lab.tensorboard import write_events

        for one in trained:
            write_events(one)
    if as_json:
        import json

        sys.stdout.write(json.dumps([_row(one) for one in trained]) + "\n")
        return
    screen = console()
    screen.print(_table(trained))
    took = seconds_text(time.monotonic() - began)
    told = f"{took}; every arm is a folder in {options['out']}, which sl.load_model opens"
    screen.print(told, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    """A bar with what is left to do, on stderr when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not sys.stderr.isatty() or bool(int(os.environ.get("RANK", "0")))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=None)

        def report(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield report


def _last(one: Trained, measure: str, *, position: int | None = None) -> Any:
    """The last values of a measure."""
    table = one.watch[(one.watch.measure == measure) & (one.watch.step == one.watch.step.max())]
    return table if position is None else table[table.position == position]


def _row(one: Trained) -> dict[str, Any]:
    """What is said of an arm at once."""
    rate = _last(one, "sink_rate", position=0)
    share = _last(one, "share", position=0)
    return {
        "arm": one.folder.name,
        "folder": str(one.folder),
        "steps": int(one.loss.step.max()),
        "held_out_loss": one.held_out(),
        "sink_rate_first": float(rate[rate.layer.isna()].value.iloc[0]),
        "share_first_highest_block": float(share.value.max()),
        "dominance_first_highest_block": float(_last(one, "dominance", position=0).value.max()),
    }


def _table(trained: Sequence[Trained]) -> Table:
    heads: list[tuple[str, str, Callable[[Any], str]]] = [
        ("arm", "arm", str),
        ("steps", "steps", str),
        ("held_out_loss", "held-out loss", lambda value: number(value, 4)),
        ("sink_rate_first", "sink rate, first token", lambda value: f"{100 * value:.1f}%"),
        ("share_first_highest_block", "its share, highest block", lambda value: f"{value:.3f}"),
        ("dominance_first_highest_block", "its dominance, highest", number),
    ]
    table = Table()
    for _, head, _ in heads:
        table.add_column(head)
    for one in trained:
        row = _row(one)
        table.add_row(*(write(row[name]) for name, _, write in heads))
    return table
