"""Where a sweep's rows go: a folder that many processes may write to and that survives any of them, or memory.

``FOLDER/sweep.json`` says what the sweep is; it is written once, by whoever comes first. ``FOLDER/shards/TASK.parquet``
has the rows of one task: taking a sweep up again is running the tasks that have none, or one that is not as it was
written (``seal``). Two processes that run the same task write the same rows, and the second's take the first's place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sinklens.errors import InputError
from sinklens.records.files import remove_leftovers, replaced, temporary_name
from sinklens.records.plain import to_plain
from sinklens.sweeps.schema import PARQUET
from sinklens.sweeps.seal import Damage, Seal, parse_record, read_sealed, record_digest

FORMAT = 2
"""Of ``sweep.json`` and of the shards."""
RECORD = "sweep.json"
SHARDS = "shards"
VERIFIED = "verified.parquet"


class Sink(Protocol):
    """Where the rows of tasks go."""

    def record(self) -> dict[str, Any] | None:
        """What is known of a sweep that is there already."""
        ...

    def create(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a sweep; gives the record that is there, which may be that of another process."""
        ...

    def finished(self) -> set[str]:
        """Names of the tasks that are done."""
        ...

    def write(self, task: str, rows: pa.Table) -> None:
        """Keep the rows of a finished task."""
        ...


class MemorySink:
    """Keeps the rows in memory."""

    def __init__(self) -> None:
        self.tables: dict[str, pa.Table] = {}
        self._verified: pa.Table | None = None

    def record(self) -> dict[str, Any] | None:
        """Nothing is there before the sweep begins."""
        return None

    def create(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record, as a file would give it back."""
        return json.loads(to_text(record))

    def finished(self) -> set[str]:
        """Names of the tasks that are done."""
        return set(self.tables)

    def write(self, task: str, rows: pa.Table) -> None:
        """Keep the rows of a finished task."""
        self.tables[task] = rows

    def verified(self) -> pa.Table | None:
        """The exact rows of a screened sweep."""
        return self._verified

    def write_verified(self, rows: pa.Table) -> None:
        """Keep the exact rows of a screened sweep."""
        self._verified = rows


class FolderSink:
    """A folder on any disk, network disks included.

    Args:
        folder: it is made when it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def record(self) -> dict[str, Any] | None:
        """What is known of a sweep that is there already.

        Raises:
            InputError: the folder holds something else, or the record is damaged.
        """
        return read_record(self.folder, missing_ok=True)

    def create(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a sweep; gives the record that is there, which may be that of another process.

        Raises:
            InputError: the folder cannot be written.
        """
        with self._writing():
            (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
            # Another process may have begun it: the first one's record stays.
            with contextlib.suppress(FileExistsError), replaced(self.folder / RECORD, exclusive=True) as temporary:
                temporary.write_text(to_text(record), encoding="utf-8")
        found = self.record()
        assert found is not None
        return found

    def finished(self) -> set[str]:
        """Names of the tasks that are done."""
        try:
            names = os.listdir(self.folder / SHARDS)
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise InputError(f"{self.folder / SHARDS} cannot be read ({error.strerror or error})") from error
        return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] != "."}

    def path(self, task: str) -> Path:
        """The file of a task."""
        return self.folder / SHARDS / f"{task}.parquet"

    def write(self, task: str, rows: pa.Table) -> None:
        """Write a shard as a whole or not at all.

        Raises:
            InputError: the disk is full or read-only; what was finished before is kept.
        """
        self._write(self.path(task), task, rows)

    def verified(self) -> pa.Table | None:
        """The exact rows of a screened sweep.

        Raises:
            InputError: the file is damaged.
        """
        path = self.folder / VERIFIED
        if not path.is_file():
            return None
        try:
            return read_sealed(path, self._verified_task())
        except Damage as damage:
            raise InputError(f"{path} is damaged ({damage}): run the same sweep again") from None

    def write_verified(self, rows: pa.Table) -> None:
        """Keep the exact rows of a screened sweep."""
        self._write(self.folder / VERIFIED, self._verified_task(), rows)

    def _verified_task(self) -> str:
        record = self.record()
        return f"{VERIFIED}-{None if record is None else record['identity']}"

    def _write(self, path: Path, task: str, rows: pa.Table) -> None:
        rows = Seal.of(task, rows).put_on(rows)
        with self._writing(), replaced(path) as temporary, open(temporary, "wb") as file:
            pq.write_table(rows, file, **PARQUET)
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Remove an earlier sweep.

        Raises:
            InputError: the folder cannot be written.
        """
        if (self.folder / RECORD).is_file() or (self.folder / SHARDS).is_dir():
            with self._writing():
                (self.folder / RECORD).unlink(missing_ok=True)
                (self.folder / VERIFIED).unlink(missing_ok=True)
                shutil.rmtree(self.folder / SHARDS, ignore_errors=True)

    def check_writable(self, *, force: bool = False) -> None:
        """Make sure, before any work is done, that the folder can be used; what killed processes have left is removed.

        Args:
            force: an earlier sweep there, even a damaged one, will be replaced.

        Raises:
            InputError: it is a file, holds something else, or cannot be written.
        """
        if not (force and (self.folder / RECORD).is_file()):
            self.record()
        with self._writing():
            place = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
            probe = place / temporary_name()
            try:
                probe.touch()
            finally:
                with contextlib.suppress(OSError):
                    probe.unlink(missing_ok=True)
            for folder in (self.folder, self.folder / SHARDS):
                remove_leftovers(folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk, a read-only folder, a file where a folder should be
            done = len(self.finished()) if (self.folder / SHARDS).is_dir() else 0
            kept = f"; {done} finished tasks are kept, the same call goes on from there" if done else ""
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror or error}): make room or choose another "
                f"folder (out=){kept}"
            ) from error


def read_record(folder: Path, *, missing_ok: bool = False) -> dict[str, Any] | None:
    """The content of a folder's ``sweep.json``.

    Raises:
        InputError: it is damaged, or the folder holds something else.
    """
    path = folder / RECORD
    try:
        if not path.is_file():
            if missing_ok and not _holds_something(folder):
                return None
            raise InputError(f"{folder} holds no {RECORD}: give the folder of a sweep")
        return parse_record(path.read_bytes(), FORMAT)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror or error}): choose another folder") from error
    except Damage as damage:
        raise InputError(
            f"{path} is damaged ({damage}): choose another folder, or replace it with force=True"
        ) from None


def to_text(record: Mapping[str, Any]) -> str:
    """A record as JSON, with its digest."""
    plain = json.loads(json.dumps(to_plain(record), allow_nan=False))
    return json.dumps({**plain, "digest": record_digest(plain)}, indent=1, ensure_ascii=False, allow_nan=False)


def _holds_something(folder: Path) -> bool:
    """Whether a folder has anything in it but what a killed or just beginning sweep leaves."""
    if not folder.exists():
        return False
    return any(path.name != SHARDS and not path.name.endswith(".tmp") for path in folder.iterdir())
