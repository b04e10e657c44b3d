"""How results show themselves: a line where Python prints them, and the line with a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import pandas as pd

from sinklens.records.printable import clip, printable
from sinklens.records.text import number

ROWS = 20
"""Rows of a table that a notebook shows."""
_LONGEST = 60
"""Characters of one fact, and of one cell."""


def summary(kind: object, *facts: object) -> str:
    """``Kind(one fact; another)``: empty facts are left out, long ones cut."""
    return f"{type(kind).__name__}({'; '.join(clip(fact, _LONGEST) for fact in facts if fact not in ('', None))})"


def some(items: Iterable[object], most: int = 6) -> str:
    """The first few, by commas, and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(str(item) for item in listed[:most]) + more


def html(line: str, table: pd.DataFrame | Sequence[Mapping[str, object]] | None = None) -> str:
    """The line above a table, as HTML; all text is escaped, and of a long table the beginning is shown."""
    if table is not None and not isinstance(table, pd.DataFrame):
        table = pd.DataFrame(list(table))
    found = f"<div>{escape(printable(line))}</div>"
    if table is None or table.empty:
        return found
    first = table.head(ROWS)
    cells = [[_cell(value) for value in row] for row in first.itertuples(index=False, name=None)]
    names = [clip(name, _LONGEST) for name in first.columns]
    with pd.option_context("display.max_colwidth", None):
        found += pd.DataFrame(cells, columns=names).to_html(index=False, escape=True, border=0)
    left = len(table) - len(first)
    return found + (f"<div>and {left:,} more rows</div>" if left else "")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    if value is None or value is pd.NA or value is pd.NaT:
        return number(None)
    return clip(value, _LONGEST)
