"""One packed forward pass: every row with its own edits, and readouts reduced while it runs.

A :class:`Placement` says at which (row, position) pairs, with which units and from which source, one edit applies; an
:class:`Op` is a placement in one block. All that happens at a hook point happens in one hook function, in a fixed
order: the run's root edits, the patches' edits, what other edits read live, captures, readouts. So a readout and a
capture always see the edited activation, and a source captured from a run holds that run's root edits.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinklens.edits import Edit, EditSite
from sinklens.errors import EngineError
from sinklens.models.view import Model, check_hook_name, forward, model_shape
from sinklens.readouts.base import Readout, Rows
from sinklens.sites import LOGITS, HookSite

SourceOf = Callable[[HookSite, int, "Placement"], Tensor]
"""``(site, block, placement) -> [pair, unit, ...]``: a source run's activation at the placement's source positions."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The (row, position) pairs of a batch at which one edit applies."""

    site: HookSite
    """Where the edit is written."""
    edit: Edit
    """The edit."""
    rows: Int[Tensor, " pair"]
    """Row of the batch."""
    prompts: Int[Tensor, " pair"]
    """Prompt of that row."""
    positions: Int[Tensor, " pair"]
    """Position that is edited."""
    owners: Int[Tensor, " pair"]
    """Index of the patch that each pair belongs to, for the check that an edit changed something; -1: do not check."""
    units: Int[Tensor, "pair unit"] | None = None
    """Units that are edited."""
    source_run: str | None = None
    """Run that the source activation comes from."""
    source_positions: Int[Tensor, " pair"] | None = None
    """Positions in the source run."""

    def on(self, device: torch.device) -> Placement:
        """The same with its indices on ``device``: the blocks of one model may lie on several."""
        if self.rows.device == device:
            return self
        names = ("rows", "prompts", "positions", "owners", "units", "source_positions")
        moved = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Op:
    """A placement in one block."""

    place: Placement
    """Where and what."""
    layer: int
    """Block."""


@dataclass(eq=False)
class Program:
    """Everything that one forward pass does besides the model's own computation."""

    prompts: Int[Tensor, " row"]
    """Prompt of each row."""
    ops: list[Op] = field(default_factory=list)
    """Edits, root edits before patches."""
    readouts: list[tuple[Readout, int]] = field(default_factory=list)
    """Readouts and the block to read each in."""
    captures: dict[str, Callable[[Tensor], None]] = field(default_factory=dict)
    """Hook name to a function that is given the (edited) activation there and copies what it keeps."""
    source_of: SourceOf | None = None
    """Looks up source activations."""
    changed: Tensor | None = None
    """``[patch]`` boolean, set where a patch's edit changed an activation."""
    readings: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """``(readout, block) -> [row, ...]``, filled by the pass."""
    finite: Tensor | None = None
    """``[row]`` boolean, filled by the pass: whether the residual stream that it ends with is finite. HookedTransformer
    turns a NaN attention pattern into zeros, so a readout alone would not show it."""


def gather(canonical: Tensor, rows: Tensor, positions: Tensor, units: Tensor | None) -> Tensor:
    """``[pair, unit, ...]`` from an activation laid out as ``[batch, pos, unit, ...]``."""
    if units is None:
        return canonical[rows, positions]
    return canonical[rows[:, None], positions[:, None], units]


def has_moved(old: Tensor, new: Tensor) -> Bool[Tensor, " pair"]:
    """Whether an edit changed what it was given by more than the rounding of a forward pass.

    In float32 and up, relative to the root mean square of each activation. Half precision rounds so coarsely that a
    real change could pass for rounding: there any difference counts.
    """
    old, new = old.flatten(1), new.flatten(1)
    if old.element_size() < 4:
        return (new != old).any(-1)
    return ((new - old).abs() > 1e-5 * old.pow(2).mean(-1, keepdim=True).sqrt()).any(-1) | ~torch.isfinite(new).all(-1)


def apply_in_place(canonical: Tensor, op: Op, at: EditSite, source: Tensor | None, changed: Tensor | None) -> None:
    """Write one edit into ``canonical`` (``[batch, pos, unit, ...]``), which must be the caller's own copy.

    Raises:
        EngineError: when the edit returns another shape than it was given.
    """
    place = op.place
    old = gather(canonical, place.rows, place.positions, place.units)
    new = place.edit(old, source, at)
    if new.shape != old.shape:
        raise EngineError(f"the edit {place.edit.name!r} returned shape {tuple(new.shape)} for {tuple(old.shape)}")
    new = new.to(old.dtype)
    if changed is not None:
        moved = has_moved(old, new) & (place.owners >= 0)
        changed[place.owners[moved].to(changed.device)] = 1
    if place.units is None:
        canonical[place.rows, place.positions] = new
    else:
        canonical[place.rows[:, None], place.positions[:, None], place.units] = new


class _HookPoint:
    """All that happens at one hook point; callable as a TransformerLens hook."""

    def __init__(self, program: Program, live: dict) -> None:
        self.program, self.live = program, live
        self.ops: list[Op] = []
        self.live_reads: list[tuple[Op, HookSite]] = []
        self.readouts: list[tuple[Readout, int]] = []
        self.capture: Callable[[Tensor], None] | None = None
        self.fired = 0

    def __call__(self, act: Tensor, hook: object) -> Tensor | None:  # noqa: ARG002
        self.fired += 1
        edited = act.clone() if self.ops else act
        for op in self.ops:
            canonical = op.place.site.to_canonical(edited)
            here = Op(op.place.on(act.device), op.layer)
            apply_in_place(canonical, here, self._site(op, here), self._source(here), self.program.changed)
        for op, site in self.live_reads:
            place = op.place.on(act.device)
            key = (id(op.place), site.template, op.layer)
            self.live[key] = gather(site.to_canonical(edited), place.rows, place.positions, None)
        if self.capture is not None:
            self.capture(edited)
        for readout, layer in self.readouts:
            value = readout.reduce(edited, Rows(self.program.prompts.to(edited.device), layer))
            self.program.readings[readout.name, layer] = value
        return edited if self.ops else None

    def _source(self, op: Op) -> Tensor | None:
        if not op.place.edit.uses_source or self.program.source_of is None:
            return None
        return self.program.source_of(op.place.site, op.layer, op.place)

    def _site(self, op: Op, here: Op) -> EditSite:
        place, live, source_live = here.place, {}, {}
        for site in place.edit.reads:
            key = (id(op.place), site.template, op.layer)
            if key not in self.live:
                raise EngineError(
                    f"the edit {place.edit.name!r} at {place.site.at(op.layer)} reads {site.at(op.layer)}, "
                    "which the model has not computed by then: edits can only read earlier sites of the same block"
                )
            live[site.template] = self.live[key]
            if place.edit.uses_source and self.program.source_of is not None:
                source_live[site.template] = self.program.source_of(site, op.layer, place)
        return EditSite(op.layer, place.prompts, place.positions, place.units, live, source_live)


def _hook_points(program: Program) -> dict[str, _HookPoint]:
    live: dict = {}
    points: dict[str, _HookPoint] = defaultdict(lambda: _HookPoint(program, live))
    for op in program.ops:
        points[op.place.site.at(op.layer)].ops.append(op)
        for site in op.place.edit.reads:
            points[site.at(op.layer)].live_reads.append((op, site))
    for name, capture in program.captures.items():
        points[name].capture = capture
    for readout, layer in program.readouts:
        if readout.site != LOGITS:
            points[readout.site.at(layer)].readouts.append((readout, layer))
    return dict(points)


def execute(model: Model, x: Tensor, program: Program, *, start_at: int, stop_at: int) -> dict[tuple[str, int], Tensor]:
    """Run blocks ``start_at`` to ``stop_at - 1`` on ``x`` with the program's hooks; returns ``program.readings``.

    ``x`` is a batch of tokens, or of residual streams entering block ``start_at``. ``stop_at`` beyond the last block
    asks for the logits.

    Raises:
        EngineError: when a hook name does not exist or a hook did not fire. The model has no hooks left in any case.
    """
    points = _hook_points(program)
    for name in points:
        check_hook_name(model, name)
    n_layers = model_shape(model).n_layers
    wants_logits = stop_at > n_layers
    stop = None if wants_logits else stop_at
    with torch.no_grad(), warnings.catch_warnings(), model.hooks(fwd_hooks=list(points.items())):
        # A bridge warns that editing a normalised activation takes another path than the unhooked forward: it is meant.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
        out = forward(model, x, start_at=start_at, stop_at=stop, return_type="logits" if wants_logits else None)
    _check_fired(points)
    assert out is not None
    program.finite = torch.isfinite(out).flatten(1).all(-1)
    for readout, layer in program.readouts:
        if readout.site == LOGITS:
            program.readings[readout.name, layer] = readout.reduce(out, Rows(program.prompts.to(out.device), layer))
    return program.readings


def _check_fired(points: Mapping[str, _HookPoint]) -> None:
    silent = [name for name, point in points.items() if not point.fired]
    if silent:
        raise EngineError(
            f"the hook at {silent[0]} never fired ({len(silent)} such hook points): the model does not compute it "
            "in these blocks, so nothing that was asked of it happened"
        )


def readouts_in(readouts: Sequence[Readout], first: int) -> list[tuple[Readout, int]]:
    """Every readout with each of its blocks from ``first`` on."""
    return [(readout, layer) for readout in readouts for layer in readout.layers if layer >= first]
