"""What a run leaves besides models: ``lab.json``, ``loss.parquet`` and ``watch.parquet``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.errors import InputError
from sinklens.lab.data import Data
from sinklens.lab.settings import Settings
from sinklens.lab.watch import COLUMNS
from sinklens.models.decoder import Decoder
from sinklens.records.files import holds_something, remove_leftovers, replaced, write_json, writing
from sinklens.records.plain import to_plain
from sinklens.records.provenance import git_commit, versions

RECORD, LOSS, WATCH = "lab.json", "loss.parquet", "watch.parquet"
"""Names of the files."""
LOSS_COLUMNS = ("step", "tokens", "loss", "lr", "seconds")
DECIDES = ("settings", "data", "model")
"""Parts of the record that must be equal for a run to be gone on with."""


def begin(
    folder: Path, settings: Settings, data: Data, model: Decoder, decaying: list[str], more: dict[str, Any]
) -> None:
    """Write the record of a run that begins; or make sure that the one there is of the same configuration.

    Raises:
        InputError: it is of another (what differs), or the folder holds something else.
    """
    record = {
        "arm": folder.name,
        "settings": settings.recorded(),
        "data": data.described(),
        "model": model.described(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "decaying": decaying,
        **more,
        "versions": versions(),
        "commit": git_commit(),
    }
    record = json.loads(json.dumps(to_plain(record)))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    if not (folder / RECORD).is_file():
        if holds_something(folder):
            raise InputError(f"{folder} holds something that is no run of this lab: choose another folder (out=).")
        write_json(folder / RECORD, record)
        return
    there = read_record(folder)
    differs = [
        f"{name} is {there.get(part, {}).get(name)} there and {record[part].get(name)} here"
        for part in DECIDES
        for name in {**there.get(part, {}), **record[part]}
        if there.get(part, {}).get(name) != record[part].get(name)
    ]
    if differs:
        raise InputError(
            f"{folder} holds a run of another configuration ({'; '.join(differs)}): choose another folder (out=)."
        )


def read_record(folder: str | Path) -> dict[str, Any]:
    """``lab.json`` of a run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(folder).expanduser() / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: give the folder of a run of `sinklens train`.") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} is no record of a run.")
    return record


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return "finished" in read_record(folder)


def finish(folder: Path, seconds: float, tokens: int) -> None:
    """Write down that it has."""
    told = {"seconds": seconds, "tokens": tokens, "tokens_a_second": tokens / max(seconds, 1e-9)}
    write_json(folder / RECORD, {**read_record(folder), "finished": told})


class Curves:
    """The two tables of a run, kept in memory and written with every checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._losses: list[tuple[int, int, float, float, float]] = []
        self._watched: list[pd.DataFrame] = []
        if (folder / LOSS).is_file():
            self._losses = list(pd.read_parquet(folder / LOSS).itertuples(index=False, name=None))
        if (folder / WATCH).is_file():
            self._watched = [pd.read_parquet(folder / WATCH)]

    def cut(self, step: int) -> None:
        """Forget what was written down after ``step``, and of step 0 too if it is the beginning."""
        self._losses = [row for row in self._losses if row[0] <= step]
        watched: list[Any] = self._watched
        self._watched = [table[table.step <= step] for table in watched if step]

    def add_loss(self, step: int, tokens: int, loss: float, lr: float, seconds: float) -> None:
        """One step."""
        self._losses.append((step, tokens, loss, lr, seconds))

    def add_watch(self, table: pd.DataFrame) -> None:
        """What was measured at one step."""
        self._watched.append(table)

    def loss(self) -> pd.DataFrame:
        """The losses."""
        return pd.DataFrame(self._losses, columns=list(LOSS_COLUMNS))

    def watch(self) -> pd.DataFrame:
        """The measures."""
        return pd.concat(self._watched, ignore_index=True) if self._watched else pd.DataFrame(columns=list(COLUMNS))

    def write(self) -> None:
        """Write both."""
        for name, table in ((LOSS, self.loss()), (WATCH, self.watch())):
            with writing(self._folder / name), replaced(self._folder / name) as path:
                table.to_parquet(path, index=False)
