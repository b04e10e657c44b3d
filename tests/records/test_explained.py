"""Help that is written from annotations: every argument once, and nothing of it in the signature."""

from __future__ import annotations

import inspect
import pydoc
from typing import Annotated

import pytest

import sinklens as sl
from sinklens.records.explained import explained
from sinklens.records.ranges import hints_of

NAMES = ("a", "b")


@explained
def one(
    x: int, y: Annotated[int | None, f"One of {', '.join(NAMES)}.", 3] = 2, *, z: Annotated[str, "A text."] = "z"
) -> int:
    """Do it.

    More of it.

    Raises:
        ValueError: never.
    """
    return x if y and z else 0


def test_the_lines_stand_between_the_text_and_what_is_raised() -> None:
    assert one.__doc__ == (
        "Do it.\n\nMore of it.\n\nArgs:\n    y: One of a, b.\n    z: A text.\n\nRaises:\n    ValueError: never."
    )
    assert str(inspect.signature(one)) == "(x: 'int', y: 'int | None' = 2, *, z: 'str' = 'z') -> 'int'"
    assert one(3) == 3 and hints_of(one)["z"] == Annotated[str, "A text."]  # as a command line reads them


@pytest.mark.parametrize("function", [sl.sweep, sl.lab.train], ids=["sweep", "train"])
def test_help_explains_every_argument(function: object) -> None:
    text = pydoc.plain(pydoc.render_doc(function))
    assert "Annotated" not in text
    for name in inspect.signature(function).parameters:  # type: ignore[arg-type]
        if name not in ("model", "batch", "command", "report"):
            assert text.count(f"\n        {name}: ") == 1, name
    lines = text.splitlines()
    assert max(len(line) for line in lines[3:]) <= 120  # the signature stands in one line
