"""Reading back the rows of tasks: from memory, from a folder's shards, or from one gathered file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sinklens.errors import InputError
from sinklens.sweeps.schema import SCHEMA
from sinklens.sweeps.seal import UNREADABLE, Damage, Seal, digest_of, parse_record, read_sealed
from sinklens.sweeps.store import FORMAT, FolderSink

METADATA = b"sinklens.sweep"
"""Key of the record in a gathered file's metadata; its row groups are tasks."""


class Shards(Protocol):
    """Rows by task."""

    def tasks(self) -> set[str]:
        """Names of the tasks that are there."""
        ...

    def read(self, tasks: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of some tasks, in that order."""
        ...

    def dataset(self, tasks: Sequence[str]) -> ds.Dataset:
        """The same as a data set, which streams."""
        ...


class MemoryShards:
    """Tables in memory."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self.tables = tables

    def tasks(self) -> set[str]:
        """Names of the tasks that are there."""
        return set(self.tables)

    def read(self, tasks: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of some tasks, in that order."""
        found = _joined([self.tables[task] for task in tasks])
        return found if columns is None else found.select(list(columns))

    def dataset(self, tasks: Sequence[str]) -> ds.Dataset:
        """The same as a data set."""
        return ds.dataset(self.read(tasks))


class FolderShards:
    """The shards of a folder."""

    def __init__(self, folder: Path) -> None:
        self.sink = FolderSink(folder)
        self._sound: set[str] = set()

    def tasks(self) -> set[str]:
        """Names of the tasks that are there."""
        return self.sink.finished()

    def read(self, tasks: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of some tasks, in that order.

        Raises:
            InputError: a shard is damaged.
        """
        return _joined([read_shard(self.sink.path(task), columns) for task in tasks], columns)

    def dataset(self, tasks: Sequence[str]) -> ds.Dataset:
        """The same as a data set, which streams.

        Raises:
            InputError: a shard is damaged.
        """
        for task in tasks:
            if task not in self._sound:  # a data set is read piece by piece, and looks at no seal
                read_shard(self.sink.path(task))
                self._sound.add(task)
        paths = [str(self.sink.path(task)) for task in tasks]
        return ds.dataset(paths, format="parquet", schema=SCHEMA) if paths else ds.dataset(_joined([]))


class FileShards:
    """One file that ``sinklens gather`` has written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path)

    @cached_property
    def _groups(self) -> dict[str, tuple[int, Seal]]:
        seals = json.loads((self._file.schema_arrow.metadata or {})[METADATA])["seals"]
        return {seal["task"]: (number, Seal(**seal)) for number, seal in enumerate(seals)}

    def tasks(self) -> set[str]:
        """Names of the tasks that are there."""
        return set(self._groups)

    def read(self, tasks: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of some tasks, in that order."""
        return _joined([self._read(task, None if columns is None else list(columns)) for task in tasks], columns)

    def _read(self, task: str, columns: list[str] | None) -> pa.Table:
        """The rows of one task.

        Raises:
            InputError: they are not as they were written.
        """
        number, seal = self._groups[task]
        try:
            rows = self._file.read_row_groups([number], columns=columns)
            rows.validate(full=True)
            seal.check(task, rows)
        except (*UNREADABLE, Damage) as error:
            told = " ".join(str(error).split())[:120]
            raise InputError(f"{self.path} is damaged ({task}: {told}): gather the folders again") from error
        return rows

    @cached_property
    def _all_sound(self) -> bool:
        for task in self._groups:
            self._read(task, None)
        return True

    def dataset(self, tasks: Sequence[str]) -> ds.Dataset:  # noqa: ARG002  (the file has all of them)
        """The same as a data set, which streams.

        Raises:
            InputError: the file is damaged.
        """
        assert self._all_sound
        return ds.dataset(self.path, format="parquet", schema=SCHEMA)


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard.

    Raises:
        InputError: it is damaged.
    """
    try:
        return read_sealed(path, path.stem, columns)
    except Damage as damage:
        raise InputError(
            f"{path} is damaged ({damage}): remove that file and run the sweep again, which fills it"
        ) from None


def record_of_file(path: Path) -> dict[str, Any]:
    """The record in a gathered file.

    Raises:
        InputError: it is no such file.
    """
    try:
        with pq.ParquetFile(path) as file:
            found, groups = json.loads((file.schema_arrow.metadata or {})[METADATA]), file.num_row_groups
        record = parse_record(json.dumps(found["record"]), FORMAT)
        if len(found["seals"]) != groups or digest_of(found["seals"]) != found["digest"]:
            raise Damage("it has other row groups")
    except (*UNREADABLE, LookupError, TypeError, RecursionError, Damage) as error:
        raise InputError(
            f"{path} is not a file that sinklens gather has written, or not as it was written: give a sweep's folder, "
            "or gather again"
        ) from error
    return record


def _joined(tables: Sequence[pa.Table], columns: Sequence[str] | None = None) -> pa.Table:
    if tables:
        return pa.concat_tables([table.replace_schema_metadata() for table in tables])
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    return schema.empty_table()
