"""Where a number comes from: versions, commit, device, dtype, and digests of the model and the prompts."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from sinklens.records.callables import INSTALLED, is_library
from sinklens.records.fingerprint import fingerprint_of


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read once: what is imported does not change, and to read it takes longer than a small sweep."""
    names = ("sinklens", "torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn", "pandas")
    known = {"python": platform.python_version()}
    for name in names:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def git_commit() -> str | None:
    """Commit of the checkout that sinklens runs from, with ``-dirty`` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]
    try:
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(top) != here.parent:
            return None  # installed inside some other project's checkout
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


@cache
def package_digest() -> str:
    """SHA-256 of sinklens's own source: numbers made by other code are not the same numbers."""
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parents[1]
    for path in sorted(here.rglob("*.py")):
        if "analyses" not in path.relative_to(here).parts:  # each stands for itself
            digest.update(f"{path.relative_to(here).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def code_digest(function: Callable[..., object]) -> str:
    """Digest of sinklens's source, of the file that ``function`` is written in, and of the user's own files that this
    one imports from; of a function that is in no file, such as a notebook's, of what it does.
    """
    digest = hashlib.sha256(package_digest().encode())
    source = inspect.getsourcefile(function)
    if source is None or not Path(source).is_file():
        digest.update(fingerprint_of(function).encode())
    files = [] if source is None else [source]
    files += sorted(_imported(getattr(inspect.unwrap(function), "__globals__", {})) - set(files))
    for path in _with_named(files):
        if Path(path).is_file():
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _with_named(files: list[str]) -> list[str]:
    """Files, and those of the user's own modules that their import statements name: a plain number does not say where
    it comes from.
    """
    found = list(files)
    for path in found:  # which grows meanwhile
        for name in _import_statements(path):
            if is_library(name):
                continue
            module = sys.modules.get(name)
            origin = getattr(module, "__file__", None) or _origin(name)
            if origin is not None and origin not in found:
                found.append(origin)
    return found


def _import_statements(path: str) -> list[str]:
    """The modules that a file's import statements name, wherever in it they stand."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return sorted(named)


def _origin(name: str) -> str | None:
    """The file of a module of the user's that is not imported yet; a part of a package cannot be looked for without
    importing the package.
    """
    if "." in name:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None
    path = None if spec is None else spec.origin
    return None if path is None or INSTALLED & set(Path(path).parts) or not path.endswith(".py") else path


def _imported(names: Mapping[str, Any]) -> set[str]:
    """The files of the user's own modules that the names of a module come from, and of those that these import from."""
    found: set[str] = set()
    ahead = [names]
    while ahead:
        for value in list(ahead.pop().values()):
            of = getattr(value, "__module__", None)
            module = value if isinstance(value, ModuleType) else sys.modules.get(of) if isinstance(of, str) else None
            path = getattr(module, "__file__", None)
            if module is None or path is None or path in found or is_library(module.__name__):
                continue
            found.add(path)
            ahead.append(vars(module))
    return found
