"""A pass through TransformerLens with everything that happens on the way: edits, captures, readouts.

All that happens at a hook point happens in one hook function, in a fixed order: the runs' root edits, the patches'
edits, what other edits read, captures, readouts. So a readout and a capture always see the edited activation, and a
source captured from a run holds that run's root edits.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.engine.apply import Op, SourceOf, apply_edit, gather, not_computed
from sinklens.engine.places import group_of, pairs_of
from sinklens.engine.trust import read
from sinklens.errors import EngineError
from sinklens.models.state import one_pass
from sinklens.models.view import Model, check_hook_name, forward, hooked, model_shape
from sinklens.patches import Patch
from sinklens.readouts.base import Readout, Rows
from sinklens.sites import LOGITS, HookSite

BeforeOf = Callable[[Op, HookSite, int], Tensor]
"""``(op, site, block) -> [pair, unit, ...]``: the activation at an op's places in a block before those that are run."""


@dataclass(eq=False)
class Program:
    """Everything that one forward pass does besides the model's own computation."""

    prompts: Int[Tensor, " row"]
    """Prompt of each row."""
    ops: list[Op] = field(default_factory=list)
    """Edits, root edits before patches."""
    readouts: list[tuple[Readout, int]] = field(default_factory=list)
    """Readouts and the block to read each in."""
    captures: dict[tuple[HookSite, int], Callable[[Tensor], None]] = field(default_factory=dict)
    """Site and block to a function that is given the (edited) activation there and copies what it keeps."""
    source_of: SourceOf | None = None
    """Looks up source activations."""
    before_of: BeforeOf | None = None
    """Looks up what edits read of blocks that are not run."""
    first: int = 0
    """The first block that is run."""
    changed: Tensor | None = None
    """``[intervention]``: how many of its places each intervention has changed."""
    broken: Tensor | None = None
    """``[intervention]``: at how many of its places each has given NaN; of runs alone one number for all of it.
    HookedTransformer turns a NaN attention pattern into zeros, so that nothing later would show it."""
    readings: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """``(readout, block) -> [row, ...]``, filled by the pass."""
    finite: Tensor | None = None
    """``[row]`` boolean, filled by the pass: whether the residual stream that it ends with is finite. HookedTransformer
    turns a NaN attention pattern into zeros, so a readout alone would not show it."""


def root_ops(root: Patch, rows: Sequence[tuple[int, int]], layers: Iterable[int], device: torch.device) -> list[Op]:
    """The edits of a root patch on some ``(row, prompt)`` pairs of a batch, in some of its blocks."""
    group = group_of(root, device)
    row, prompt = torch.tensor(rows, device=device, dtype=torch.long).view(-1, 2).unbind(-1)
    pairs = pairs_of(group, torch.zeros_like(prompt), prompt)
    address = (row[pairs.of], pairs.positions)
    return [
        Op(root.site, layer, root.edit, address, prompt[pairs.of], pairs.positions, pairs.units) for layer in layers
    ]


class HookPoint:
    """All that happens at one hook point; callable as a TransformerLens hook."""

    def __init__(self, program: Program, live: dict[tuple[int, str], Tensor]) -> None:
        self.program, self.live = program, live
        self.ops: list[Op] = []
        self.reads: list[tuple[Op, str, HookSite]] = []
        self.readouts: list[tuple[Readout, int]] = []
        self.capture: Callable[[Tensor], None] | None = None
        self.fired = 0

    def __call__(self, act: Tensor, hook: object) -> Tensor | None:  # noqa: ARG002
        """Edit, read, capture and measure ``act``; the edited activation, ``None`` where nothing is edited."""
        self.fired += 1
        edited = act.clone() if self.ops else act
        for op in self.ops:
            live = self._live(op)
            apply_edit(
                op.site.to_canonical(edited),
                op,
                live,
                self.program.source_of,
                self.program.changed,
                self.program.broken,
            )
        for op, key, site in self.reads:
            here = op.on(act.device)
            self.live[id(op), key] = gather(site.to_canonical(edited), here.address, None)
        if self.capture is not None:
            self.capture(edited)
        for readout, layer in self.readouts:
            self.program.readings[readout.name, layer] = _reading(readout, layer, edited, self.program)
        return edited if self.ops else None

    def _live(self, op: Op) -> dict[str, Tensor]:
        """What the edit reads in this pass."""
        live = {}
        for place in op.edit.reads_in(op.layer):
            if place.layer < self.program.first:
                assert self.program.before_of is not None
                live[place.key] = self.program.before_of(op, place.site, place.layer)
                continue
            if (id(op), place.key) not in self.live:
                raise not_computed(op, place.site.at(place.layer))
            live[place.key] = self.live[id(op), place.key]
        return live


def hook_points(program: Program) -> dict[str, HookPoint]:
    """Hook names, with all that happens at each."""
    live: dict[tuple[int, str], Tensor] = {}
    points: dict[str, HookPoint] = defaultdict(lambda: HookPoint(program, live))
    for op in program.ops:
        points[op.site.at(op.layer)].ops.append(op)
        for place in op.edit.reads_in(op.layer):
            if place.layer >= program.first:
                points[place.site.at(place.layer)].reads.append((op, place.key, place.site))
    for (site, layer), capture in program.captures.items():
        points[site.at(layer)].capture = capture
    for readout, layer in program.readouts:
        if readout.site != LOGITS:
            points[readout.site.at(layer)].readouts.append((readout, layer))
    return dict(points)


def execute(model: Model, x: Tensor, program: Program, *, stop_at: int) -> dict[tuple[str, int], Tensor]:
    """Run blocks ``program.first`` to ``stop_at - 1`` on ``x`` with the program's hooks; returns ``program.readings``.

    ``x`` is a batch of tokens, or of residual streams entering the first block. ``stop_at`` beyond the last block
    asks for the logits.

    Raises:
        EngineError: when a hook name does not exist or a hook did not fire. The model has no hooks left in any case.
    """
    points = hook_points(program)
    for name in points:
        check_hook_name(model, name)
    n_layers = model_shape(model).n_layers
    wants_logits = stop_at > n_layers
    stop = None if wants_logits else stop_at
    with one_pass(model), torch.no_grad(), warnings.catch_warnings(), hooked(model, points.items()):
        # A bridge warns that editing a normalised activation takes another path than the unhooked forward: it is meant.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
        out = forward(model, x, start_at=program.first, stop_at=stop, return_type="logits" if wants_logits else None)
    check_fired(points)
    assert out is not None
    program.finite = torch.isfinite(out).flatten(1).all(-1)
    for readout, layer in program.readouts:
        if readout.site == LOGITS:
            program.readings[readout.name, layer] = _reading(readout, layer, out, program)
    return program.readings


def _reading(readout: Readout, layer: int, act: Tensor, program: Program) -> Tensor:
    prompts = program.prompts.to(act.device)
    value = read(readout, layer, act, lambda act, rows: readout.reduce(act, Rows(prompts[rows], layer)))
    # A view of the activation would hold all of it, and change with it.
    return value.clone() if value.untyped_storage().data_ptr() == act.untyped_storage().data_ptr() else value


def check_fired(points: Mapping[str, HookPoint]) -> None:
    """Refuse a pass in which a hook never fired.

    Raises:
        EngineError: one did not.
    """
    silent = [name for name, point in points.items() if not point.fired]
    if silent:
        raise EngineError(
            f"the hook at {silent[0]} never fired ({len(silent)} such hook points): the model does not compute it "
            "in these blocks, so nothing that was asked of it happened"
        )


def readouts_in(readouts: Sequence[Readout], first: int) -> list[tuple[Readout, int]]:
    """Every readout with each of its blocks from ``first`` on."""
    return [(readout, layer) for readout in readouts for layer in readout.layers if layer >= first]
