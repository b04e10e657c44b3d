"""What is asked of a sweep, and the mistakes in it that can be told before any model is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sinklens.edits import Edit
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.pairs.ablations import check_edit
from sinklens.readouts.named import ReadoutLike, check_readout, readout_name
from sinklens.records.ranges import Range, numbers, parse
from sinklens.sweeps.places import Place, find_place, place_name

Answers = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of :func:`sinklens.sweep` that say what is swept."""

    stages: Sequence[Place]
    layers: Range = "all"
    window: int = 1
    positions: Range = "target"
    units: Range | None = None
    edits: Sequence[str | Edit] = ("transplant",)
    directions: Sequence[str] | None = None
    target: int | str = 10
    pair: str = "block_aggregation"
    strength: float = 8.0
    pair_layers: Sequence[int] | None = None
    formation: Formation | None = None
    readouts: Sequence[ReadoutLike] = ("attention_received",)
    readout_layers: Range = "formation"
    answers: Answers | None = None
    eps: float = 0.3
    min_gap: float = 0.01
    method: str = "exact"
    top: int = 200
    sample: int = 200
    seed: int = 0
    task_size: int | None = None
    group_size: int | None = None


def check_request(request: Request, length: int | None = None) -> None:
    """Refuse what is wrong whatever the model, before any work.

    Raises:
        InputError: with what is wrong.
    """
    for name, items in (("stages", request.stages), ("edits", request.edits), ("readouts", request.readouts)):
        if isinstance(items, str) or not items:
            raise InputError(f"{name} must be a list with at least one entry")
    for place in request.stages:
        find_place(place)
    for edit in request.edits:
        check_edit(edit)
    for readout in request.readouts:
        check_readout(readout)
    _check_names("stages", [place_name(place) for place in request.stages])
    _check_names("edits", [edit_name(edit) for edit in request.edits])
    _check_names("readouts", [readout_name(readout) for readout in request.readouts])
    _check_ranges(request)
    _check_directions(request)
    for name, value in (("task_size", request.task_size), ("group_size", request.group_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if request.top < 1 or request.sample < 3:
        raise InputError(f"top {request.top} must be at least 1, and sample {request.sample} at least 3")
    if not request.min_gap >= 0:
        raise InputError(f"min_gap {request.min_gap} must be 0 or more")
    if isinstance(request.target, str) and request.target != "natural":
        raise InputError(f"target {request.target!r} must be a position, or natural")
    if length is not None:
        check_positions(request, length)


def _check_names(what: str, names: Sequence[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{what}: {min(twice)} is given twice")


def _check_ranges(request: Request) -> None:
    named = {"layers": ("all",), "positions": ("all", "target"), "readout_layers": ("all", "formation", "last")}
    for name, words in named.items():
        given = getattr(request, name)
        if isinstance(given, str) and given.strip() not in words:
            parse(name, given)


def _check_directions(request: Request) -> None:
    for name in request.directions or ():
        if name not in ("denoise", "noise"):
            raise InputError(f"direction {name!r}: choose denoise or noise")
        if name == "denoise" and request.target == "natural":
            raise InputError("target natural can only be noised: there is no run without that sink to denoise")
    if request.directions is not None and not request.directions:
        raise InputError("directions must be denoise, noise, or both")
    _check_names("directions", list(request.directions or ()))


def check_positions(request: Request, length: int) -> None:
    """Make sure that the prompts have these positions.

    Raises:
        InputError: they do not.
    """
    if not isinstance(request.positions, str) or request.positions.strip() not in ("all", "target"):
        numbers("positions", request.positions, length, f"the positions of prompts of {length} tokens")


def edit_name(edit: str | Edit) -> str:
    """The name that the table has for an edit."""
    return edit if isinstance(edit, str) else edit.name
