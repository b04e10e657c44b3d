"""What tells a shard or a record from a damaged one, or from that of another sweep: its name, its size, its contents.

Parquet has no checksum of its own that a reader insists on. A shard carries, beside its rows, the name of its task, the
number of its rows, and a digest of every column, so that any of them can be read alone and be made sure of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY = b"sinklens/shard"
"""Of the seal in a shard's metadata."""
DIGITS = 32
"""Hexadecimal digits that are kept of a digest."""
_UNSEALED = ("digest", "provenance")
"""Keys of a record that its digest does not cover: no number depends on where it was made."""


UNREADABLE = (OSError, pa.ArrowException, ValueError, MemoryError)
"""What reading a damaged Parquet file raises."""


class Damage(Exception):
    """What is not as it was written, in a few words."""


@dataclass(frozen=True)
class Seal:
    """What a task's rows must be."""

    task: str
    """Name of the task."""
    rows: int
    """How many."""
    sums: Mapping[str, str]
    """Digest of every column."""

    @staticmethod
    def of(task: str, rows: pa.Table) -> Seal:
        """The seal of the rows of a task."""
        return Seal(task, len(rows), {name: column_digest(rows[name]) for name in rows.column_names})

    @staticmethod
    def read(metadata: Mapping[bytes, bytes] | None) -> Seal:
        """The seal in a shard's metadata.

        Raises:
            Damage: there is none.
        """
        try:
            return Seal(**json.loads((metadata or {})[KEY]))
        except (ValueError, LookupError, TypeError) as error:
            raise Damage("it has no seal") from error

    def put_on(self, rows: pa.Table) -> pa.Table:
        """The rows with the seal in their metadata."""
        return rows.replace_schema_metadata({KEY: json.dumps(asdict(self)).encode()})

    def check(self, task: str, rows: pa.Table) -> None:
        """Make sure that these are the rows of that task, or some of their columns.

        Raises:
            Damage: they are not.
        """
        if self.task != task:
            raise Damage(f"it holds the task {self.task}")
        if len(rows) != self.rows:
            raise Damage(f"it has {len(rows)} rows of {self.rows}")
        for name in rows.column_names:
            try:
                same = self.sums.get(name) == column_digest(rows[name])
            except (*UNREADABLE, LookupError, TypeError):  # values of another type altogether
                same = False
            if not same:
                raise Damage(f"its column {name} is not as it was written")


def read_sealed(path: Path, task: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a task, or some of their columns.

    Raises:
        Damage: it is not the whole and only contents of that task's file.
    """
    try:
        with pq.ParquetFile(path) as file:
            seal = Seal.read(file.schema_arrow.metadata)
            rows = file.read(columns=None if columns is None else list(columns))
            rows.validate(full=True)
    except UNREADABLE as error:
        raise Damage(" ".join(str(error).split())[:120]) from error
    seal.check(task, rows)
    return rows.replace_schema_metadata()


def column_digest(column: pa.ChunkedArray) -> str:
    """Digest of a column's values, whatever pieces and dictionaries it is stored in."""
    array = column.combine_chunks()
    digest = hashlib.sha256(f"{len(array)} ".encode())
    if pa.types.is_dictionary(array.type):
        names = array.dictionary.to_pylist()
        used, codes = np.unique(array.indices.fill_null(-1).to_numpy(), return_inverse=True)
        words = ["" if code < 0 else names[code] for code in used]
        rank = np.argsort(np.argsort(np.array(words, dtype=object)))
        digest.update(repr((str(array.type.value_type), sorted(words))).encode())
        digest.update(rank.astype(np.int32)[codes].tobytes())
    elif pa.types.is_string(array.type):
        digest.update(json.dumps(array.to_pylist()).encode())
    else:
        digest.update(str(array.type).encode())
        digest.update(_numbers(array).data)
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()[:DIGITS]


def _numbers(array: pa.Array) -> np.ndarray:
    """The values, with zeros where there is none."""
    filled = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    return np.ascontiguousarray(filled.to_numpy(zero_copy_only=False))


def digest_of(plain: object) -> str:
    """Digest of plain data."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()[:DIGITS]


def record_digest(record: Mapping[str, Any]) -> str:
    """Digest of a record, as it is read back from JSON."""
    return digest_of({name: value for name, value in record.items() if name not in _UNSEALED})


def parse_record(text: str | bytes, version: int) -> dict[str, Any]:
    """A record, as it was written.

    Raises:
        Damage: it is anything else.
    """
    try:
        found = json.loads(text, object_pairs_hook=_each_once, parse_constant=_refuse)
        if not isinstance(found, dict):
            raise Damage("it is no record of a sweep")
        if "digest" not in found and isinstance(found.get("format"), int) and found["format"] < version:
            raise Damage("an older sinklens has written it")
        if found.get("digest") != record_digest(found):
            raise Damage("it is not as it was written")
        _check_provenance(found.get("provenance"))
    except RecursionError as error:
        raise Damage("it is nested too deeply") from error
    except ValueError as error:  # no JSON, not UTF-8, a number of a million digits
        raise Damage(" ".join(str(error).split())[:120]) from error
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Damage("a key is there twice")
    return found


def _refuse(constant: str) -> None:
    raise Damage(f"it holds {constant}")


def _check_provenance(found: object) -> None:
    if found is None:
        return
    versions = found.get("versions") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(versions, dict):
        raise Damage("its provenance is not as it was written")
    texts = [*versions.values(), *(value for name, value in found.items() if name != "versions")]
    if not all(value is None or isinstance(value, str) for value in texts):
        raise Damage("its provenance is not as it was written")
