"""Names that things are known by: what may take a name that is taken.

A name of the package's own stays what it is. A name that a user has given may be given again from where it was given
first, so that a cell of a notebook, or a module that is loaded anew, can be run again: the newest definition counts.
From anywhere else the name is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TypeVar

from sinklens.errors import InputError

Thing = TypeVar("Thing")

_FROM: dict[tuple[str, str], str] = {}
"""Where each name of each kind was given: the file, or for a notebook the module."""
_PACKAGE = "sinklens"


def enter(known: dict[str, Thing], kind: str, name: str, thing: Thing) -> Thing:
    """Make ``thing`` known by its name; to be called by the function that the user calls for it.

    Args:
        known: things by name.
        kind: what they are, as the message says it: ``a stage``.
        name: the name.
        thing: the thing.

    Raises:
        ValueError: the name is one of the package's, or was given to something else elsewhere.
    """
    here = _place(sys._getframe(2).f_globals)
    before = _FROM.get((kind, name), _PACKAGE)
    if name in known and (before == _PACKAGE or (before != here and known[name] != thing)):
        raise ValueError(
            f"{kind} named {name!r} is already registered"
            + ("" if before == _PACKAGE else f", in {before}")
            + ": choose another name"
        )
    _FROM[kind, name] = before if name in known else here
    known[name] = thing
    return thing


def check_kind(kind: str, thing: object, wanted: type) -> None:
    """Make sure that what is to be known by a name is of that kind: a mistake here would show itself much later.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(thing, wanted):
        raise InputError(f"{kind} with a name must be a {wanted.__name__}, not of type {type(thing).__name__}")


def is_the_package_s(known: Mapping[str, object], kind: str, name: str, thing: object) -> bool:
    """Whether ``thing`` is what the package itself has made known by that name."""
    return known.get(name) is thing and _FROM.get((kind, name), _PACKAGE) == _PACKAGE


def _place(module: dict[str, object]) -> str:
    name = str(module.get("__name__", "__main__"))
    return _PACKAGE if name.partition(".")[0] == _PACKAGE else str(module.get("__file__") or name)
