"""Which analyses there are. Nothing of them is imported, so that a list is quick."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TypeGuard


def folder() -> Path:
    """Where the analyses are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "analyses" if (package / "analyses").is_dir() else package.parent / "analyses"


def list_analyses(*, alone: bool = False) -> dict[str, str]:
    """Names of the analyses that come with sinklens, with the first line of each one's docstring. Imports nothing.

    Args:
        alone: list those as well that are run by their names alone (:attr:`sinklens.Analysis.alone`).
    """
    found = {}
    for path in sorted(folder().glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        made = next((node.value for node in module.body if _names_it(node)), None)
        if made is not None and (alone or not _is_alone(made)):
            found[path.stem] = (ast.get_docstring(module) or "").split("\n")[0]
    return found


def _names_it(node: ast.stmt) -> TypeGuard[ast.Assign]:
    """Whether a statement is ``ANALYSIS = ...``."""
    names = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(name, ast.Name) and name.id == "ANALYSIS" for name in names)


def _is_alone(made: ast.expr) -> bool:
    keywords = made.keywords if isinstance(made, ast.Call) else []
    return any(word.arg == "alone" and isinstance(word.value, ast.Constant) and word.value.value for word in keywords)
