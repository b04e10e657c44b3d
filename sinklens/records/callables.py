"""What a function reads from outside itself, by the names in its code, and whose a thing is: a package's, or the user's
own.
"""

from __future__ import annotations

import dis
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial, partialmethod
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

INSTALLED = {"site-packages", "dist-packages"}
"""Folders that packages are installed in."""
_PYTHON = tuple({os.path.join(os.path.realpath(sysconfig.get_path(kind)), "") for kind in ("stdlib", "platstdlib")})
"""Folders of Python's own modules."""
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


@dataclass(frozen=True)
class Read:
    """What a function's code names."""

    paths: tuple[tuple[str, ...], ...]
    """Globals that it reads, each with the attributes that are looked up in it: ``("np", "linalg", "norm")``."""
    names: frozenset[str]
    """All names, of globals and of attributes."""
    texts: frozenset[str]
    """Texts that stand in it, which may be names that it looks up."""
    imports: tuple[str, ...]
    """Modules that it imports while it runs; one that is named from where the function is has dots in front."""


@lru_cache(4096)
def read_by(code: CodeType) -> Read:
    """What a function reads by name, the functions inside it too."""
    paths, names, texts, imports = set(), set(), set(), set()
    for inner in _nested(code):
        names.update(inner.co_names)
        texts.update(constant for constant in inner.co_consts if isinstance(constant, str))
        paths.update(_paths(inner))
        imports.update(_imports(inner))
    return Read(tuple(sorted(paths)), frozenset(names), frozenset(texts), tuple(sorted(imports)))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _paths(code: CodeType) -> Iterator[tuple[str, ...]]:
    path: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if path and step.opname in _ATTRIBUTE:
            path = (*path, step.argval)
        elif step.opname != "EXTENDED_ARG":
            if path:
                yield path
            path = (step.argval,) if step.opname in _GLOBAL else ()


def _imports(code: CodeType) -> Iterator[str]:
    constants: list[Any] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            level = constants[-2] if len(constants) > 1 else 0  # in front lie the level and the names
            yield "." * level + step.argval
        elif step.opname != "EXTENDED_ARG":
            constants = [*constants[-1:], step.argval] if step.opname.startswith("LOAD_") else []


def is_library(module: object) -> bool:
    """Whether a module of that name comes with Python, with sinklens, or with an installed package, and not from the
    user.
    """
    if not isinstance(module, str):  # a class may say anything
        return False
    root = module.partition(".")[0]
    if root == "sinklens":
        return True
    found = sys.modules.get(root)
    if root == "__main__" or (found is None and root not in sys.stdlib_module_names):
        return False
    places = (getattr(found, "__file__", None), *getattr(found, "__path__", ()))
    return _of_library(root, places)


@cache
def _of_library(root: str, places: tuple[str | None, ...]) -> bool:
    known = [place for place in places if place is not None]
    if root in sys.stdlib_module_names:  # a file of the user's may have the name of one of Python's
        return not known or any(os.path.realpath(place).startswith(_PYTHON) or _installed(place) for place in known)
    return any(map(_installed, known))


def _installed(place: str) -> bool:
    return bool(INSTALLED & set(Path(place).parts))


def resolves(module: str, name: str, value: object) -> bool:
    """Whether a module has this very value under this name."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def is_packages_own(value: object) -> bool:
    """Whether a package has this very thing under its name, and it is the package's: code that somebody has put in
    another's place may have taken over its name.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str) and is_library(module)):
        return False
    return resolves(module, name, value) and not is_users_code(value)


def is_users_code(value: object) -> bool:
    """Whether a function is, or wraps, one that was not written in a package."""
    seen: set[int] = set()
    while isinstance(value, FunctionType) and id(value) not in seen:
        written_in = str(value.__globals__.get("__name__"))
        if not is_library(written_in) and not written_in.startswith("namedtuple_"):  # as collections names it
            return True
        seen.add(id(value))
        value = value.__dict__.get("__wrapped__")
    return False


def users_entries(classes: Iterable[type]) -> dict[str, object]:
    """What somebody has put into classes of packages, by name: functions that were written elsewhere."""
    found: dict[str, object] = {}
    for cls in classes:
        if is_library(cls.__module__):
            found |= {f"{cls.__qualname__}.{name}": item for name, item in vars(cls).items() if _is_users(item)}
    return found


def _is_users(item: Any) -> bool:
    if isinstance(item, FunctionType):
        return is_users_code(item)
    if isinstance(item, property):
        return is_users_code(item.fget) or is_users_code(item.fset)
    if isinstance(item, (staticmethod, classmethod)):
        return is_users_code(item.__func__)
    return isinstance(item, (partial, partialmethod, cached_property)) and is_users_code(item.func)
