"""Ranges of whole numbers as people write them: ``0-29``, ``1-63:4``, ``3,5,7-9``, ``all``, or a sequence of ints."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sinklens.errors import InputError

Range: TypeAlias = str | int | Iterable[int]
"""A range in any of these forms."""
Numbers: TypeAlias = str | tuple[int, ...]
"""A range that was read: numbers, ascending and each once, or the word that stood in their place."""


@dataclass(frozen=True)
class AtLeast:
    """In ``Annotated[int, "help", AtLeast(1)]``: the least value that an argument may have."""

    value: float
    """That value."""


_PART = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+)(?:\s*:\s*(\d+))?)?\s*")
_FORMS = "write whole numbers such as 0-29 or 1-63:4 or 3,5,7-9, or all"


def numbers(name: str, given: Range, size: int, of: str) -> tuple[int, ...]:
    """The numbers that ``given`` stands for: :func:`read`, then :func:`within`."""
    return within(name, read(name, given), size, of)


def read(name: str, given: Range, words: Sequence[str] = ("all",)) -> Numbers:
    """The numbers that ``given`` stands for, ascending and each once, or one of ``words``.

    Args:
        name: what is asked for, as the message says it (``layers``).
        given: text, one number, or numbers.
        words: what may stand in their place.

    Raises:
        InputError: not numbers, none at all, or a range that runs backwards.
    """
    if not isinstance(given, str):
        return _integers(name, given)
    return given.strip() if given.strip() in words else parse(name, given)


def within(name: str, given: Numbers, size: int, of: str) -> tuple[int, ...]:
    """The numbers of a range that was read.

    Args:
        name: what is asked for, as the message says it (``layers``).
        given: numbers, or ``all``.
        size: numbers must be in ``0 .. size - 1``, which is what ``all`` stands for.
        of: what has these numbers, as the message says it (``the model's blocks``).

    Raises:
        InputError: numbers beyond ``size``.
    """
    if isinstance(given, str):
        return tuple(range(size))
    outside = [number for number in given if not 0 <= number < size]
    if outside:
        raise InputError(f"{name} {short(outside)}: {of} are 0-{size - 1}")
    return given


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


def names_in(text: str) -> tuple[str, ...]:
    """``zero, mean`` as ``("zero", "mean")``: the names in a text with commas, empty ones dropped."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def integers(option: str, text: str) -> tuple[int, ...]:
    """``0-2,7`` as ``(0, 1, 2, 7)``: a list of numbers that is an option's value on the command line.

    Raises:
        InputError: anything else.
    """
    try:
        return parse(option, text)
    except InputError:
        raise InputError(f"{option} {text!r} must be whole numbers such as 0-2 or 0,3 or 1-9:4") from None


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
