"""From arguments to a plan: everything is checked and resolved before any patch is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sinklens.engine.memory import row_budget
from sinklens.engine.run import run_patches
from sinklens.errors import InputError, NotApplicableError
from sinklens.formation import Formation, find_formation, formation_from_json, formation_to_json
from sinklens.models.view import Model, ModelShape, device_of, model_shape
from sinklens.pairs.pair import check_target
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.readouts.named import fingerprint, needs_answers
from sinklens.records.ranges import Range, numbers, parse
from sinklens.sites import LOGITS
from sinklens.stages import Stage
from sinklens.stages.base import Setting
from sinklens.sweeps.grid import Grid, Tasks
from sinklens.sweeps.places import Place, axis_of, check_units, window_starts
from sinklens.sweeps.plan import FORMAT, ModelSpec, Plan, digest, formation_key, make_pair
from sinklens.sweeps.request import Request, check_positions, edit_name

READOUT_BLOCKS = 4
"""Blocks that readouts read by default: the first after formation, or the last."""
ESTIMATES = 1 << 14
"""Patches in a task where they are estimated."""
PATCHES = 1024
"""Patches in a task by default, on a GPU."""
CPU_ROWS = 512
"""Patched rows in a task by default, on a CPU. A task is what is lost when a process is killed: seconds of work."""
GROUP_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""What is kept of a group of prompts may take so much; fixed, so that groups do not depend on what else runs."""


def choices_of(request: Request, model: Model, batch: PromptBatch, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was chosen as JSON holds it, with the digests of model and prompts.

    Raises:
        InputError: a range beyond the model or the prompts.
    """
    shape = model_shape(model)
    check_positions(request, batch.length)
    if isinstance(request.target, int):
        check_target(batch, request.target)
    positions = request.positions
    at_target = isinstance(positions, str) and positions.strip() == "target"
    of = f"the positions of prompts of {batch.length} tokens"
    readout_layers = request.readout_layers
    if not (isinstance(readout_layers, str) and readout_layers.strip() in ("formation", "last")):
        readout_layers = list(numbers("readout_layers", readout_layers, shape.n_layers, "the model's blocks"))
    answers = request.answers
    if answers is not None:
        answers = [_check_answers(tokens, batch, shape) for tokens in answers]
    return {
        "stages": [_place_key(place) for place in request.stages],
        "layers": list(window_starts(request.layers, request.window, shape.n_layers)),
        "window": request.window,
        "positions": "target" if at_target else list(numbers("positions", positions, batch.length, of)),
        "units": _units_key(request.units),
        "edits": [edit if isinstance(edit, str) else [edit.name, edit.fingerprint()] for edit in request.edits],
        "directions": _directions(request),
        "target": request.target,
        "pair": "natural" if request.target == "natural" else request.pair,
        "strength": request.strength if request.pair == "amplify_variance" else None,
        "pair_layers": None if request.pair_layers is None else list(request.pair_layers),
        "formation": None if request.formation is None else formation_key(request.formation),
        "readouts": [fingerprint(readout) for readout in request.readouts],
        "readout_layers": readout_layers,
        "answers": answers,
        "eps": request.eps,
        "min_gap": request.min_gap,
        "method": request.method,
        **({"top": request.top, "sample": request.sample} if request.method == "screen" else {}),
        "seed": request.seed,
        **{name: origin[name] for name in ("model", "weight_digest", "dtype")},
        "prompts": batch.source,
        "prompts_digest": origin["prompts_digest"],
        "n_prompts": batch.n,
        "length": batch.length,
        **_sizes(request, model, batch),
    }


def _sizes(request: Request, model: Model, batch: PromptBatch) -> dict[str, int]:
    """How the grid is cut: as was asked for, else by method and device."""
    group = request.group_size or default_group(model, model_shape(model), batch)
    usual = PATCHES if device_of(model).type == "cuda" else max(16, CPU_ROWS // group)
    if request.method != "exact":
        usual = ESTIMATES
    return {"group_size": group, "task_size": request.task_size or usual}


def default_group(model: Model, shape: ModelShape, batch: PromptBatch) -> int:
    """Prompts whose residual streams of two runs, and as much again for sources, fit in :data:`GROUP_BYTES`."""
    itemsize = next(model.parameters()).element_size()
    each = 4 * shape.n_layers * batch.length * shape.d_model * itemsize
    return max(1, min(batch.n, GROUP_BYTES.get(device_of(model).type, 1 << 30) // each))


def _place_key(place: Place) -> object:
    if isinstance(place, str):
        return place
    return place.name if isinstance(place, Stage) else [place.template, list(place.axes)]


def _units_key(units: Range | None) -> object:
    return units.strip() if isinstance(units, str) else None if units is None else list(parse("units", _text(units)))


def _text(units: Any) -> str:
    return str(units) if isinstance(units, int) else ",".join(map(str, units))


def _directions(request: Request) -> list[str]:
    allowed = ["noise"] if request.target == "natural" else ["denoise", "noise"]
    return allowed if request.directions is None else list(request.directions)


def _check_answers(tokens: Sequence[int], batch: PromptBatch, shape: ModelShape) -> list[int]:
    found = [int(token) for token in tokens]
    if len(found) != batch.n or not all(0 <= token < shape.d_vocab for token in found):
        raise InputError(f"answers must be two lists of {batch.n} token ids below {shape.d_vocab}, one for each prompt")
    return found


def new_record(
    request: Request,
    choices: Mapping[str, Any],
    model: Model,
    batch: PromptBatch,
    origin: Mapping[str, Any],
    memory_budget: int | None,
) -> dict[str, Any]:
    """What ``sweep.json`` holds: the choices, and what is found in the model before the sweep begins.

    Raises:
        NoSinkError: the model has no sink on these prompts, and no formation was given.
        InputError: the choices do not fit the model.
    """
    formation = request.formation or find_formation(model, batch, memory_budget=memory_budget)
    if len(formation.sink_positions) != batch.n:
        raise InputError(f"the formation was found on {len(formation.sink_positions)} prompts, and there are {batch.n}")
    answers = choices["answers"]
    if answers is None and needs_answers(tuple(request.readouts)):
        answers = top_two(model, batch, memory_budget)
    grid = make_grid(request, choices, model, batch, formation, memory_budget)
    tasks = Tasks(grid.n_patches, batch.n, choices["group_size"], choices["task_size"])
    found = {"formation": formation_key(formation), "answers": answers, "stages": [repr(axis) for axis in grid.stages]}
    return {
        "format": FORMAT,
        "identity": digest({"format": FORMAT, "choices": choices, "found": found}),
        "choices": dict(choices),
        "tasks": {**vars(tasks), "n_tasks": len(tasks), "n_cells": grid.n_patches * batch.n * len(request.readouts)},
        "answers": answers,
        "readout_layers": list(layers_read(choices["readout_layers"], model_shape(model), formation)),
        "formation": formation_to_json(formation),
        "provenance": dict(origin),
    }


def plan_from(
    record: Mapping[str, Any],
    request: Request,
    model: Model,
    batch: PromptBatch,
    memory_budget: int | None,
    model_spec: ModelSpec | None = None,
) -> Plan:
    """The plan of a sweep whose record is there."""
    choices, formation = record["choices"], formation_from_json(record["formation"])
    answers = record["answers"]
    sizes = {name: record["tasks"][name] for name in ("n_patches", "n_prompts", "group_size", "task_size")}
    return Plan(
        choices=choices,
        grid=make_grid(request, choices, model, batch, formation, memory_budget),
        tasks=Tasks(**sizes),
        batch=batch,
        formation=formation,
        target=choices["target"],
        pair=choices["pair"],
        edits=tuple(request.edits),
        readouts=tuple(request.readouts),
        readout_layers=tuple(record["readout_layers"]),
        answers=None if answers is None else (tuple(answers[0]), tuple(answers[1])),
        identity=record["identity"],
        model_spec=model_spec,
    )


def make_grid(
    request: Request,
    choices: Mapping[str, Any],
    model: Model,
    batch: PromptBatch,
    formation: Formation,
    memory_budget: int | None,
) -> Grid:
    """All axes of the sweep."""
    rows = row_budget(model, batch.length, memory_budget)
    pair = make_pair(model, batch, formation, choices, rows)
    read = layers_read(choices["readout_layers"], model_shape(model), formation)
    setting = Setting(model, batch, formation, pair, read, rows)
    axes = [axis_of(place, setting, choices["layers"], request.window, request.units) for place in request.stages]
    check_units(axes, request.units)
    positions = choices["positions"]
    return Grid(
        stages=tuple(axes),
        directions=tuple(choices["directions"]),
        edits=tuple(edit_name(edit) for edit in request.edits),
        positions=None if positions == "target" else tuple(positions),
        window=request.window,
    )


def layers_read(given: Any, shape: ModelShape, formation: Formation) -> tuple[int, ...]:
    """Blocks that the readouts read.

    Raises:
        NotApplicableError: the sink forms in the last block, and no other blocks were given.
    """
    if given == "last":
        return tuple(range(max(0, shape.n_layers - READOUT_BLOCKS), shape.n_layers))
    if given != "formation":
        return tuple(given)
    first = formation.layer + 1
    if first >= shape.n_layers:
        raise NotApplicableError(
            f"block {formation.layer} is the model's last: no later block attends to the sink it forms"
        )
    return tuple(range(first, min(first + READOUT_BLOCKS, shape.n_layers)))


def top_two(model: Model, batch: PromptBatch, memory_budget: int | None) -> list[list[int]]:
    """The clean model's two most probable next tokens after every prompt: the answer and the alternative."""
    n_layers = model_shape(model).n_layers

    def rank(place: Literal[0, 1]) -> Readout:
        return Readout(
            f"top{place}",
            LOGITS,
            (n_layers,),
            lambda x, _: x[:, -1].float().topk(2, -1).indices[:, place],
            lambda stack: stack[0].double(),
        )

    found = run_patches(model, batch, [], [rank(0), rank(1)], memory_budget=memory_budget)
    return [[int(token) for token in found.runs["base"][f"top{place}"]] for place in (0, 1)]
