"""``sinklens gather``: the shards of a sweep, from one folder or several, as one Parquet file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from sinklens.engine.run import Progress
from sinklens.errors import InputError
from sinklens.records.files import replaced
from sinklens.records.plain import to_plain
from sinklens.records.ranges import spans
from sinklens.sweeps.plan import check_same
from sinklens.sweeps.reading import METADATA, read_shard
from sinklens.sweeps.result import SweepResult
from sinklens.sweeps.schema import SCHEMA
from sinklens.sweeps.seal import UNREADABLE, Damage, Seal, digest_of
from sinklens.sweeps.store import RECORD, SHARDS, VERIFIED, FolderSink


def gather(folders: Sequence[str | Path], out: str | Path, *, progress: Progress | None = None) -> SweepResult:
    """Join the shards of folders that hold parts of one sweep; rows are in the grid's order.

    Args:
        folders: one, or several that different machines have written.
        out: the Parquet file to write, whole or not at all.
        progress: called with (tasks joined, tasks in all).

    Raises:
        InputError: a folder holds another sweep, tasks are missing, a shard is damaged, or ``out`` is a folder or
            cannot be written.
    """
    place = Path(out).expanduser()
    if os.path.isdir(place):  # an empty name, which is the working folder, too
        raise InputError(f"{place} is a folder: give a file for the rows, such as {place / 'sweep.parquet'}")
    results = [SweepResult.load(folder) for folder in folders]
    if not results:
        raise InputError("give at least one folder of a sweep")
    first = results[0]
    for folder, other in zip(folders[1:], results[1:], strict=True):
        check_same(first.config, other.config, folder)
        if other.record["identity"] != first.record["identity"]:
            raise InputError(f"{folder} found another formation than {folders[0]}: give both the same one, or run anew")
    paths = _paths(first, folders)
    _write(first, paths, place, progress)
    return SweepResult.load(out)


def _paths(result: SweepResult, folders: Sequence[str | Path]) -> dict[str, Path]:
    """Where each task's shard is.

    Raises:
        InputError: somewhere none is.
    """
    sinks = [FolderSink(folder) for folder in folders]
    done = [sink.finished() for sink in sinks]
    paths, missing = {}, []
    for index, task in enumerate(result.task_ids()):
        place = next((sink for sink, tasks in zip(sinks, done, strict=True) if task in tasks), None)
        if place is None:
            missing.append(index)
        else:
            paths[task] = place.path(task)
    if missing:
        total, told = len(missing) + len(paths), spans(missing, "-", most=8)
        raise InputError(
            f"{len(missing)} of {total} tasks are missing (numbers {told}): run the sweep again on any of the folders "
            "to fill them, then gather"
        )
    return paths


def _write(result: SweepResult, paths: dict[str, Path], out: Path, progress: Progress | None) -> None:
    if not out.name or out.is_dir() or out.name in (RECORD, VERIFIED) or out.resolve().parent.name == SHARDS:
        raise InputError(f"{out} is a folder, or a file of a sweep: give another file, such as joined.parquet")
    seals = [asdict(_seal(path)) for path in paths.values()]
    record = json.dumps(
        to_plain({"record": result.record, "seals": seals, "digest": digest_of(seals)}), ensure_ascii=False
    )
    schema = SCHEMA.with_metadata({METADATA: record.encode()})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for number, path in enumerate(paths.values(), start=1):
                rows = read_shard(path).replace_schema_metadata(schema.metadata)
                writer.write_table(rows, row_group_size=max(1, len(rows)))  # a row group is a task
                if progress is not None:
                    progress(number, len(paths))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror or error}): choose another file (out=)") from error


def _seal(path: Path) -> Seal:
    """The seal of a shard; whether its rows fit is seen when they are read.

    Raises:
        InputError: it has none.
    """
    try:
        return Seal.read(pq.read_schema(path).metadata)
    except (*UNREADABLE, Damage) as error:
        raise InputError(f"{path} is damaged: remove that file and run the sweep again, which fills it") from error
