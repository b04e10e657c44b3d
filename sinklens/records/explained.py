"""Functions whose arguments are explained where they stand: ``name: Annotated[type, "one line"] = default``.

A command line reads its options and their help off such a signature. People who ask for help get a plain signature, and
the lines below the docstring's text.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

WIDTH = 112
"""Columns of a docstring's lines."""


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose help says of every argument what stands in its annotation, and in its signature no more than
    its type.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    plain = [one.replace(annotation=_bare(one.annotation)) for one in signature.parameters.values()]
    function.__signature__ = signature.replace(parameters=plain)  # type: ignore[attr-defined]
    lines = [
        textwrap.fill(f"{name}: {said}", WIDTH, initial_indent="    ", subsequent_indent="        ")
        for name, hint in hints.items()
        if (said := _line(hint))
    ]
    text = inspect.cleandoc(function.__doc__ or "")
    behind = re.search(r"^(Returns|Raises):$", text, re.M)
    end = len(text) if behind is None else behind.start()
    function.__doc__ = "\n".join([text[:end].rstrip(), "", "Args:", *lines, "", text[end:]]).rstrip()
    return function


def _bare(annotation: Any) -> Any:
    """``Annotated[type, ...]``, as it is written, without what follows the type."""
    if not isinstance(annotation, str):
        return annotation
    written = ast.parse(annotation, mode="eval").body
    if not (isinstance(written, ast.Subscript) and ast.unparse(written.value) == "Annotated"):
        return annotation
    assert isinstance(written.slice, ast.Tuple)
    return ast.unparse(written.slice.elts[0])


def _line(hint: Any) -> str:
    return next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, str)), "")
