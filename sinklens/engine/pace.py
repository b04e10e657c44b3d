"""How many rows go into one forward pass: as many as memory allows, or fewer where that is measured to be faster."""

from __future__ import annotations

GAIN = 1.03
"""A batch twice as large must be this much faster per row to be worth its memory."""
SMALLEST = 64
"""No smaller batch is tried: there the host cannot keep a GPU busy."""


class Pace:
    """Finds the best batch size on the way, from the first batches' own times.

    Args:
        limit: rows that fit within the memory budget.
        measured: whether to look for something better than ``limit``.
    """

    def __init__(self, limit: int, measured: bool) -> None:
        self.limit = limit
        self._sizes = [limit // share for share in (8, 4, 2, 1) if limit // share >= SMALLEST] if measured else []
        self._rates: list[float] = []
        self._warm = False

    @property
    def measuring(self) -> bool:
        """Whether the next batch is to be timed."""
        return len(self._rates) < len(self._sizes)

    @property
    def rows(self) -> int:
        """Rows of the next batch."""
        if self.measuring:
            return min(self._sizes[len(self._rates)], self.limit)
        if not self._rates:
            return self.limit
        return min(self._sizes[self._rates.index(max(self._rates))], self.limit)

    def record(self, rows: int, work: float, seconds: float) -> None:
        """A timed batch: ``work`` in any unit that grows with its cost.

        The first one is thrown away, since kernels are loaded then, and so are batches that were not full.
        """
        if not self._warm:
            self._warm = True
            return
        if not self.measuring or rows < self.rows:
            return
        self._rates.append(work / seconds)
        if len(self._rates) > 1 and self._rates[-1] < GAIN * self._rates[-2]:
            self._sizes = self._sizes[: len(self._rates)]

    def halve(self, rows: int) -> None:
        """A batch of ``rows`` rows did not fit."""
        self.limit = max(1, min(self.limit, rows) // 2)
