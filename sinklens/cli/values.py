"""Values of options that are read or checked here, before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sinklens.cli.mistakes import fail
from sinklens.records.ranges import shown

if TYPE_CHECKING:
    from sinklens.pairs.choice import Target


def floats(option: str, text: str) -> tuple[float, ...]:
    """``1,2.5`` as ``(1.0, 2.5)``; anything else is the user's mistake."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        fail(f"{option} {shown(text)!r} must be numbers such as 1,2,4")
    return found


def check_finite(option: str, value: float, least: float = -math.inf) -> None:
    """Make sure that a number is finite, and not less than ``least``."""
    if not (math.isfinite(value) and value >= least):
        fail(f"{option} {value} must be a finite number" + (f", {least} or more" if math.isfinite(least) else ""))


def check_enough(n: int, told: str | None = None) -> None:
    """Make sure that there are prompts to compute a variance over; ``told`` says how many, or else ``--n`` does."""
    if n < 2:
        why = "the chain compares variances over prompts, so it needs at least 2 of them"
        fail(f"{why}, and {told or f'--n is {n}'}")


def targets_of(text: str, length: int) -> list[Target]:
    """``--target`` as positions that prompts of ``length`` tokens have, or natural: one, or several with commas.

    Raises:
        InputError: one is neither.
    """
    from sinklens.pairs.choice import check_targets, target_from_text

    targets: list[Target] = [target_from_text(part) for part in text.split(",")]
    check_targets(targets, length)
    return targets
