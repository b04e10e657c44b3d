"""Where texts come from: files, a folder of them, a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sinklens.errors import InputError

KINDS = (".txt", ".md", ".rst", ".jsonl", ".text")
"""Ends of the names of files that are taken from a folder."""


def of_files(path: Path) -> tuple[str, Callable[[], Iterator[str]]]:
    """A digest of the contents of a file, or of all text files in a folder, and a function that gives their texts.

    A ``.jsonl`` file has a text in every object (``{"text": ...}``); any other file is one.

    Raises:
        InputError: there is no such file, or no text file in the folder, or one cannot be read.
    """
    if not path.exists():
        raise InputError(f"data {path} is not there: give a text file, a folder, or a data set as `dataset:NAME`.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
    if not files:
        raise InputError(f"{path} holds no text file ({', '.join(KINDS)}): give a folder that does.")
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.suffix} {file.stat().st_size}\n".encode())
            with file.open("rb") as opened:
                while part := opened.read(2**24):
                    digest.update(part)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): give a file that can.") from error
    return digest.hexdigest()[:16], lambda: (text for file in files for text in _texts(file))


def _texts(file: Path) -> Iterator[str]:
    try:
        if file.suffix != ".jsonl":
            yield file.read_text(encoding="utf-8")
            return
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                yield _of_line(file, number, line)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text (byte {error.start}): convert it first.") from error


def _of_line(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'line {number} of {file} is no object with a "text": give {{"text": ...}}.') from error
    if not isinstance(text, str):
        raise InputError(f'the "text" in line {number} of {file} is none: give {{"text": "..."}}.')
    return text


def of_dataset(name: str, most_tokens: int | None) -> tuple[str, Callable[[], Iterable[str]]]:
    """The same of a data set: ``NAME``, ``NAME/CONFIG`` behind a second colon, or a folder that `datasets` saved.

    It is streamed, and only as far as the run needs it: about ``5 most_tokens`` characters.

    Raises:
        InputError: `datasets` is not installed, there is no such data set, or it has no column ``text``.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("data sets need one more package: pip install 'sinklens[datasets]'") from error
    path, _, config = name.partition(":")
    folder = Path(path).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(folder))
            found = found.get("train", next(iter(found.values()))) if isinstance(found, dict) else found
            key = str(found._fingerprint)
        else:
            builder = datasets.load_dataset_builder(path, config or None)
            key = f"{builder.cache_dir}"
            found = datasets.load_dataset(path, config or None, split="train", streaming=True)
    except Exception as error:  # whatever is wrong with a data set comes up as anything
        told = " ".join(str(error).split())[:200]
        raise InputError(f"the data set {name!r} cannot be loaded ({told}); check its name.") from error
    if found.column_names is not None and "text" not in found.column_names:
        raise InputError(f"the data set {name!r} has no column `text` but {', '.join(found.column_names)}.")
    limit = None if most_tokens is None else 5 * most_tokens

    def texts() -> Iterator[str]:
        given = 0
        row: Any
        for row in found:
            if limit is not None and given > limit:
                return
            given += len(row["text"])
            yield row["text"]

    return hashlib.sha256(f"{key} {limit}".encode()).hexdigest()[:16], texts
