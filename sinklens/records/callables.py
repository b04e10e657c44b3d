"""What a function reads from outside itself, and whose it is: a package's, or the user's own."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

INSTALLED = {"site-packages", "dist-packages"}
"""Folders that packages are installed in."""
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_FROM_OUTSIDE = {
    *("environ", "getenv", "argv", "import_module"),
    *("open", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "genfromtxt", "load_file", "safe_open"),
    *("read_csv", "read_table", "read_json", "read_pickle", "read_parquet", "read_feather", "read_excel"),
}
_OF_MODULES = {"load": ("torch", "numpy", "json", "pickle", "joblib"), "modules": ("sys",)}
LOOKED_UP = {"getattr", "hasattr", "vars", "dir", "__dict__", "attrgetter"}
"""Ways to a module's names that do not say which."""


@dataclass(frozen=True)
class Read:
    """Names in a function's code, in order."""

    globals: tuple[str, ...]
    """Globals that it reads."""
    names: tuple[str, ...]
    """All names: these and those of attributes."""
    imports: tuple[str, ...]
    """Modules that it imports while it runs."""


@dataclass(frozen=True, eq=False)
class ModuleNames:
    """A module, and the names that a function may read there."""

    module: ModuleType
    """The module."""
    names: tuple[str, ...]
    """The names."""


def read_by(code: CodeType) -> Read:
    """What a function reads by name, the functions inside it too."""
    found, names, imports = set(), set(), set()
    for inner in _nested(code):
        names.update(inner.co_names)
        for instruction in dis.get_instructions(inner):
            if instruction.opname in _GLOBAL:
                found.add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                imports.add(instruction.argval)
    return Read(tuple(sorted(found)), tuple(sorted(names)), tuple(sorted(imports)))


def outside_of(read: Read, modules: Iterable[str]) -> str | None:
    """What a function takes from files or from the process while it runs, so far as its names tell.

    Args:
        read: its names.
        modules: the modules among the globals that it reads.
    """
    for name in read.names:
        of_modules = set(_OF_MODULES.get(name, ())) & {module.partition(".")[0] for module in modules}
        if name in _FROM_OUTSIDE or of_modules:
            return name
    return None


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def is_library(module: str) -> bool:
    """Whether a module comes with Python, with sinklens, or with an installed package, and not from the user."""
    root = module.partition(".")[0]
    if root == "sinklens" or root in sys.stdlib_module_names:
        return True
    if root == "__main__" or root not in sys.modules:
        return False
    places = [getattr(sys.modules[root], "__file__", None), *getattr(sys.modules[root], "__path__", ())]
    return any(place is not None and INSTALLED & set(Path(place).parts) for place in places)


def resolves(module: str, name: str, value: object) -> bool:
    """Whether a module has this very value under this name."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value
