"""Ranges of whole numbers as people write them: ``0-29``, ``1-63:4``, ``3,5,7-9``, ``all``, or a sequence of ints."""

from __future__ import annotations

import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from sinklens.errors import InputError

Range: TypeAlias = str | int | Iterable[int]
"""A range in any of these forms."""
Numbers: TypeAlias = str | tuple[int, ...]
"""A range that was read: numbers, ascending and each once, or the word that stood in their place."""


@dataclass(frozen=True)
class Between:
    """In ``Annotated[int, "help", Between(1, 1000)]``: the values that an argument may have."""

    least: float
    """The least."""
    most: float = math.inf
    """The greatest; infinity, the default, is not among them."""

    def __str__(self) -> str:
        return f"{self.least:g} or more" if self.most == math.inf else f"from {self.least:g} to {self.most:.10g}"


def limits_of(hint: Any) -> tuple[Any, Between | None]:
    """The type in an annotation, and its limits where it has some."""
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    kind, *extra = typing.get_args(hint)
    return kind, next((item for item in extra if isinstance(item, Between)), None)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, with what is ``Annotated``.

    Raises:
        InputError: one of them names what is not there.
    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # an annotation is code of the user's
        name, why = getattr(function, "__name__", "the function"), " ".join(str(error).split())
        raise InputError(f"the annotations of {name} cannot be read ({why}): correct them") from error


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any], *, limits: bool = True) -> None:
    """Make sure that arguments are what the function's annotations say, as far as these are numbers, texts, choices,
    true or false, or functions.

    Args:
        function: whose arguments they are.
        values: argument to its value.
        limits: whether a number has to lie within its :class:`Between`, and a choice to be one, too.

    Raises:
        InputError: another type, a number that is not finite or out of its limits, another choice.
    """
    hints = hints_of(function)
    for name, value in values.items():
        kind, between = limits_of(hints.get(name))
        kinds = set(typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))
        if value is None and type(None) in kinds:
            continue
        kinds -= {type(None)}
        if limits and typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            raise InputError(f"{name} {shown(value)} must be one of {', '.join(map(str, typing.get_args(kind)))}")
        if kinds and kinds <= {int, float}:
            check_number(name, value, (between if limits else None) or Between(-math.inf), whole=float not in kinds)
        if between is not None and limits and typing.get_origin(kind) is tuple:
            _check_each(name, value, kind, between)
        for wanted, what, fits in _KINDS:
            if {typing.get_origin(item) or item for item in kinds} == {wanted} and not fits(value):
                raise InputError(f"{name} {shown(value)} must be {what}")


def _check_each(name: str, values: Any, kind: Any, between: Between) -> None:
    """The limits of a tuple of numbers are those of each of them."""
    whole = float not in typing.get_args(kind)
    for value in values if isinstance(values, Iterable) and not isinstance(values, str) else (values,):
        check_number(name, value, between, whole=whole)


_KINDS: tuple[tuple[object, str, Callable[[Any], bool]], ...] = (
    (str, "a text", lambda value: isinstance(value, str)),
    (bool, "True or False", lambda value: _is_truth(value)),
    (Callable, "a function", callable),
)
"""Types of arguments that are no numbers: what they are called, and what tells them."""


def check_number(name: str, value: Any, limits: Between, *, whole: bool = False) -> None:
    """Make sure that a number is finite, and within its limits.

    Raises:
        InputError: it is not, or is no number.
    """
    what = "a whole number" if whole else "a finite number"
    try:
        if _is_truth(value) or isinstance(value, (str, bytes)):
            raise TypeError
        number = operator.index(value) if whole else float(value)
        good = limits.least <= number <= limits.most and (whole or math.isfinite(number))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        bounds = "" if limits == Between(-math.inf) else f", {limits}"
        raise InputError(f"{name} {shown(value)} must be {what}{bounds}")


SEEDS = Between(0, 2**63 - 1)
"""The seeds that every generator takes."""
MOST_REPEATS = 1000
"""The most random draws where each is patched into the model: more would hardly change a mean, and take for ever."""


def check_seed(seed: int) -> int:
    """A seed that every generator takes.

    Raises:
        InputError: not a whole number, or not one of :data:`SEEDS`.
    """
    check_number("seed", seed, SEEDS, whole=True)
    return operator.index(seed)


def shown(given: object, most: int = 40) -> str:
    """A value as a message shows it: the beginning, where it is long."""
    try:
        text = given if isinstance(given, str) else repr(given)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return "with thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."


_PART = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+)(?:\s*:\s*(\d+))?)?\s*")
_DIGITS = 7
"""The most digits of a number in a range: no model has ten million blocks, positions or units."""
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
    numbers: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise InputError(f"{name} {shown(text)!r} is not a range: {_FORMS}")
        if any(len(group) > _DIGITS for group in match.groups() if group):
            raise InputError(f"{name} {shown(text)!r} goes beyond {10**_DIGITS - 1}: {_FORMS}")
        first, last, step = (None if group is None else int(group) for group in match.groups())
        assert first is not None
        last, step = first if last is None else last, 1 if step is None else step
        if last < first:
            raise InputError(f"{name} {part.strip()!r} runs backwards: write {last}-{first}")
        if step == 0:
            raise InputError(f"{name} {part.strip()!r} has a step of 0: use 1 or more")
        numbers.update(range(first, last + 1, step))
    return tuple(sorted(numbers))


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
        raise InputError(f"{option} {shown(text)!r} must be whole numbers such as 0-2 or 0,3 or 1-9:4") from None


def one_of_several(option: str, text: str) -> tuple[int, int]:
    """``2/4`` as ``(2, 4)``: which of how many parts, as an option's value on the command line.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise InputError(f"{option} {shown(text)!r} must be I/N, such as 1/4")
    return int(match[1]), int(match[2])


def names(option: str, text: str) -> tuple[str, ...]:
    """``a, b`` as ``("a", "b")``.

    Raises:
        InputError: there is none.
    """
    named = names_in(text)
    if not named:
        raise InputError(f"{option} is empty: name at least one")
    return named


def short(numbers: Iterable[int], most: int = 4) -> str:
    """``(28, 29, 31)`` as ``28, 29, 31``; the first few when there are many."""
    listed = list(numbers)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(str, listed[:most])) + more


def _integers(name: str, values: int | Iterable[int]) -> tuple[int, ...]:
    if isinstance(values, range) and max(abs(values.start), abs(values.stop)) > 10**_DIGITS:
        raise InputError(f"{name} {values!r} goes beyond {10**_DIGITS - 1}: {_FORMS}")
    try:
        # An array or tensor without axes is a number, although its class can be iterated over.
        items: list[Any] = list(values) if isinstance(values, Iterable) and getattr(values, "ndim", 1) else [values]
        numbers = {operator.index(item) for item in items if not _is_truth(item)}
    except TypeError:
        raise InputError(f"{name} {shown(values)} is not a range: {_FORMS}") from None
    if numbers and any(_is_truth(item) for item in items):
        raise InputError(f"{name} {shown(values)} has numbers and truths side by side: {_FORMS}")
    if not numbers:
        raise InputError(f"{name} is empty: {_FORMS}")
    return tuple(sorted(numbers))


def _is_truth(item: Any) -> bool:
    """Whether it is true or false, which is no number although Python, numpy or torch can count with it."""
    return isinstance(item, bool) or str(getattr(item, "dtype", "")) in ("bool", "torch.bool")
