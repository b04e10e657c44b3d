"""The result of a sweep: a table that need not fit in memory, its summary, and tensors cut from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as _compute
import pyarrow.dataset as ds
import torch

from sinklens.errors import InputError
from sinklens.formation import Formation, formation_from_json
from sinklens.pairs import is_natural
from sinklens.records.summaries import html, some, summary
from sinklens.sweeps.grid import Tasks
from sinklens.sweeps.judging import judge
from sinklens.sweeps.reading import FileShards, FolderShards, Shards, record_of_file
from sinklens.sweeps.schema import CELL
from sinklens.sweeps.store import FolderSink, read_record
from sinklens.sweeps.tensor import LabelledTensor

_PC: Any = _compute  # its functions are made at import, where no type checker sees them
TENSOR_AXES = ("stage", "layer", "position", "unit", "edit", "direction", "prompt")
ROWS_AT_ONCE = 1 << 21
"""Rows that are in memory at once while a sweep is summed up."""
SHOWN_CELLS = 2_000_000
"""A notebook shows no overview of more: it would have to be summed up first."""
PLACE = ("layer", "window", "position", "unit")
Value = Literal["effect", "value", "change", "base", "anchored"]


@dataclass(frozen=True, eq=False)
class SweepResult:
    """A sweep's rows, and the record of what it was."""

    record: Mapping[str, Any]
    """What ``sweep.json`` holds: choices, tasks, formation, provenance."""
    shards: Shards
    """The rows, by task."""
    folder: Path | None = None
    """Where they are; ``None``: in memory."""
    exact_rows: pa.Table | None = None
    """Of a screened sweep in memory, the rows that were run exactly."""

    @classmethod
    def load(cls, path: str | Path) -> SweepResult:
        """Read a sweep's folder, or a file that ``sinklens gather`` has written; an unfinished sweep has fewer rows.

        Raises:
            InputError: it is neither.
        """
        path = Path(path).expanduser()
        if path.is_file():
            return cls(record_of_file(path), FileShards(path), path)
        record = read_record(path)
        assert record is not None
        return cls(record, FolderShards(path), path)

    @property
    def config(self) -> Mapping[str, Any]:
        """Everything that was chosen, with the digests of model and prompts."""
        return self.record["choices"]

    def __repr__(self) -> str:
        config, tasks = self.config, self.record["tasks"]
        names = {what: some(_names(config[what])) for what in ("stages", "edits", "readouts")}
        missing = len(self.missing)
        return summary(
            self,
            config["method"],
            *(f"{what} {listed}" for what, listed in names.items()),
            f"{tasks['n_patches']:,} patches x {tasks['n_prompts']:,} prompts",
            f"{missing:,} of {len(self._all):,} tasks missing" if missing else "",
            "" if self.folder is None else str(self.folder),
        )

    def _repr_html_(self) -> str:
        if self.record["tasks"]["n_cells"] > SHOWN_CELLS:
            return html(f"{self!r}; overview() has a table")
        try:
            return html(repr(self), self.overview())
        except InputError as error:  # a damaged shard
            return html(f"{self!r}: {error}")

    @cached_property
    def formation(self) -> Formation:
        """Where the sink forms."""
        return formation_from_json(self.record["formation"])

    @cached_property
    def _all(self) -> Tasks:
        names = ("n_patches", "n_prompts", "group_size", "task_size")
        return Tasks(**{name: self.record["tasks"][name] for name in names})

    def _ids(self, numbers: Sequence[int]) -> list[str]:
        return [self._all.id(number, self.record["identity"]) for number in numbers]

    def task_ids(self) -> list[str]:
        """Names of all tasks, finished or not, in order."""
        return self._ids(range(len(self._all)))

    @cached_property
    def _there(self) -> list[str]:
        done = self.shards.tasks()
        return [task for task in self.task_ids() if task in done]

    @property
    def _keys(self) -> list[str]:
        """Columns that tell cells apart: not the position, where every prompt has its own."""
        own = self.config["positions"] == "target" and is_natural(self.config)
        return [name for name in CELL if not (own and name == "position")]

    @property
    def missing(self) -> list[int]:
        """Numbers of the tasks that are not finished."""
        done = self.shards.tasks()
        return [number for number, task in enumerate(self.task_ids()) if task not in done]

    @property
    def dataset(self) -> ds.Dataset:
        """All rows as a ``pyarrow.dataset``: it streams, filters and selects without reading everything."""
        return self.shards.dataset(self._there)

    @cached_property
    def table(self) -> pd.DataFrame:
        """All rows as a table in memory, in the grid's order."""
        return to_pandas(self.shards.read(self._there))

    @property
    def verified(self) -> pd.DataFrame | None:
        """Of a screened sweep, the rows that were run exactly: columns as in :attr:`table`, where ``effect`` is exact,
        and those of :data:`sinklens.sweeps.screening.VERIFIED`; ``None`` where nothing was.
        """
        rows = self.exact_rows
        if rows is None and self.folder is not None and self.folder.is_dir():
            rows = FolderSink(self.folder).verified()
        return None if rows is None else to_pandas(rows)

    def judged(self) -> pd.DataFrame:
        """Of a screened sweep, how well its estimates rank the exact effects of the random sample; a row a readout.

        Columns: ``n`` patches; ``spearman``, ``spearman_size`` (of absolute values) and ``kendall`` with ``_low`` and
        ``_high``, bootstraps over the sample's patches; ``largest_missed``, the largest absolute exact effect in the
        sample that is not among the top.

        Raises:
            InputError: nothing was run exactly.
        """
        if (verified := self.verified) is None:
            raise InputError("no cell of this sweep was run beside its estimate: sweep with method='screen'")
        return judge(verified, self.config["seed"])

    def __len__(self) -> int:
        return self.dataset.count_rows()

    def cells(self) -> Iterator[pd.DataFrame]:
        """Means over prompts, some cells of the grid at a time, so that a sweep of any size can be gone through.

        Columns: those that tell cells apart, ``effect`` with its standard deviation ``effect_std``, ``value``, ``n``
        (prompts in the mean) and ``n_excluded`` (where the pair moves the readout too little to divide by).
        """
        done, tasks = self.shards.tasks(), self._all
        each = tasks.task_size * tasks.n_prompts * len(self.config["readouts"])
        step = max(1, ROWS_AT_ONCE // each)
        for first in range(0, tasks.per_group, step):
            # A cell's prompts are in tasks of several groups: these are read together.
            parts = range(first, min(first + step, tasks.per_group))
            numbers = [group * tasks.per_group + part for part in parts for group in range(tasks.n_groups)]
            chosen = [task for task in self._ids(numbers) if task in done]
            if chosen:
                yield _means(self.shards.read(chosen, [*self._keys, "effect", "value"]), self._keys)

    def summary(self) -> pd.DataFrame:
        """Means over prompts of every cell (see :meth:`cells`)."""
        return pd.concat([*self.cells()] or [self._no_cells()], ignore_index=True)

    def n_nonfinite(self) -> int:
        """Rows in which the patched run's readout was not a finite number; their value and effect are NaN."""
        return self.dataset.count_rows(filter=_PC.is_nan(_PC.field("value")))

    def _no_cells(self) -> pd.DataFrame:
        return _means(self.shards.read([], [*self._keys, "effect", "value"]), self._keys)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The cells with the largest mean effects, of either sign."""
        best = pd.DataFrame()
        for part in self.cells():
            both = pd.concat([best, part], ignore_index=True) if len(best) else part
            best = both.loc[both.effect.abs().nlargest(n).index]
        return best.reset_index(drop=True)

    def overview(self) -> pd.DataFrame:
        """By stage, edit, direction and readout: number of cells, mean effect, and the strongest with its place."""
        keys = ["stage", "edit", "direction", "readout"]
        parts = [
            part.groupby(keys, observed=True, sort=False).apply(_strongest, include_groups=False).reset_index()
            for part in self.cells()
        ]
        if not parts:
            return pd.DataFrame(columns=[*keys, "cells", "effect", "strongest"])
        joined = pd.concat(parts, ignore_index=True)
        rows = joined.groupby(keys, observed=True, sort=False).apply(_joined_strongest, include_groups=False)
        return rows.reset_index()

    def to_tensor(self, readout: str | None = None, value: Value = "effect") -> LabelledTensor:
        """The sweep as a tensor ``[stage layer position unit edit direction prompt]``; NaN where the grid has no cell.

        Args:
            readout: which; may be left out when there is one.
            value: ``effect``, ``value``, ``base``, ``anchored``, or ``change``: the value less that of the run that
                was patched.

        Raises:
            InputError: an unknown readout or value.
        """
        readout = self.readout(readout)
        wanted = {"change": ["value", "base", "anchored"]}.get(value, [value])
        if value not in ("effect", "value", "change", "base", "anchored"):
            raise InputError(f"value {value!r}: choose effect, value, change, base or anchored")
        columns = [*TENSOR_AXES, *wanted]
        found = self.dataset.to_table(columns=columns, filter=_PC.field("readout") == readout)
        frame = to_pandas(found)
        codes, coords = [], {}
        for axis in TENSOR_AXES:
            # Names in the grid's order, numbers ascending, and no unit (all at once) before any unit.
            ordered = frame[axis].cat.categories if axis in ("stage", "edit", "direction") else None
            codes_here, coords[axis] = _codes(pd.Series(frame[axis]), ordered)
            codes.append(codes_here)
        if "position" not in self._keys:
            codes[TENSOR_AXES.index("position")][:] = 0
            coords["position"] = ("target",)
        values = _values(frame, value)
        tensor = torch.full(tuple(len(coords[axis]) for axis in TENSOR_AXES), torch.nan, dtype=torch.float64)
        tensor[tuple(torch.from_numpy(code) for code in codes)] = torch.from_numpy(values)
        return LabelledTensor(tensor, TENSOR_AXES, coords, value, {"readout": readout})

    def readout(self, readout: str | None = None) -> str:
        """Name of a readout of this sweep; the only one need not be named.

        Raises:
            InputError: there is none of that name, or several and no name.
        """
        names = _names(self.config["readouts"])
        if readout is None and len(names) == 1:
            return names[0]
        if readout is None or readout not in names:
            raise InputError(f"readout {readout!r}: choose {', '.join(names)}")
        return readout


def _names(recorded: Sequence[str | Sequence[Any]]) -> list[str]:
    """The names in a record, where things of the user's stand with more than that."""
    return [item if isinstance(item, str) else str(item[0]) for item in recorded]


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A table in pandas: names as categories, units as nullable integers."""
    frame = table.unify_dictionaries().to_pandas()
    if "unit" in frame:
        frame["unit"] = frame["unit"].astype("Int32")
    return frame


def _means(rows: pa.Table, keys: list[str]) -> pd.DataFrame:
    effect = rows["effect"]
    effect = _PC.if_else(_PC.is_nan(effect), pa.scalar(None, pa.float64()), effect)
    rows = rows.set_column(rows.schema.get_field_index("effect"), "effect", effect).unify_dictionaries()
    counted = [
        ("effect", "mean"),
        ("effect", "stddev", _PC.VarianceOptions(ddof=1)),
        ("value", "mean"),
        ("effect", "count"),
        ("effect", "count", _PC.CountOptions("only_null")),
    ]
    found = rows.group_by(keys, use_threads=False).aggregate(counted)
    return to_pandas(found.rename_columns([*keys, "effect", "effect_std", "value", "n", "n_excluded"]))


def _strongest(cells: pd.DataFrame) -> pd.Series:
    where = cells.effect.abs().idxmax() if cells.effect.notna().any() else cells.index[0]
    best = cells.loc[where]
    counted = int(cells.effect.notna().sum())
    found = {"cells": len(cells), "effect": cells.effect.mean(), "counted": counted, "strongest": best.effect}
    return pd.Series({**found, **{name: best[name] for name in PLACE if name in cells}}, dtype=object)


def _joined_strongest(parts: pd.DataFrame) -> pd.Series:
    strongest = parts.strongest.astype(float)
    best = parts.loc[strongest.abs().idxmax() if strongest.notna().any() else parts.index[0]]
    counted = parts.counted.sum()
    mean = (parts.effect.fillna(0) * parts.counted).sum() / counted if counted else np.nan
    found = {"cells": int(parts.cells.sum()), "effect": mean, "strongest": best.strongest}
    return pd.Series({**found, **{name: best[name] for name in PLACE if name in parts}}, dtype=object)


def _codes(column: pd.Series, ordered: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
    if ordered is not None:
        present = [name for name in ordered if (column == name).any()]
        return pd.Categorical(column, categories=present).codes.astype(np.int64), tuple(present)
    numbers = sorted(int(x) for x in column.dropna().unique())
    coords: tuple[Any, ...] = (*((None,) if column.isna().any() else ()), *numbers)
    shift = len(coords) - len(numbers)
    codes = np.searchsorted(np.asarray(numbers), column.fillna(-1).to_numpy(dtype=np.int64)) + shift
    codes[column.isna().to_numpy()] = 0
    return codes, coords


def _values(frame: pd.DataFrame, value: str) -> np.ndarray:
    if value != "change":
        return frame[value].to_numpy(dtype=np.float64).copy()
    start = np.where(frame.direction == "denoise", frame.base, frame.anchored)
    return frame.value.to_numpy(dtype=np.float64) - start
