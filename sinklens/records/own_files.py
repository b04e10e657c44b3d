"""The user's own files that functions are made of: those that they are written in, and all that these import from.

A module is found by the import statements of a file, wherever in it they stand (a plain number does not say where it
comes from), and by the values that it holds (a module that was imported by its name in a text is in no statement).
Nothing is imported to find it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from sinklens.records.callables import INSTALLED, is_library


def own_files(*functions: Callable[..., object]) -> list[Path]:
    """The files that functions are written in, and the user's own files that these import from."""
    ahead = [(path, scope) for function in functions for path, scope in _written_in(function)]
    found: dict[Path, None] = {}
    while ahead:
        path, scope = ahead.pop(0)
        if path in found or not path.is_file():
            continue
        found[path] = None
        for name in sorted({*_said(path, scope), *_of_values(scope)}):
            if (file := _file(name)) is not None:
                module = sys.modules.get(name)
                ahead.append((file, {"__package__": _package(name, file)} if module is None else vars(module)))
    return list(found)


def _written_in(function: Any) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The file of a function, of a partial one, or of an object that is called; none of a notebook's."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isroutine(function) and not isinstance(function, type):
        function = getattr(type(function), "__call__", None)  # noqa: B004
    try:
        source = inspect.getsourcefile(function)
    except TypeError:  # of C, or of no file
        return
    if source is not None:
        yield Path(source), getattr(function, "__globals__", vars(sys.modules.get(function.__module__, object())))


def _said(path: Path, scope: Mapping[str, Any]) -> Iterator[str]:
    """The modules that a file's import statements name."""
    package = str(scope.get("__package__") or "")
    try:
        statements = _statements(path.read_bytes())
    except OSError:
        return
    for level, name in statements:
        if level:  # one dot is the package itself, each further one what it lies in
            parts = package.split(".")
            if not package or level > len(parts):
                continue
            name = ".".join([*parts[: len(parts) - level + 1], *filter(None, [name])])
        parts = name.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))  # packages are run too


@lru_cache(256)
def _statements(source: bytes) -> tuple[tuple[int, str], ...]:
    """Names in import statements, wherever they stand, each with the dots in front of it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ()
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [".".join(filter(None, [node.module, alias.name])) for alias in node.names]
            found |= {(node.level, name) for name in [node.module or "", *inside]}
    return tuple(sorted(found))


def _of_values(scope: Mapping[str, Any]) -> set[str]:
    """The modules that what a module holds is written in."""
    found: set[str] = set()
    for value in list(scope.values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str):
            found.add(name)
    return found


def _file(name: str) -> Path | None:
    """The file of a module of the user's, whether it is imported or not."""
    if not name or is_library(name):
        return None
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None) if module is not None else _origin(name)
    if not isinstance(path, str) or INSTALLED & set(Path(path).parts):
        return None
    return Path(path)


def _origin(name: str) -> str | None:
    """Where a module lies that is not imported, part by part: to ask for it as a whole would import its package."""
    root, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(root)
        for number, _ in enumerate(rest, 1):
            if spec is None or spec.submodule_search_locations is None:
                return None
            places = list(spec.submodule_search_locations)
            spec = PathFinder.find_spec(".".join([root, *rest[:number]]), places)
    except (ImportError, AttributeError, ValueError):
        return None
    return None if spec is None or not spec.has_location else spec.origin


def _package(name: str, file: Path) -> str:
    return name if file.name == "__init__.py" else name.rpartition(".")[0]
