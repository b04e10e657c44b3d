"""Texts of a Hugging Face data set: by name, from a folder on this machine, or an object that is loaded already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinklens.errors import InputError
from sinklens.prompts.files import articles

KNOWN = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}
"""Short names: repository and configuration."""
SPLITS = ("test", "validation", "train")
"""Which part is taken where nobody says: the first that is there."""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""What ``save_to_disk`` writes."""


@dataclass(frozen=True)
class Rows:
    """Texts, and what they are of."""

    texts: Iterable[str]
    """One a row."""
    groups: Iterable[object] | None
    """For each the document that it is of, where that is known."""
    source: str
    """What results call them."""


def rows_of(data: Any, config: str | None, split: str | None, column: str | None, group: str | None) -> Rows:
    """The texts of a data set.

    Args:
        data: a name, a folder that holds files of data or what ``save_to_disk`` wrote, or a data set that is loaded.
        config: of a name.
        split: which part; :data:`SPLITS` says which where nobody does, and of a name it is ``test``.
        column: with the texts; by default ``text``, or the only one with strings.
        group: a column that says which document a row is of.

    Raises:
        InputError: ``datasets`` is not installed, the data set cannot be loaded, or has no such part or column.
    """
    named = isinstance(data, (str, os.PathLike))
    on_hub = named and not os.path.isdir(data)
    name = str(data) if named else str(getattr(getattr(data, "info", None), "dataset_name", None) or "given")
    repo, usual = KNOWN.get(name, (name, None))
    try:
        rows = _load(repo, config or usual, split) if named else data
        if isinstance(rows, Mapping) and not isinstance(next(iter(rows.values()), None), list):
            split = split or next((part for part in SPLITS if part in rows), next(iter(rows)))
            rows = rows[split]
        if split is None:
            split = str(getattr(rows, "split", None) or (SPLITS[0] if on_hub else "all"))
        column = column or _text_column(rows)
        texts, groups = _column(rows, column), None if group is None else _column(rows, group)
        if groups is None and repo == KNOWN["wikitext"][0]:
            groups = articles(texts)
    except InputError:
        raise
    except Exception as error:  # offline, unknown name, missing column: the hub's clients share no base class
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"The data set {name!r} could not be loaded ({type(error).__name__}: {reason}); check its name and the "
            "network, or use the built-in passages or a file instead."
        ) from error
    label = Path(name).name if named and not on_hub else name
    return Rows(texts, groups, f"dataset:{label}[{split}]")


def from_words(text: str) -> tuple[str, str | None, str | None]:
    """``NAME[:CONFIG][@SPLIT]``, or a folder, as name, configuration and part."""
    if os.path.isdir(os.path.expanduser(text)):
        return os.path.expanduser(text), None, None
    rest, _, split = text.partition("@")
    name, _, config = rest.partition(":")
    return os.path.expanduser(name), config or None, split or None


def _load(name: str, config: str | None, split: str | None) -> Any:
    """A part of a data set by name, and of a folder all parts."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("Data sets need one more package: pip install 'sinklens[datasets]'.") from error
    if not os.path.isdir(name):
        return datasets.load_dataset(name, config, split=split or SPLITS[0])
    if any(os.path.isfile(os.path.join(name, record)) for record in SAVED):
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, config)


def _text_column(rows: Any) -> str:
    features = getattr(rows, "features", None) or {}
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if "text" in features or not features or not strings:
        return "text"
    if len(strings) > 1:
        raise InputError(
            f"The data set has no column `text`, and several with strings ({', '.join(strings)}): say which (column=)."
        )
    return strings[0]


def _column(rows: Any, name: str) -> Iterable[Any]:
    """A column, row by row where the data set is streamed."""
    streamed = not hasattr(rows, "__len__")
    return (row[name] for row in rows) if streamed else rows[name]
