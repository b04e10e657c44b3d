"""Progress of a sweep: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from sinklens.sweeps.plan import Plan


EVERY_SECONDS = 30.0
"""How often progress is told where there is no terminal."""


class SweepDisplay:
    """A bar with rate and time left on a terminal; elsewhere the size of the grid, and a line now and then."""

    def __init__(self, bar: Any, terminal: bool) -> None:
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


@contextlib.contextmanager
def sweep_display() -> Iterator[SweepDisplay]:
    """A display on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    terminal = sys.stderr.isatty()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as bar:
        yield SweepDisplay(bar, terminal)


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
