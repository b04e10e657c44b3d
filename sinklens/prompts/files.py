"""Lines of text files, and which text each passage is of."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sinklens.errors import InputError

WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?")
"""A row of WikiText that begins an article; further `=` mark its sections."""


GROUP_FIELDS = ("group", "source")
"""Fields of a JSON line that say which text a passage is of; the first that is there counts."""


def groups_of(rows: Sequence[Mapping[str, Any]]) -> list[object] | None:
    """Which text each JSON line is a passage of, where the lines say so."""
    found = [next((f"{f} {row[f]}" for f in GROUP_FIELDS if row.get(f) is not None), None) for row in rows]
    corpus = len(set(found)) == 1 and str(found[0]).startswith("source ")
    return None if corpus else list(found)


def articles(rows: Iterable[str]) -> list[int]:
    """The number of the article that each row of WikiText is of."""
    numbers, number = [], 0
    for row in rows:
        number += bool(WIKITEXT_TITLE.fullmatch(row))
        numbers.append(number)
    return numbers


_MARKS = (  # UTF-32's marks begin like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, whichever of the three ways they end."""
    # os.path and not Path: it says no to a name that is too long instead of raising.
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a text file in it.")
    if not os.path.isfile(path):
        raise InputError(f"There is no file {path}; check the path.")
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
        text = content.decode(encoding)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        line = len(re.split(rb"\r\n|\r|\n", error.object[: error.start]))
        where = f" (line {line} is not)" if error.encoding.startswith("utf-8") else ""
        raise InputError(f"{path} is not a UTF-8 text file; save it as plain text in UTF-8{where}.") from error
    lines = re.split(r"\r\n|\r|\n", text)
    damaged = next((number for number, line in enumerate(lines, 1) if "\0" in line), None)
    if damaged is not None:
        raise InputError(f"{path}, line {damaged} has a NUL character; remove it, or save the file as text in UTF-8.")
    if not text.strip():
        raise InputError(f"{path} is empty; write one prompt on each line.")
    return lines


def json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    """The object of one line; raises InputError where it is none with a text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path}, line {number} is not JSON; write one {{"text": "..."}} on it.') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{path}, line {number} has no "text" that is a string; write {{"text": "..."}}.')
    return row
