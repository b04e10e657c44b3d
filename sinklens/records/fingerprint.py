"""Fingerprints: whether two things, in one process or in two, are the same by what they consist of and do.

Tensors, arrays and tables count by their contents; a function by its code, defaults, closed-over values and the globals
that it reads, followed as far as the user's own functions, classes and modules go; any other object by its class and
its state (:func:`sinklens.records.parts.parts_of`). What comes with a package is known by its name: it changes with the
version alone. Addresses, hash seeds, the order of sets and dictionaries, and where something is written down do not
count.

Pitfall: some things have nothing that tells whether they are the same (a generator of random numbers, an open file, a
function that reads one). :func:`fingerprint_of` gives them a value of their own in every process; :func:`unstable_in`
names them.

Not seen: what a function asks of the process and not of what it is made of (the time, random numbers of torch's own
generator, default dtypes); gradients and hooks of tensors; what somebody has written over a value that a
``cached_property`` of a package had kept, or, under a name with an underscore in front, onto a module of a package
other than torch; and what a function of C does that somebody has put in place of another within a package.
"""

from __future__ import annotations

import hashlib
import os

from sinklens.records import parts_of_code, parts_of_data
from sinklens.records.parts import Kept, Unstable, parts_of

_KINDS = (parts_of_code, parts_of_data)
"""Imported for what they make known to :func:`parts_of`."""
_PROCESS = os.urandom(16)
"""Of what has no stable fingerprint, no other process has the same one."""


def fingerprint_of(value: object) -> str:
    """SHA-256 of what a value consists of: equal for equal values, in every process.

    What has no stable contents (see :func:`unstable_in`) is equal to itself alone, in this process alone.
    """
    return _Walk().of(value, "").hex()


def unstable_in(value: object) -> list[str]:
    """What in ``value`` has no fingerprint that holds in another process, such as ``rng, a Generator``."""
    walk = _Walk()
    walk.of(value, "")
    return list(dict.fromkeys(walk.unstable))


class _Walk:
    """One pass over a value and all that it consists of."""

    def __init__(self) -> None:
        self.unstable: list[str] = []
        self._done: dict[int, tuple[object, bytes]] = {}  # the objects too, so that no address is used twice
        self._above: dict[int, int] = {}

    def of(self, value: object, name: str) -> bytes:
        plain = _plain(value)
        if plain is not None:
            return hashlib.sha256(plain).digest()
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._above:  # a circle: how many steps back it goes
            return hashlib.sha256(f"circle {len(self._above) - self._above[key]}".encode()).digest()
        self._above[key] = len(self._above)
        try:
            found = self._walk(value, name)
        except Exception as error:  # whatever a class of the user's raises where it is looked at
            what = _said(value, error)
            self.unstable.append(f"{name}, {what}" if name else what)
            found = hashlib.sha256(_PROCESS + str(key).encode()).digest()
        finally:
            del self._above[key]
        self._done[key] = (value, found)
        return found

    def _walk(self, value: object, name: str) -> bytes:
        parts = parts_of(value)
        children = [
            (inner, (inner, child.value) if type(child) is Kept else child)
            for inner, child in parts.children
            if not (type(child) is Kept and _comes_out_again(child))
        ]
        digest = hashlib.sha256(f"{parts.tag} {len(children)} ".encode())
        digest.update(parts.data)
        each = [self.of(child, inner or name) for inner, child in children]
        for child in each if parts.ordered else sorted(each):
            digest.update(child)
        return digest.digest()


def _said(value: object, error: Exception) -> str:
    """What nothing can be told of, in the words of the error that said so."""
    if isinstance(error, RecursionError):
        return "too deeply nested to be gone through"
    return str(error) if isinstance(error, Unstable) else f"a {type(value).__name__}"


def _comes_out_again(kept: Kept) -> bool:
    """Whether what was kept is what is computed now: then whether it was kept already does not count."""
    try:
        return fingerprint_of(kept.value) == fingerprint_of(kept.again())
    except Exception:  # whatever a user's function raises
        return False


def _plain(value: object) -> bytes | None:
    """The bytes of a plain value, its type in front; ``None`` for any other."""
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented or kind is bool:
        return repr(value).encode()
    if kind is int:
        return f"int {value:x}".encode()
    if kind is float:
        return f"float {value.hex()}".encode()  # type: ignore[attr-defined]  # -0.0 and nan too
    if kind is complex:
        return f"complex {value.real.hex()} {value.imag.hex()}".encode()  # type: ignore[attr-defined]
    if kind is str:
        return b"str " + str(value).encode("utf-8", "surrogatepass")
    return b"bytes " + value if kind is bytes else None  # type: ignore[operator]
