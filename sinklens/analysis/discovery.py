"""Which analyses there are. Nothing of them is imported, so that a list is quick."""

from __future__ import annotations

import ast
from pathlib import Path


def folder() -> Path:
    """Where the analyses are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "analyses" if (package / "analyses").is_dir() else package.parent / "analyses"


def list_analyses() -> dict[str, str]:
    """Names of the analyses that come with sinklens, with the first line of each one's docstring. Imports nothing."""
    found = {}
    for path in sorted(folder().glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            target.id
            for node in module.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if "ANALYSIS" in names:
            found[path.stem] = (ast.get_docstring(module) or "").split("\n")[0]
    return found
