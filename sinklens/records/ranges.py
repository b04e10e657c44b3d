"""Ranges of whole numbers as people write them: ``0-29``, ``1-63:4``, ``3,5,7-9``, ``all``, or a sequence of ints."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import TypeAlias

from sinklens.errors import InputError

Range: TypeAlias = str | int | Iterable[int]
"""A range in any of these forms."""

_PART = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+)(?:\s*:\s*(\d+))?)?\s*")
_FORMS = "write whole numbers such as 0-29 or 1-63:4 or 3,5,7-9, or all"


def numbers(name: str, given: Range, size: int, of: str) -> tuple[int, ...]:
    """The numbers that ``given`` stands for, ascending and each once.

    Args:
        name: what is asked for, as the message says it (``layers``).
        given: text, one number, or numbers.
        size: numbers must be in ``0 .. size - 1``, which is what ``all`` stands for.
        of: what has these numbers, as the message says it (``the model's blocks``).

    Raises:
        InputError: not numbers, none at all, a range that runs backwards, or numbers beyond ``size``.
    """
    if isinstance(given, str):
        found = tuple(range(size)) if given.strip() == "all" else parse(name, given)
    else:
        found = _integers(name, given)
    outside = [number for number in found if not 0 <= number < size]
    if outside:
        raise InputError(f"{name} {short(outside)}: {of} are 0-{size - 1}")
    return found


def parse(name: str, text: str) -> tuple[int, ...]:
    """The numbers in a text, whatever they are numbers of.

    Raises:
        InputError: it is empty, not numbers, or has a range that runs backwards or a step of 0.
    """
    if not text.strip():
        raise InputError(f"{name} is empty: {_FORMS}")
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise InputError(f"{name} {text!r} is not a range: {_FORMS}")
        first, last, step = (None if group is None else int(group) for group in match.groups())
        assert first is not None
        last, step = first if last is None else last, 1 if step is None else step
        if last < first:
            raise InputError(f"{name} {part.strip()!r} runs backwards: write {last}-{first}")
        if step == 0:
            raise InputError(f"{name} {part.strip()!r} has a step of 0: use 1 or more")
        found.update(range(first, last + 1, step))
    return tuple(sorted(found))


def spans(numbers: Iterable[int], dash: str = "–", most: int | None = None) -> str:
    """``(0, 1, 2, 5)`` as ``0–2, 5``; the first ``most`` spans when there are more."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}{dash}{last}" for first, last in runs]
    return ", ".join(texts if most is None or len(texts) <= most else [*texts[:most], "..."])


def short(numbers: Iterable[int], most: int = 4) -> str:
    """``(28, 29, 31)`` as ``28, 29, 31``; the first few when there are many."""
    listed = list(numbers)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(str, listed[:most])) + more


def _integers(name: str, given: int | Iterable[int]) -> tuple[int, ...]:
    try:
        items = list(given) if isinstance(given, Iterable) else [given]
        found = {operator.index(item) for item in items if not isinstance(item, bool)}
    except TypeError:
        raise InputError(f"{name} {given!r} is not a range: {_FORMS}") from None
    if not found or len(items) > len(found) == 0:
        raise InputError(f"{name} is empty: {_FORMS}")
    return tuple(sorted(found))
