"""Names that texts mention lead somewhere: `python -m tests.helpers.references` prints those that do not, and exits 1.

In docstrings these are roles (``:func:`broken` ``), resolved where they stand: first in the class, then in the
module, then from the top of a package. In any text, pages and notebooks included, they are dotted names that begin with
``sinklens.``, or with ``sl.`` as in the examples.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data|exc|obj|const):`~?([^`]+)`")
DOTTED = re.compile(r"(?<![\w./\\-])(?:sinklens|sl)(?:\.[A-Za-z]\w*)+(?![\w/])")
TEXTS = ("*.py", "*.pyi", "*.md", "*.ipynb", "Makefile", "*.toml")
FILES = re.compile(r"\.(?:html|json|jsonl|py|ipynb|toml|parquet)$")


class Reference(NamedTuple):
    """A name in a text."""

    line: int
    name: str
    scope: str = ""
    """The class that the text is in, with those around it; empty: none."""


def files() -> list[Path]:
    """Every text of the project: what git knows, or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *TEXTS]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def broken(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file mentions and nobody has."""
    text = path.read_text(encoding="utf-8")
    mentioned = [Reference(number, name) for number, line in enumerate(text.split("\n"), 1) for name in dotted(line)]
    module = None
    if path.suffix == ".py" and (roles := [*roles_in(ast.parse(text))]):
        module = importlib.import_module(module_name(path))
        mentioned += roles
    for reference in sorted({*mentioned}):
        if not resolves(reference.name, module, reference.scope):
            yield reference.line, reference.name


def dotted(line: str) -> list[str]:
    """Names of the package in a line; ``sl`` is what the examples call it."""
    names = [match for match in DOTTED.findall(line) if not FILES.search(match)]
    return [re.sub(r"^sl\b", "sinklens", name) for name in names]


def roles_in(tree: ast.AST, scope: str = "") -> Iterator[Reference]:
    """Targets of the roles in docstrings: of a module, of what it defines, and below a field."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value
            for match in ROLE.finditer(text):
                yield Reference(node.lineno + text.count("\n", 0, match.start()), match[1], scope)
        inner = f"{scope}.{node.name}".strip(".") if isinstance(node, ast.ClassDef) else scope
        yield from roles_in(node, inner)


def module_name(path: Path) -> str:
    """``sinklens.engine`` of ``sinklens/engine/__init__.py``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def resolves(name: str, module: ModuleType | None = None, scope: str = "") -> bool:
    """Whether a name is something: in a class of the module, in the module, or from the top of a package."""
    parts = name.removesuffix("()").split(".")
    if module is not None:
        around = scope.split(".") if scope else []
        if any(_has(module, [*around[:depth], *parts]) for depth in range(len(around), -1, -1)):
            return True
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        return _has(found, parts[depth:])
    return False


def _has(thing: object, names: list[str]) -> bool:
    for number, name in enumerate(names):
        # A field without a default is no attribute of its class.
        if number == len(names) - 1 and any(name in vars(c).get("__annotations__", {}) for c in _mro(thing)):
            return True
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def _mro(thing: object) -> tuple[type, ...]:
    return thing.__mro__ if isinstance(thing, type) else ()


def main() -> int:
    """Print what is broken; 1 where anything is."""
    sys.path.insert(0, str(ROOT))
    found = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in files() for line, name in broken(path)]
    for line in found:
        print(line)  # noqa: T201
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
