"""How far a call is: a line on the terminal or in the notebook that it was made in, gone when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sinklens.errors import InputError

Progress = Callable[[int, int], None]
"""``(done, of how many)``."""
EVERY_SECONDS = 0.2
"""How often the line is written anew."""


def is_watched() -> bool:
    """Whether somebody looks at what is written to stderr: a terminal, or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def progress_of(given: Progress | bool | None, what: str) -> Iterator[Progress | None]:
    """What is to be called with the numbers: the caller's own function, or one that writes a line.

    Args:
        given: a function; ``True`` or ``False``: a line or none; ``None``: a line where somebody looks at it.
        what: what is done, in front of the line.

    Raises:
        InputError: it is something else.
    """
    if given is not None and not isinstance(given, bool):
        if not callable(given):
            raise InputError(f"progress must be True, False or a function, not of type {type(given).__name__}")
        yield given
        return
    if not (is_watched() if given is None else given):
        yield None
        return
    began = told = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= EVERY_SECONDS:
            told = now
            left = (now - began) * (total - done) / max(done, 1)
            sys.stderr.write(f"\r\x1b[K{what}: {done:,} of {total:,} rows ({done / total:.0%}), {left:,.0f} s left")
            sys.stderr.flush()

    try:
        yield line
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
