"""What was chosen: a request resolved on a model and prompts, which is what a plan holds and ``sweep.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any

from sinklens.edits import Edit
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.models.view import Model, ModelShape, device_of, dtype_of, model_shape
from sinklens.pairs.ablations import NamedEdit, check_edit, edit_fingerprint, exchanges
from sinklens.prompts import PromptBatch
from sinklens.readouts.named import fingerprint
from sinklens.records.ranges import Numbers, short, within
from sinklens.sites import HookSite
from sinklens.stages import Stage
from sinklens.study import provenance
from sinklens.sweeps.companions import Companion
from sinklens.sweeps.places import Units, place_fingerprint, site_of
from sinklens.sweeps.request import Request, edit_name

ESTIMATES = 1 << 14
"""Patches in a task where they are estimated."""
PATCHES = 1024
"""Patches in a task by default, on a GPU."""
CPU_ROWS = 512
"""Patched rows in a task by default, on a CPU. A task is what is lost when a process is killed: seconds of work."""
GROUP_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""What is kept of a group of prompts may take so much; fixed, so that groups do not depend on what else runs."""


@dataclass(frozen=True, eq=False)
class Choices(Request):
    """A request with the numbers that its words stand for, and what it is asked of."""

    layers: tuple[int, ...]
    """First blocks of the windows."""
    directions: tuple[str, ...]
    """``denoise``, ``noise`` or both."""
    group_size: int
    """Prompts whose runs are kept at once."""
    task_size: int
    """Patches in a task."""
    origin: Mapping[str, Any]
    """Versions, device, and digests of model and prompts (:func:`sinklens.study.provenance`)."""
    prompts: str
    """Where the prompts come from."""
    n_prompts: int
    """Their number."""
    length: int
    """Tokens of each."""
    bos: str
    """Who decided whether a BOS stands in front of them (see :class:`sinklens.PromptBatch`)."""
    has_bos: bool
    """Whether one does."""

    @cached_property
    def as_json(self) -> Mapping[str, Any]:
        """What ``sweep.json`` holds under ``choices``, and what tells one sweep from another."""
        asked = {field.name: _plain(getattr(self, field.name)) for field in fields(Request)}
        asked["stages"] = [place_fingerprint(place) for place in self.stages]
        left_out = {"group_size", "task_size"}  # these come last
        if self.method != "screen":
            left_out |= {"top", "sample"}
        if not self.companions:
            left_out |= {"companions"}
        return {
            **{name: value for name, value in asked.items() if name not in left_out},
            **self.pair_choice.record(),
            **{name: self.origin[name] for name in ("model", "weight_digest", "dtype")},
            "prompts": self.prompts,
            "prompts_digest": self.origin["prompts_digest"],
            "n_prompts": self.n_prompts,
            "length": self.length,
            "bos": self.bos,
            "has_bos": self.has_bos,
            "group_size": self.group_size,
            "task_size": self.task_size,
        }


def resolve(request: Request, model: Model, batch: PromptBatch) -> Choices:
    """The request, on this model and these prompts.

    Raises:
        InputError: something that the model or the prompts do not have.
    """
    shape = model_shape(model)
    request.check_length(batch.length)  # before any work
    _check_edits(request, batch)
    resolved = {
        "layers": window_starts(request.layers, request.window, shape.n_layers),
        "positions": request.positions_in(batch.length),
        "directions": request.directions or request.pair_choice.directions,
        "readout_layers": _layers_read(request.readout_layers, shape),
        "answers": _check_answers(request.answers, batch, shape),
        **_sizes(request, model, batch),
    }
    return Choices(
        **{**vars(request), **resolved},
        origin=provenance(model, batch),
        prompts=batch.source,
        n_prompts=batch.n,
        length=batch.length,
        bos=batch.bos,
        has_bos=batch.has_bos,
    )


def _check_edits(request: Request, batch: PromptBatch) -> None:
    held = [(companion.edit, companion.place) for companion in request.companions]
    for edit, place in [*product(request.edits, request.stages), *held]:
        check_edit(edit, site_of(place), batch.n)
    for edit in request.edits:
        if exchanges(edit) and request.positions != "target":
            raise InputError(
                f"edit {edit_name(edit)} exchanges what the two runs have at the target: leave positions out, or ask "
                "for another edit"
            )


def window_starts(layers: Numbers, window: int, n_layers: int) -> tuple[int, ...]:
    """First blocks of windows of ``window`` consecutive blocks; ``all``: wherever one fits.

    Raises:
        InputError: it does not fit somewhere.
    """
    if not 1 <= window <= n_layers:
        raise InputError(f"window {window}: it must be 1-{n_layers} blocks")
    if isinstance(layers, str):
        return tuple(range(n_layers - window + 1))
    found = within("layers", layers, n_layers, "the model's blocks")
    beyond = [layer for layer in found if layer + window > n_layers]
    if beyond:
        raise InputError(
            f"layers {short(beyond)}: a window of {window} blocks from there goes beyond the model's last block, "
            f"{n_layers - 1}; the last that fits starts at {n_layers - window}"
        )
    return found


def formation_key(formation: Formation) -> dict[str, Any]:
    """What the numbers of a sweep depend on in a formation."""
    return {
        "layer": formation.layer,
        "first": formation.first,
        "sink_positions": list(formation.sink_positions),
        "neurons": sorted(formation.neurons),
        "dims": sorted(formation.dims),
    }


def _layers_read(layers: Numbers, shape: ModelShape) -> Numbers:
    if layers in ("formation", "last"):
        return layers
    return within("readout_layers", layers, shape.n_layers, "the model's blocks")


def _check_answers(answers: Any, batch: PromptBatch, shape: ModelShape) -> Any:
    for tokens in answers or ():
        if len(tokens) != batch.n or not all(0 <= token < shape.d_vocab for token in tokens):
            raise InputError(
                f"answers must be two lists of {batch.n} token ids below {shape.d_vocab}, one for each prompt"
            )
    return answers


def _sizes(request: Request, model: Model, batch: PromptBatch) -> dict[str, int]:
    """How the grid is cut: as was asked for, else by method and device."""
    group = request.group_size or default_group(model, batch)
    usual = PATCHES if device_of(model).type == "cuda" else max(16, CPU_ROWS // group)
    if request.method != "exact":
        usual = ESTIMATES
    return {"group_size": group, "task_size": request.task_size or usual}


def default_group(model: Model, batch: PromptBatch) -> int:
    """Prompts whose residual streams of two runs, and as much again for sources, fit in :data:`GROUP_BYTES`."""
    shape, itemsize = model_shape(model), dtype_of(model).itemsize
    each = 4 * shape.n_layers * batch.length * shape.d_model * itemsize
    return max(1, min(batch.n, GROUP_BYTES.get(device_of(model).type, 1 << 30) // each))


def _plain(value: Any) -> Any:
    """A choice as JSON has it: things by name, or by name and digest where they have none of ours."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (Stage, HookSite)):
        return place_fingerprint(value)
    if isinstance(value, (Edit, NamedEdit)):
        return edit_fingerprint(value)
    if isinstance(value, Formation):
        return formation_key(value)
    if isinstance(value, Units):
        return _plain(value.given)
    if isinstance(value, Companion):
        return [place_fingerprint(value.place), *_plain((value.edit, value.layers, value.units))]
    return value if value is None or isinstance(value, (str, int, float)) else fingerprint(value)
