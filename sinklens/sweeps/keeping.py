"""What a folder can know of a sweep: only what it knows can be compared when the sweep is taken up there."""

from __future__ import annotations

from sinklens.errors import InputError
from sinklens.models.state import check_bare
from sinklens.models.view import Model
from sinklens.pairs.ablations import EditLike
from sinklens.readouts.named import ReadoutLike, readout_name
from sinklens.records.fingerprint import unstable_in
from sinklens.sweeps.execution import Execution
from sinklens.sweeps.places import Place, find_place, place_name
from sinklens.sweeps.request import Request, edit_name


def check_kept(model: Model, request: Request, execution: Execution) -> None:
    """Make sure that the numbers follow from what a folder, and what other processes, are told.

    Raises:
        InputError: an edit, a readout or a stage of which nothing tells whether it is the same when the sweep is taken
            up, or hooks on the model, or a part of it that is not as it was loaded.
    """
    if execution.out is None and execution.engine == "local":
        return
    where = "a folder (out)" if execution.out is not None else f"the engine {execution.engine}"
    check_bare(model, where, "sweep in memory with the engine local")
    if execution.out is not None:
        for what, thing in _things(request):
            _check_stable(what, thing)


def _things(request: Request) -> list[tuple[str, Place | EditLike | ReadoutLike]]:
    """Everything of the user's that can hold code, with what it is to the user."""
    companions = request.companions
    places = [*request.stages, *(companion.place for companion in companions)]
    stages = [(place, find_place(place)) for place in places]
    return [
        *((f"the stage {place_name(place)!r}", found) for place, found in stages),
        *((f"the edit {edit_name(edit)!r}", edit) for edit in (*request.edits, *(item.edit for item in companions))),
        *((f"the readout {readout_name(readout)!r}", readout) for readout in request.readouts),
    ]


def _check_stable(what: str, thing: object) -> None:
    if unstable := unstable_in(thing):
        raise InputError(
            f"{what} uses {' and '.join(unstable[:3])}, and nothing tells whether that is the same when the sweep is "
            "taken up: leave out the folder (out), or use numbers, arrays and functions"
        )
