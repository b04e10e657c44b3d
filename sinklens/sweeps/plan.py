"""The plan of a sweep: everything that its tasks need besides the model's weights, as plain picklable data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sinklens.edits import Edit
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.models.view import Model
from sinklens.pairs.pair import PairKind, SinkPair, induced_pair, natural_pair
from sinklens.prompts import PromptBatch
from sinklens.readouts.named import ReadoutLike
from sinklens.sweeps.grid import Grid, Tasks

ModelSpec = Mapping[str, Any] | Callable[[], Model]
"""Arguments of :func:`sinklens.load_model`, or a function that returns the model."""
FORMAT = 1
"""Of ``sweep.json`` and of the shards."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a worker needs to run any task of a sweep, besides the model."""

    choices: Mapping[str, Any]
    """Everything that was chosen, and the digests of model and prompts, as JSON holds it."""
    grid: Grid
    """Its axes."""
    tasks: Tasks
    """How it is cut."""
    batch: PromptBatch
    """The prompts."""
    formation: Formation
    """Where the sink forms."""
    target: int | str
    """Position that is made a sink, or ``natural``."""
    pair: PairKind
    """How it is made."""
    edits: tuple[str | Edit, ...]
    """Edits by name, or edits."""
    readouts: tuple[ReadoutLike, ...]
    """Readouts by name, or readouts."""
    readout_layers: tuple[int, ...]
    """Blocks that the readouts read."""
    answers: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Answer and alternative of every prompt, for ``logit_diff``."""
    identity: str
    """Digest of all that the numbers depend on."""
    model_spec: ModelSpec | None = None
    """For workers that have to load the model."""

    def task_id(self, index: int) -> str:
        """Name of a task."""
        return self.tasks.id(index, self.identity)

    def make_pair(self, model: Model, max_rows: int) -> SinkPair:
        """The two runs, on all prompts."""
        return make_pair(model, self.batch, self.formation, self.choices, max_rows)


def make_pair(
    model: Model, batch: PromptBatch, formation: Formation, choices: Mapping[str, Any], max_rows: int
) -> SinkPair:
    """The pair that was chosen."""
    if choices["target"] == "natural":
        return natural_pair(batch, formation, choices["seed"])
    layers = choices["pair_layers"]
    return induced_pair(
        model,
        batch,
        formation,
        choices["target"],
        kind=choices["pair"],
        strength=choices["strength"],
        layers=None if layers is None else tuple(layers),
        seed=choices["seed"],
        max_rows=max_rows,
    )


def digest(value: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def formation_key(formation: Formation) -> dict[str, Any]:
    """What the numbers of a sweep depend on in a formation."""
    return {
        "layer": formation.layer,
        "first": formation.first,
        "sink_positions": list(formation.sink_positions),
        "neurons": sorted(formation.neurons),
        "dims": sorted(formation.dims),
    }


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], where: object) -> None:
    """Make sure that a folder holds the sweep that is asked for.

    Raises:
        InputError: with what differs.
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        told = "; ".join(f"{name} was {_brief(there.get(name))}, now {_brief(here.get(name))}" for name in names)
        raise InputError(f"{where} holds another sweep ({told}): choose another folder, or replace it with --force")


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
