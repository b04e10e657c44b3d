"""How a sweep is run: where, by whom and in what pieces. Numbers do not depend on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sinklens.engine.memory import check_limits, row_budget
from sinklens.engine.run import Progress
from sinklens.errors import InputError
from sinklens.models.view import Model
from sinklens.records.integers import whole_numbers
from sinklens.records.ranges import shown
from sinklens.sweeps.plan import ModelSpec, Plan
from sinklens.sweeps.ray.cluster import Cluster, cluster_of
from sinklens.sweeps.store import FolderSink, MemorySink

Planned = Callable[[Plan, Sequence[int]], None]
"""Called with the plan and the numbers of the pending tasks."""


@dataclass(frozen=True, eq=False)
class Execution:
    """The arguments of :func:`sinklens.sweep` that the numbers do not depend on."""

    engine: str
    """Who runs the tasks: ``local`` or ``ray``."""
    workers: int | None
    """For ``ray``: copies of the model."""
    gpus_per_worker: float | None
    """For ``ray``: GPUs of each."""
    threads_per_worker: int | None
    """For ``ray``: CPU threads of each."""
    ray_address: str | None
    """For ``ray``: a cluster that is there."""
    out: str | Path | None
    """Folder for the results; ``None``: memory."""
    shard: tuple[int, int] | None
    """``(i, n)``: every n-th task from the i-th on."""
    force: bool
    """Replace what an earlier sweep has left in the folder."""
    memory_budget: int | None
    """Bytes that the activations of one forward pass may take."""
    max_rows: int | None
    """Rows per forward pass, in place of the memory budget."""
    progress: Progress | None
    """Called with (rows done, rows in all)."""
    planned: Planned | None
    """Called before anything is run."""
    model_spec: ModelSpec | None
    """For ``ray``: how workers get the model."""

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Execution:
        """How the arguments of :func:`sinklens.sweep` want it.

        Raises:
            InputError: a shard that cannot be, a folder that is no path, limits that are no numbers of bytes or rows.
        """
        check_limits(arguments["memory_budget"], arguments["max_rows"])
        out, shard = arguments["out"], arguments["shard"]
        path = os.fspath(out) if isinstance(out, str | os.PathLike) else None
        if out is not None and (not isinstance(path, str) or not path.strip() or "\0" in path):
            raise InputError(f"out {shown(out)} must be the path of a folder")
        if shard is not None:
            shard = whole_numbers(shard, "shard")
            if len(shard) != 2 or not 1 <= shard[0] <= shard[1]:
                raise InputError(f"shard {'/'.join(map(str, shard))}: write I/N with I in 1-N, such as 1/4")
        given: dict[str, Any] = {field.name: arguments[field.name] for field in fields(Execution)}
        return Execution(**{**given, "shard": shard})

    @property
    def limits(self) -> dict[str, Any]:
        """What a forward pass may take."""
        return {"memory_budget": self.memory_budget, "max_rows": self.max_rows}

    def rows(self, model: Model, length: int) -> int:
        """Rows for one forward pass."""
        return self.max_rows or row_budget(model, length, self.memory_budget)

    def cluster(self) -> Cluster | None:
        """What the engine ``ray`` runs on; errors are those of :func:`sinklens.sweeps.ray.cluster.cluster_of`."""
        return cluster_of(
            self.engine,
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
            threads_per_worker=self.threads_per_worker,
            ray_address=self.ray_address,
            folder=self.out is not None,
        )

    def sink(self) -> MemorySink | FolderSink:
        """Where the rows go, made sure of.

        Raises:
            InputError: the folder holds something else or cannot be written.
        """
        if self.out is None:
            return MemorySink()
        sink = FolderSink(self.out)
        sink.check_writable(force=self.force)
        return sink
