"""Which analyses there are. Nothing of them is imported, so that a list is quick."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard


def folder() -> Path:
    """Where the analyses are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "analyses" if (package / "analyses").is_dir() else package.parent / "analyses"


def list_analyses(*, alone: bool = False, group: str = "") -> dict[str, str]:
    """Names of the analyses that come with sinklens, with the first line of each one's docstring. Imports nothing.

    Args:
        alone: list all, those as well that are run by their names alone (:attr:`sinklens.Analysis.alone`) or in groups.
        group: list those of a group alone (:attr:`sinklens.Analysis.group`), in place of those that are in none.
    """
    found = {}
    for path, module in _files():
        made = next((node.value for node in module.body if _names_it(node)), None)
        if made is None:
            continue
        if alone or (_keyword(made, "group") or "") == group and not _keyword(made, "alone"):
            found[path.stem] = (ast.get_docstring(module) or "").split("\n")[0]
    return found


def list_groups() -> tuple[str, ...]:
    """Names of the groups of analyses that are run when they are asked for."""
    made = (node.value for _, module in _files() for node in module.body if _names_it(node))
    return tuple(dict.fromkeys(str(group) for one in made if (group := _keyword(one, "group"))))


def _files() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder().glob("[!_]*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def _names_it(node: ast.stmt) -> TypeGuard[ast.Assign]:
    """Whether a statement is ``ANALYSIS = ...``."""
    names = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(name, ast.Name) and name.id == "ANALYSIS" for name in names)


def _keyword(made: ast.expr, name: str) -> object:
    """A keyword of ``Analysis(...)`` that is written as a plain value; None where it is not given."""
    keywords = made.keywords if isinstance(made, ast.Call) else []
    values = [word.value for word in keywords if word.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None
