"""The plan of a sweep: everything that its tasks need besides the model's weights, as picklable data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sinklens.errors import InputError
from sinklens.formation import Formation, formation_to_json
from sinklens.models.view import Model
from sinklens.pairs.pair import SinkPair
from sinklens.prompts import PromptBatch
from sinklens.sweeps.choices import Choices, formation_key
from sinklens.sweeps.grid import Grid, StageAxis, Tasks
from sinklens.sweeps.store import FORMAT

ModelSpec = Mapping[str, Any] | Callable[[], Model]
"""Arguments of :func:`sinklens.load_model`, or a function that returns the model."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in model and prompts for a sweep, besides what was chosen."""

    formation: Formation
    """Where the sink forms."""
    readout_layers: tuple[int, ...]
    """Blocks that the readouts read."""
    answers: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Answer and alternative of every prompt, for ``logit_diff``."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a worker needs to run any task of a sweep, besides the model."""

    choices: Choices
    """Everything that was chosen."""
    found: Found
    """What was found on the way."""
    grid: Grid
    """The axes."""
    companions: tuple[StageAxis, ...]
    """Where each companion edits."""
    tasks: Tasks
    """How the grid is cut."""
    batch: PromptBatch
    """The prompts."""
    identity: str
    """Digest of all that the numbers depend on."""
    pair: SinkPair | None
    """The two runs; a plan that was sent to another process has none, as it would be on the wrong device."""
    model_spec: ModelSpec | None = None
    """For workers that have to load the model."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pair": None}

    def task_id(self, index: int) -> str:
        """Name of a task."""
        return self.tasks.id(index, self.identity)

    def record(self) -> dict[str, Any]:
        """What ``sweep.json`` holds."""
        n_patches, found = self.grid.n_patches, self.found
        n_cells = n_patches * self.batch.n * len(self.choices.readouts)
        return {
            "format": FORMAT,
            "identity": self.identity,
            "choices": dict(self.choices.as_json),
            "tasks": {**vars(self.tasks), "n_tasks": len(self.tasks), "n_cells": n_cells},
            "answers": _lists(found.answers),
            "readout_layers": list(found.readout_layers),
            "formation": formation_to_json(found.formation),
            "provenance": dict(self.choices.origin),
        }


def identity_of(choices: Choices, found: Found, grid: Grid) -> str:
    """Digest of all that the numbers of a sweep depend on."""
    also = {
        "formation": formation_key(found.formation),
        "answers": _lists(found.answers),
        "stages": [repr(axis) for axis in grid.stages],
    }
    return digest({"format": FORMAT, "choices": choices.as_json, "found": also})


def digest(value: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], where: object) -> None:
    """Make sure that a folder holds the sweep that is asked for.

    Raises:
        InputError: with what differs.
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        told = "; ".join(f"{name} was {_brief(there.get(name))}, now {_brief(here.get(name))}" for name in names)
        raise InputError(f"{where} holds another sweep ({told}): choose another folder, or replace it with force=True")


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lists(answers: tuple[tuple[int, ...], tuple[int, ...]] | None) -> list[list[int]] | None:
    return None if answers is None else [list(tokens) for tokens in answers]
