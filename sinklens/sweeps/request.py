"""What is asked of a sweep: read once from the arguments, before any model is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.pairs import InducedKind, PairChoice
from sinklens.pairs.ablations import EditLike, read_edit
from sinklens.pairs.choice import DIRECTIONS, Target
from sinklens.readouts.named import ReadoutLike, read_readout, readout_name
from sinklens.records.integers import as_plain, is_several, whole_number, whole_numbers
from sinklens.records.ranges import Numbers, check_seed, names_in, read, shown, within
from sinklens.sweeps.companions import Companion, read_companions
from sinklens.sweeps.places import Place, Units, find_place, place_name, read_units

Answers: TypeAlias = tuple[Sequence[int], Sequence[int]]
METHODS = ("exact", "attribution", "screen")
"""How effects are found: by running every patch; estimated from gradients (:mod:`sinklens.attribution`); or estimated,
with the strongest and a random sample of all run exactly (:mod:`sinklens.sweeps.screening`)."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is swept: the arguments of :func:`sinklens.sweep` that the numbers depend on, read and checked.

    Lists are tuples, and ranges are numbers or the word that stands for them; whether model and prompts have these is
    seen when the request is resolved (:func:`sinklens.sweeps.choices.resolve`). The fields, in this order, are the
    keys of ``choices`` in ``sweep.json``.
    """

    stages: tuple[Place, ...]
    """Places that are swept."""
    layers: Numbers
    """First blocks of the windows, or ``all``."""
    window: int
    """Consecutive blocks that a patch edits."""
    positions: Numbers
    """Token positions, ``all`` or ``target``."""
    units: Units | None
    """Units that are swept one by one; ``None``: whole activations, or a stage's own units at once."""
    edits: tuple[EditLike, ...]
    """Edits, or their names."""
    directions: tuple[str, ...] | None
    """``denoise``, ``noise`` or both; ``None``: all that the pair has."""
    target: Target
    """Position that is made a sink, or ``natural``."""
    pair: InducedKind
    """How it is made."""
    strength: float
    """Lambda of ``amplify_variance``."""
    pair_layers: tuple[int, ...] | None
    """Blocks of that intervention."""
    formation: Formation | None
    """Where the sink forms; ``None``: it is looked for."""
    readouts: tuple[ReadoutLike, ...]
    """Readouts, or their names."""
    readout_layers: Numbers
    """Blocks that they read, ``formation`` or ``last``."""
    answers: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Answer and alternative of every prompt, for ``logit_diff``; ``None``: the model's two most probable tokens."""
    eps: float
    """Threshold of ``sink_rate``."""
    min_gap: float
    """The least difference between the runs that an effect is divided by."""
    method: str
    """One of :data:`METHODS`."""
    top: int
    """For ``screen``: how many of the strongest to run."""
    sample: int
    """For ``screen``: how many to draw and run."""
    companions: tuple[Companion, ...]
    """Edits that are held fixed in every patched row."""
    seed: int
    """Fixes every draw."""
    group_size: int | None
    """Prompts whose runs are kept at once; ``None``: by the model's size."""
    task_size: int | None
    """Patches in a task; ``None``: by method and device."""

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Request:
        """The request in the arguments of :func:`sinklens.sweep`.

        Raises:
            InputError: what is wrong whatever the model.
        """
        request = Request(**{**{field.name: arguments[field.name] for field in fields(Request)}, **_read(arguments)})
        request.pair_choice.check()
        _check_lists(request)
        _check_directions(request)
        _check_numbers(request)
        return request

    @property
    def pair_choice(self) -> PairChoice:
        """The sink that is asked for."""
        return PairChoice(self.target, self.pair, strength=self.strength, layers=self.pair_layers)

    def check_length(self, length: int) -> None:
        """Make sure that prompts of ``length`` tokens have what is asked for.

        Raises:
            InputError: they do not.
        """
        self.pair_choice.check(length)
        self.positions_in(length)

    def positions_in(self, length: int) -> Numbers:
        """The positions, in prompts of ``length`` tokens, or ``target``.

        Raises:
            InputError: the prompts do not have them.
        """
        if self.positions == "target":
            return self.positions
        return within("positions", self.positions, length, f"the positions of prompts of {length} tokens")


_WHOLE = ("window", "top", "sample", "seed", "group_size", "task_size")


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are lists and ranges, as the fields have them."""
    layers, answers = given["pair_layers"], given["answers"]
    return {
        "stages": listed(given["stages"]),
        "edits": tuple(read_edit(edit) for edit in listed(given["edits"])),
        "readouts": tuple(read_readout(readout) for readout in listed(given["readouts"])),
        "layers": read("layers", given["layers"]),
        "positions": read("positions", given["positions"], ("all", "target")),
        "units": None if given["units"] is None else read_units(given["units"]),
        "directions": None if given["directions"] is None else listed(given["directions"]),
        "pair_layers": None if layers is None else whole_numbers(layers, "block"),
        "readout_layers": read("readout_layers", given["readout_layers"], ("all", "formation", "last")),
        "answers": None if answers is None else _read_answers(answers),
        "companions": read_companions(given["companions"]),
        # NumPy's and torch's numbers as Python's own, which JSON has and which generators take.
        **{name: whole_number(given[name], name) for name in _WHOLE if given[name] is not None},
        **{name: float(given[name]) for name in ("eps", "min_gap")},
    }


def _read_answers(given: Any) -> tuple[tuple[int, ...], ...]:
    pair = as_plain(given)
    if not is_several(pair) or len(pair) != 2 or not all(is_several(as_plain(tokens)) for tokens in pair):
        raise InputError(f"answers {shown(given)} must be the answers and the alternatives: two lists of token ids")
    return tuple(whole_numbers(tokens, "answer") for tokens in pair)


def listed(given: Any) -> tuple[Any, ...]:
    """A list of names or things; one alone, or names in a text with commas, will do."""
    if isinstance(given, str):
        return names_in(given)
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _check_lists(request: Request) -> None:
    for place in request.stages:
        find_place(place)
    names = {
        "stages": [place_name(place) for place in request.stages],
        "edits": [edit_name(edit) for edit in request.edits],
        "readouts": [readout_name(readout) for readout in request.readouts],
    }
    for what, mine in names.items():
        if not mine:
            raise InputError(f"{what} must be a list with at least one entry")
        _check_twice(what, mine)


def _check_twice(what: str, names: Sequence[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{what}: {min(twice)} is given twice")


def _check_directions(request: Request) -> None:
    if request.directions is None:
        return
    for name in request.directions:
        if name not in DIRECTIONS:
            raise InputError(f"direction {name!r}: choose denoise or noise")
        if name not in request.pair_choice.directions:
            raise InputError("target natural can only be noised: there is no run without that sink to denoise")
    if not request.directions:
        raise InputError("directions must be denoise, noise, or both")
    _check_twice("directions", request.directions)


def _check_numbers(request: Request) -> None:
    if request.method not in METHODS:
        raise InputError(f"method {request.method!r}: choose {', '.join(METHODS)}")
    for name, value in (("task_size", request.task_size), ("group_size", request.group_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if request.top < 1 or request.sample < 3:
        raise InputError(f"top {request.top} must be at least 1, and sample {request.sample} at least 3")
    if request.formation is not None and not isinstance(request.formation, Formation):
        raise InputError(f"formation {shown(request.formation)} must be what find_formation gives")
    check_seed(request.seed)
    if not request.min_gap >= 0:
        raise InputError(f"min_gap {request.min_gap} must be 0 or more")


def edit_name(edit: EditLike) -> str:
    """The name that the table has for an edit."""
    return edit if isinstance(edit, str) else edit.name
