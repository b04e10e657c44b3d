"""Whole numbers as people write them: ints of Python, NumPy and torch, lists, ranges, arrays, tensors, masks."""

from __future__ import annotations

import operator
from typing import Any

from sinklens.errors import InputError


def whole_number(value: Any, what: str) -> int:
    """``value`` as an int.

    Raises:
        InputError: it is a boolean, a fraction or no number at all.
    """
    plain: Any = as_plain(value)
    while isinstance(plain, list) and len(plain) == 1:  # an array or tensor with one entry
        plain = plain[0]
    try:
        if isinstance(plain, bool):
            raise TypeError
        return operator.index(plain)  # pyright: ignore[reportArgumentType]: what is no number raises TypeError
    except TypeError:
        raise InputError(f"{what} {value!r} must be a whole number") from None


def whole_numbers(values: Any, what: str) -> tuple[int, ...]:
    """``values`` as a tuple of ints: one number, several in any kind of sequence, or a mask of booleans.

    Raises:
        InputError: there is something else among them.
    """
    if type(values) is tuple and all(type(value) is int for value in values):
        return values
    plain = as_plain(values)
    if not is_several(plain):
        return (whole_number(plain, what),)
    items = [as_plain(value) for value in plain]
    if items and all(isinstance(item, bool) for item in items):
        return tuple(number for number, chosen in enumerate(items) if chosen)
    return tuple(whole_number(item, what) for item in items)


def as_plain(values: Any) -> Any:
    """Arrays, tensors and NumPy's numbers as lists and numbers of Python; sets in order; all else as it is."""
    if isinstance(values, set | frozenset):
        return sorted(values)
    return values.tolist() if hasattr(values, "tolist") else values


def is_several(plain: Any) -> bool:
    """Whether it is a sequence of things, and no text."""
    return hasattr(plain, "__iter__") and not isinstance(plain, str | bytes)
