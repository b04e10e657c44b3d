"""Being stopped between two steps: Ctrl-C, or the signal with which Slurm ends a job."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from sinklens.lab.processes import Processes

EVERY = 8
"""Steps between which several processes ask each other."""


class Stopping:
    """Within it, SIGINT and SIGTERM are taken down instead of acted upon; a second SIGINT ends the process at once."""

    def __init__(self, processes: Processes) -> None:
        self._processes, self._asked = processes, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop behind this step: the same in every process."""
        if self._processes.count > 1 and step % EVERY:
            return False
        return self._processes.any(self._asked)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
