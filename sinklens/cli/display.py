"""Progress of a command: a bar on a terminal; elsewhere nothing, or a line now and then where it takes long."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from sinklens.cli.words import in_own_words

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

    from sinklens.analysis.suite import Part
    from sinklens.engine.run import Progress
    from sinklens.sweeps.plan import Plan

EVERY_SECONDS = 30.0
"""How often progress is told where there is no terminal."""


@contextlib.contextmanager
def progress() -> Iterator[tuple[Callable[[str], None], Progress]]:
    """A bar on stderr when that is a terminal, as functions to say what is being done and how far it is."""
    from rich.progress import TimeElapsedColumn

    with _bar(TimeElapsedColumn()) as (bar, _):
        task = bar.add_task("starting", total=None)

        def step(text: str) -> None:
            bar.update(task, description=text)

        def rows(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield step, rows


@contextlib.contextmanager
def sweep_display() -> Iterator[SweepDisplay]:
    """A display of a sweep on stderr."""
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

    times = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with _bar(*times) as (bar, terminal):
        yield SweepDisplay(bar, terminal)


@contextlib.contextmanager
def suite_display() -> Iterator[SuiteDisplay]:
    """A display of everything on stderr."""
    from rich.progress import TimeElapsedColumn

    with _bar(TimeElapsedColumn()) as (bar, terminal):
        yield SuiteDisplay(bar, terminal)


@contextlib.contextmanager
def _bar(*times: ProgressColumn) -> Iterator[tuple[Bar, bool]]:
    """What is done, a bar and counts, then ``times``; and whether stderr is a terminal, which alone gets to see it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    terminal = sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as bar:
        yield bar, terminal


class SweepDisplay:
    """A bar with rate and time left on a terminal; elsewhere the size of the grid, and a line now and then."""

    def __init__(self, bar: Bar, terminal: bool) -> None:
        self.bar, self.terminal = bar, terminal
        self.task = bar.add_task("starting", total=None, rate="")
        self.began = self.told = time.monotonic()

    def step(self, text: str) -> None:
        """What is being done now."""
        self.bar.update(self.task, description=text)

    def planned(self, plan: Plan, pending: Sequence[int]) -> None:
        """Say how large the grid is; time is counted from here on."""
        self.say(grid_text(plan, pending))
        self.step("patching")
        self.began = self.told = time.monotonic()

    def rows(self, done: int, total: int) -> None:
        """How far it is."""
        now = time.monotonic()
        rate = f"{done / max(now - self.began, 1e-9):,.0f}/s"
        self.bar.update(self.task, completed=done, total=total, rate=rate)
        if not self.terminal and now - self.told > EVERY_SECONDS:
            self.told = now
            left = (now - self.began) * (total - done) / max(done, 1)
            self.say(f"{done:,} of {total:,} ({done / total:.0%}), {rate}, about {left:,.0f} s left")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.terminal:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            typer.echo(text, err=True)


class SuiteDisplay:
    """Progress over all parts of everything: two bars on a terminal, a line for every part elsewhere."""

    def __init__(self, bar: Bar, terminal: bool) -> None:
        self.bar, self.terminal = bar, terminal
        self.parts = bar.add_task("loading", total=None)
        self.patches = bar.add_task("", total=None, visible=False)
        self.place = ""
        self.of_set = ""

    def step(self, text: str) -> None:
        """What is being done now."""
        self.bar.update(self.parts, description=text)

    def rows(self, done: int, total: int) -> None:
        """How far the part is."""
        self.bar.update(self.patches, description="patched rows", completed=done, total=total, visible=done < total)

    def begins(self, name: str, number: int, of: int) -> None:
        """A part begins."""
        self.place = f"{self.of_set}[{number}/{of}]"
        self.bar.update(self.parts, description=name, completed=number - 1, total=of)
        self.bar.update(self.patches, visible=False)

    def ends(self, part: Part) -> None:
        """A part has ended: say how, and why if it failed."""
        told = "unchanged, kept" if part.reused else f"{part.status}, {part.seconds:.1f} s"
        text = f"{self.place} {part.name}: {told}" + (f" ({in_own_words(part.reason)})" if part.reason else "")
        if self.terminal:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            typer.echo(text, err=True)


def grid_text(plan: Plan, pending: Sequence[int]) -> str:
    """The size of the grid and how much of it is left."""
    grid, tasks = plan.grid, plan.tasks
    sizes = {
        "stage": [len(grid.stages)],
        "direction": [len(grid.directions)],
        "edit": [len(grid.edits)],
        "layer": [len(axis.layers) for axis in grid.stages],
        "position": [1 if grid.positions is None else len(grid.positions)],
        "unit": [1 if axis.units is None else len(axis.units) for axis in grid.stages],
    }
    parts = [_count(name, size) for name, size in sizes.items() if size != [1] * len(size) or name == "layer"]
    done = len(tasks) - len(pending)
    left = "" if not done else f", of which {len(pending):,} {'is' if len(pending) == 1 else 'are'} to be run here"
    if not pending:
        left += ": nothing is run"
    total = tasks.n_patches * tasks.n_prompts
    return (
        f"Grid: {' x '.join(parts)} = {tasks.n_patches:,} patches, on {_count('prompt', [tasks.n_prompts])} {total:,} "
        f"rows; {_count('task', [len(tasks)])}{left}"
    )


def _count(name: str, sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    number = f"{low:,}" if low == high else f"{low:,}-{high:,}"
    return f"{number} {name}" if high == 1 else f"{number} {name}s"
