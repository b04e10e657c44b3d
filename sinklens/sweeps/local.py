"""The engine ``local``: tasks one after the other, in this process."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sinklens.engine.run import Progress
from sinklens.models.view import Model
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.store import Sink
from sinklens.sweeps.worker import Worker

if TYPE_CHECKING:
    import pandas as pd

    from sinklens.sweeps.result import SweepResult

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """The sweep was asked to stop; all tasks that it had begun are finished and kept."""

    result: SweepResult | None = None
    """What is finished: without a folder it is here alone."""

    @property
    def table(self) -> pd.DataFrame | None:
        """The rows that are finished."""
        return None if self.result is None else self.result.table

    @staticmethod
    def after(finished: int, left: int) -> Interrupted:
        """Told by the numbers of tasks."""
        tasks = "1 task" if finished == 1 else f"{finished} tasks"
        return Interrupted(f"interrupted: {tasks} finished now, {left} {'is' if left == 1 else 'are'} left")


def run_local(
    model: Model,
    plan: Plan,
    sink: Sink,
    pending: Sequence[int],
    *,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the pending tasks and write each as it is finished.

    The first Ctrl-C is heard when the running task is finished, a second one at once.

    Args:
        model: the model that the plan was made for.
        plan: the plan.
        sink: where rows go.
        pending: numbers of the tasks to run, ascending.
        memory_budget: bytes that the activations of one forward pass may take.
        max_rows: rows per forward pass, in place of the memory budget.
        progress: called with (rows done, rows in all), rows being patches times prompts.

    Raises:
        Interrupted: by Ctrl-C.
    """
    worker = Worker(model, plan, memory_budget=memory_budget, max_rows=max_rows)
    total, done = sum(plan.tasks[index].n_rows for index in pending), 0
    with interrupts() as asked:
        for number, index in enumerate(pending, start=1):
            before = done

            def step(rows: int, _of: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + rows, total)

            rows = worker.run(index, step)
            sink.write(plan.task_id(index), rows)
            done += plan.tasks[index].n_rows
            if progress is not None:
                progress(done, total)
            if asked.is_set():  # in the last task too: what comes after this sweep is to be stopped as well
                raise Interrupted.after(number, len(pending) - number)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one is the usual KeyboardInterrupt."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are heard by the main thread alone
        return

    def hear(*_: object) -> None:
        logger.warning("interrupted: what is running is finished first; press Ctrl-C again to stop at once")
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, hear) or signal.default_int_handler  # None: not set from Python
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
