"""What the tests of sweeps share: a formation for tiny models, a small sweep, and its cells run one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sinklens as sl
from sinklens.edits import Constant, Edit, Transplant
from sinklens.formation import Formation, FormationEvent, SuperNeuron
from sinklens.pairs.pair import SinkPair
from sinklens.patches import Patch, Source
from sinklens.prompts import PromptBatch, from_tokens
from sinklens.readouts.base import Readout
from sinklens.sites import HookSite
from sinklens.sweeps import SweepResult
from tests.helpers.one_at_a_time import OneAtATime, cache_of
from tests.helpers.tiny import tiny_tokens

N, LENGTH, TARGET = 3, 12, 4
EVENTS = tuple(FormationEvent(layer, *[1.0] * 6) for layer in (0, 1))
NEURONS = tuple(SuperNeuron(index, 1.0, 1.0, 1.0, 1.0) for index in (3, 7))
FORMATION = Formation(1, (0, 2, 1), NEURONS, (), EVENTS)
ORDER = ["stage", "layer", "position", "unit", "edit", "direction", "readout", "prompt"]


def tiny_batch(model: Any, n: int = N, length: int = LENGTH) -> PromptBatch:
    return from_tokens(model, tiny_tokens(n, length))


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by cell, whatever the tasks were."""
    plain = table.astype({name: str for name in ("stage", "edit", "direction", "readout", "site", "task")})
    return plain.sort_values(ORDER).reset_index(drop=True)


def ordinary_activations(model: Any, batch: PromptBatch, pair: SinkPair, site: HookSite, layer: int) -> list[Any]:
    """For every prompt its activation at ordinary positions ``[place, unit, ...]``, from a full cache of one prompt."""
    caller = OneAtATime(model, batch.tokens, [], pair.runs)
    found = []
    for prompt in range(batch.n):
        name = site.at(layer)
        cache = cache_of(model, batch.tokens[prompt : prompt + 1], caller._roots(pair.without.run, prompt), {name})
        found.append(site.to_canonical(cache[name])[0][pair.ordinary[prompt].bool()])
    return found


def edit_of(name: str, site: HookSite, layers: tuple[int, ...], model: Any, batch: PromptBatch, pair: SinkPair) -> Edit:
    """A second way to the edit of that name (``resample`` excepted, which is drawn)."""
    if name == "transplant":
        return Transplant()
    if name == "zero":
        return Constant("zero")
    assert name == "mean"
    means = {layer: torch.cat(ordinary_activations(model, batch, pair, site, layer)).mean(0) for layer in layers}
    return Constant("mean", means)


def one_by_one(
    model: Any,
    batch: PromptBatch,
    pair: SinkPair,
    readouts: list[Readout],
    row: Any,
    site: HookSite,
    edit: Edit,
    also: tuple[Patch, ...] = (),
) -> float:
    """The value of one row of the table, by a full forward pass of one prompt."""
    run, source = pair.ends(row.direction)
    layers = tuple(range(row.layer, row.window + 1))
    units = None if pd.isna(row.unit) else (int(row.unit),)
    where = None if source.positions is None else Source(source.run, source.positions)
    used = (where or Source(source.run)) if edit.uses_source else None
    patch = Patch(site, layers, (int(row.position),), edit, units, run, used, allow_unchanged=True, also=also)
    names = [readout.name for readout in readouts]
    return OneAtATime(model, batch.tokens, readouts, pair.runs)(patch, int(row.prompt))[names.index(row.readout)]


OPTIONS: dict[str, Any] = {
    "stages": "z,resid_pre",
    "layers": "0-2",
    "positions": "3-5",
    "units": "heads",
    "target": TARGET,
    "formation": FORMATION,
    "task_size": 7,
    "group_size": 2,
    "min_gap": 0.0,
}


N_TASKS = 2 * 13


def run(model: Any, out: Path | None = None, **options: Any) -> SweepResult:
    return sl.sweep(model, tiny_batch(model), out=out, **{**OPTIONS, **options})


def written(folder: Path) -> dict[str, int]:
    """Shards, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.parquet")}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)
