"""What a value consists of: a tag, its own bytes, and other values, which :mod:`sinklens.records.fingerprint` walks.

:func:`parts_of` is one function with a version for each kind of value: those of data are in
:mod:`sinklens.records.parts_of_data`, those of code in :mod:`sinklens.records.parts_of_code`. Here is the one for an
object of any other kind: its class, and its state as a copy would have it.
"""

from __future__ import annotations

import copyreg
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, singledispatch
from typing import Any

import numpy as np
import torch

from sinklens.records.callables import is_library, is_packages_own, resolves
from sinklens.records.outside import reads_outside

_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)


class Unstable(Exception):
    """Nothing tells whether this is the same in another process; the message says what it is."""


@dataclass(frozen=True)
class Parts:
    """What a value consists of."""

    tag: str
    """Its kind, so that values of two kinds never run together."""
    children: Sequence[tuple[str, object]] = ()
    """What it is made of, each with what it is called there."""
    data: bytes | memoryview = b""
    """Its own contents."""
    ordered: bool = True
    """Whether the order of :attr:`children` counts."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A value that was kept to save time: it counts where it is not what would be computed again."""

    value: object
    """The value."""
    again: Callable[[], object]
    """Computes it again."""


OF_PACKAGES: dict[str, Callable[[Any], Parts | None]] = {}
"""Versions of :func:`parts_of` for what packages make that need not be imported, by their names; each gives ``None``
for what it does not know."""


@singledispatch
def parts_of(value: object) -> Parts:
    """What a value consists of.

    Raises:
        Unstable: it has no contents that would be the same in another process.
    """
    if isinstance(value, _RANDOM):
        raise Unstable(f"a {type(value).__name__} of random numbers")
    if isinstance(value, (Iterator, io.IOBase)):
        raise Unstable(f"a {type(value).__name__}")
    for package in {base.__module__.partition(".")[0] for base in type(value).__mro__} & OF_PACKAGES.keys():
        if (parts := OF_PACKAGES[package](value)) is not None:
            return parts
    wrapped = getattr(value, "__wrapped__", None)
    if callable(wrapped) and not is_packages_own(value) and is_library(type(value).__module__):  # as functools.cache's
        return Parts("wrapped", (("", type(value)), ("", wrapped)))
    return of_object(value)


def by_name(module: str, name: str, children: Sequence[tuple[str, object]] = ()) -> Parts:
    """What comes with a package: it changes with the version alone.

    Raises:
        Unstable: it reads files, or what the process was told.
    """
    if reads_outside(module, name):
        raise Unstable(f"{module}.{name} (read what it needs before, and give it that)")
    return Parts("name", children, data=f"{module}.{name}".encode())


def of_object(value: object) -> Parts:
    """An object's class and state, as a copy would have them, and what it leaves out of a copy."""
    if isinstance(value, (torch.layout, torch.memory_format, torch.qscheme)):
        return Parts("name", data=repr(value).encode())
    try:
        own = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(2) if own is None else own(value)
    except Exception as error:  # whatever some class's own way of being copied raises
        raise Unstable(f"a {type(value).__name__}") from error
    if isinstance(reduced, str):
        owners = (getattr(value, "__module__", None) or type(value).__module__, "scipy.special")
        owner = next((owner for owner in owners if resolves(owner, reduced, value)), None)
        if owner is None:
            raise Unstable(f"a {type(value).__name__}")
        return by_name(owner, reduced)
    parts: Any = (*reduced, None, None, None)
    make, args, state, items, pairs = parts[:5]
    children = [
        ("", make if make is not copyreg.__newobj__ else "new"),  # type: ignore[attr-defined]
        *((name_of(arg), arg) for arg in args),
        *attributes(value, state),
        ("", None if items is None else list(items)),
        ("", None if pairs is None else dict(pairs)),
        *_unsaid(value),
    ]
    return Parts("object", children)


def _unsaid(value: object) -> list[tuple[str, object]]:
    """The attributes of an object whose class, of the user's own, says itself what of it is copied: it may leave some
    out that it computes with.
    """
    cls = type(value)
    own = [
        name
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__")
        for base in cls.__mro__
        if base is not object and name in vars(base)
    ]
    return [] if not own or is_library(cls.__module__) else attributes(value, held_by(value))


def held_by(value: object) -> dict[str, object]:
    """The attributes of an object, those in slots too."""
    slots = {name for base in type(value).__mro__ for name in _slots_of(base) if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots - {"__dict__"}}}


def _slots_of(cls: type) -> Iterator[str]:
    slots = vars(cls).get("__slots__", ())
    for name in (slots,) if isinstance(slots, str) else slots:
        private = name.startswith("__") and not name.endswith("__")
        yield f"_{cls.__name__.lstrip('_')}{name}" if private else name


def attributes(value: object, state: object) -> list[tuple[str, object]]:
    """An object's state, attribute by attribute where it has them."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    found: list[tuple[str, object]] = []
    for part in parts:
        if isinstance(part, dict):
            kept = {name: _marked(value, name, item) for name, item in part.items()}
            found += [
                (str(name), item if isinstance(item, Kept) else (name, item))
                for name, item in sorted(kept.items(), key=lambda pair: str(pair[0]))
                if item is not _LIBRARY_KEPT
            ]
        else:
            found.append(("", part))
    return found


_LIBRARY_KEPT = object()
"""In place of what a package's ``cached_property`` has kept, which nobody has put there but itself."""


def _marked(value: object, name: object, item: object) -> object:
    """An attribute, marked where a ``cached_property`` may have kept it there."""
    if not isinstance(name, str):
        return item
    owner = next((base for base in type(value).__mro__ if name in vars(base)), None)
    made = None if owner is None else vars(owner)[name]
    if not isinstance(made, cached_property):
        return item
    assert owner is not None
    return _LIBRARY_KEPT if is_library(owner.__module__) else Kept(item, partial(made.func, value))


def name_of(value: object) -> str:
    """The name of a class or function; none for any other value."""
    return getattr(value, "__name__", "") if isinstance(value, type) or hasattr(value, "__code__") else ""
