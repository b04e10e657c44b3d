"""Tables on a terminal that is too narrow for them: each row becomes a few lines, so that no number is ever cut.

Rich fits a table into its terminal by cutting cells, ``1.00 [0.9…``. A cut number cannot be told from a whole one at a
glance, and a column of predictions may vanish. So a table is printed as a table where every cell fits, and otherwise
row by row: what a row is about (its left-justified cells), then every number under its column's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

FOLDED = 14
"""Columns of text that may be folded are legible down to this many characters."""
INDENT = 4


def show(screen: Console, *things: RenderableType) -> None:
    """Print tables as they are where every number fits, and row by row where not; anything else as it is."""
    for thing in things:
        if not isinstance(thing, Table):
            screen.print(thing)
        elif fits(thing, screen.width):
            screen.print(_unbroken(thing, screen.width))
        else:
            for line in stacked(thing, screen.width):
                screen.print(line, soft_wrap=True)


def fits(table: Table, width: int) -> bool:
    """Whether a table can be printed in so many characters with no number cut; names of columns may be broken."""
    return _width(table, broken=True) <= width


def _unbroken(table: Table, width: int) -> Table:
    """The table with numbers that Rich must not wrap, and text that it must not cut."""
    broken = _width(table, broken=False) > width
    for column in table.columns:
        if _is_text(column):
            column.overflow = "fold"
        else:
            column.no_wrap = True
            column.header = "\n".join(wrap(_text(column.header), _needed(column, broken))) or column.header
    return table


def stacked(table: Table, width: int) -> Iterable[Text]:
    """The rows of a table, each as lines of at most ``width`` characters where single cells allow it."""
    if table.title is not None:
        yield from _filled([_text(table.title).split()], width, "", "bold")
    headers = [_text(column.header) for column in table.columns]
    cells = [[_text(cell).strip() for cell in column.cells] for column in table.columns]
    for number, row in enumerate(table.rows):
        texts = [column[number] for column in cells]
        style = str(row.style or "")
        yield from _row(table.columns, headers, texts, width, style)
        if row.end_section:
            yield Text()


def _row(columns: Sequence[Column], headers: Sequence[str], texts: Sequence[str], width: int, style: str) -> list[Text]:
    lead = [text for column, text in zip(columns, texts, strict=True) if column.justify == "left" and text]
    pairs = [
        [*header.split(), text]
        for column, header, text in zip(columns, headers, texts, strict=True)
        if column.justify != "left" and text
    ]
    nested = bool(texts) and not texts[0]  # a row under another: its first cell is not said again
    first = _filled(
        [text.split() if len(text) > width else [text] for text in lead], width, "  " if nested else "", style
    )
    return [*first, *_filled(pairs, width, " " * INDENT, style)]


def _filled(groups: Sequence[Sequence[str]], width: int, indent: str, style: str) -> list[Text]:
    """Groups of words two blanks apart, as many on a line as fit; a group is broken only if it is too long itself."""
    lines, line = [], ""
    for group in groups:
        whole = " ".join(group)
        pieces = [whole] if len(indent) + len(whole) <= width else list(group)
        for place, piece in enumerate(pieces):
            between = "" if not line else "  " if place == 0 else " "
            if line and len(indent) + len(line) + len(between) + len(piece) > width:
                lines.append(line)
                line, between = "", ""
            line += between + piece
    return [Text(indent + text, style=style) for text in [*lines, *([line] if line else [])]]


def _width(table: Table, *, broken: bool) -> int:
    """Characters that a table needs, with the names of its columns broken at every blank or not at all."""
    return 3 * len(table.columns) + 1 + sum(_needed(column, broken) for column in table.columns)


def _needed(column: Column, broken: bool) -> int:
    header, *cells = (_text(text) for text in (column.header, *column.cells))
    if _is_text(column):
        longest = max(
            cell_len(part) for part in [*header.split(), *(part for cell in cells for part in cell.split()), ""]
        )
        return min(longest, FOLDED)
    return max(cell_len(part) for part in [*(header.split() if broken else [header]), *cells, ""])


def _is_text(column: Column) -> bool:
    """Whether what a column holds may go on in a second line."""
    return column.justify == "left" and not column.no_wrap


def _text(cell: RenderableType) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
