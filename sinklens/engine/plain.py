"""Patches through TransformerLens's own forward pass: for models and hook points that the packed pass does not know.

Rows start from the cached residual stream at their first edited block where the backend can do that, at the tokens
where it cannot, and run all positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from sinklens.engine.capture import ActivationStore, Want, place_patch
from sinklens.engine.hooks import Op, Placement, Program, execute, readouts_in
from sinklens.errors import EngineError
from sinklens.models.view import Model, supports_resume
from sinklens.patches import Patch, Runs, positions_of
from sinklens.readouts.base import Readout
from sinklens.sites import RESID_PRE, HookSite

Row = tuple[int, int]
"""``(patch index, prompt index)``."""


class PlainJob:
    """Rows by start block, in batches."""

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        patches: Sequence[Patch],
        readouts: Sequence[Readout],
        runs: Runs,
        store: ActivationStore,
        out: Tensor,
    ) -> None:
        self.model, self.tokens, self.patches, self.readouts = model, tokens, patches, readouts
        self.runs, self.store, self.out, self.device = runs, store, out, out.device
        self.resume = supports_resume(model)
        self.changed = torch.zeros(len(patches), dtype=torch.int32, device=self.device)
        self.finite = torch.ones(len(patches), dtype=torch.bool, device=self.device)
        last = max(layer for readout in readouts for layer in readout.layers) if readouts else -1
        self.ran = torch.tensor([patch.start <= last for patch in patches], dtype=torch.bool)
        order = sorted((patch.start, index) for index, patch in enumerate(patches) if patch.start <= last)
        self.rows: list[Row] = [(index, prompt) for _, index in order for prompt in range(len(tokens))]

    def end(self, begin: int, max_rows: int) -> int:
        """Where the batch that begins at row ``begin`` ends: rows of one forward pass start at the same block."""
        start = self.patches[self.rows[begin][0]].start
        same = takewhile(lambda row: self.patches[row[0]].start == start, self.rows[begin : begin + max_rows])
        return begin + sum(1 for _ in same)

    def work(self, begin: int, end: int) -> float:
        """What a batch costs, in rows: those of one forward pass cost the same."""
        return float(end - begin)

    def forward(self, begin: int, end: int) -> None:
        """Run a batch of rows."""
        chunk = self.rows[begin:end]
        start = self.patches[chunk[0][0]].start
        prompts = torch.tensor([prompt for _, prompt in chunk], device=self.device)
        owners = torch.tensor([index for index, _ in chunk], device=self.device)
        first = start if self.resume else 0
        program = Program(
            prompts,
            ops=_ops(self.patches, self.runs, chunk, first, self.resume, self.device),
            readouts=readouts_in(self.readouts, start),
            source_of=self._source_of,
            changed=self.changed,
        )
        last = max(layer for _, layer in program.readouts)
        program.ops = [op for op in program.ops if op.layer <= last]
        x = self._residual(first, chunk) if self.resume else self.tokens.to(self.device)[prompts]
        execute(self.model, x, program, start_at=first, stop_at=last + 1)
        assert program.finite is not None
        self.finite[owners[~program.finite.to(self.device)]] = False
        for i, readout in enumerate(self.readouts):
            parts = [self._reading(program, readout, layer, start, chunk) for layer in readout.layers]
            self.out[i, owners, prompts] = readout.combine(torch.stack(parts)).to(self.out)

    def _residual(self, start: int, chunk: list[Row]) -> Tensor:
        """The cached residual stream entering block ``start``, one row for each (patch, prompt)."""
        parts = []
        for run, rows in _segments(self.patches, chunk):
            parts.append(self.store.tensor(run, RESID_PRE, start)[[prompt for _, prompt in rows]])
        return torch.cat(parts)

    def _reading(self, program: Program, readout: Readout, layer: int, start: int, chunk: list[Row]) -> Tensor:
        if layer >= start:
            return program.readings[readout.name, layer].to(self.device)
        # Nothing before the first edited block can have moved: the run's own reading is exact.
        parts = []
        for run, rows in _segments(self.patches, chunk):
            parts.append(self.store.readings[run, readout.name, layer][[prompt for _, prompt in rows]])
        return torch.cat(parts)

    def _source_of(self, site: HookSite, layer: int, place: Placement) -> Tensor:
        if place.source_run is None or place.source_positions is None:
            raise EngineError(f"the edit {place.edit.name!r} needs a source run: give the patch source=Source(...)")
        units = place.units if site == place.site else None
        return self.store.gather(place.source_run, site, layer, place.prompts, place.source_positions, units)


def _segments(patches: Sequence[Patch], chunk: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Consecutive rows of the same run, in order."""
    segments: list[tuple[str, list[Row]]] = []
    for row in chunk:
        run = patches[row[0]].run
        if not segments or segments[-1][0] != run:
            segments.append((run, []))
        segments[-1][1].append(row)
    return segments


def _ops(
    patches: Sequence[Patch], runs: Runs, chunk: Sequence[Row], first: int, resumed: bool, device: torch.device
) -> list[Op]:
    """All edits of a batch from block ``first`` on: root edits of each row's run, then the row's own patch."""
    by_run: dict[str, list[tuple[int, int]]] = defaultdict(list)
    by_patch: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, (index, prompt) in enumerate(chunk):
        by_run[patches[index].run].append((row, prompt))
        by_patch[index].append((row, prompt))
    ops = []
    for run, pairs in by_run.items():
        for root in runs[run]:
            place = place_patch(root, pairs, -1, device)
            # The residual stream that rows resume from was captured after the root edit there.
            begin = first + (resumed and root.site == RESID_PRE)
            ops += [Op(place, layer) for layer in root.layers if layer >= begin]
    groups: dict[tuple, list[Placement]] = defaultdict(list)
    for index, pairs in by_patch.items():
        patch = patches[index]
        size = None if patch.units is None else len(patch.units)
        key = (patch.site, patch.layers, id(patch.edit), size, patch.source.run if patch.source else None)
        groups[key].append(place_patch(patch, pairs, index, device))
    for (_, layers, *_), places in groups.items():
        merged = _merge(places)
        ops += [Op(merged, layer) for layer in layers]
    return ops


def _merge(places: Sequence[Placement]) -> Placement:
    """Placements of the same edit on the same site as one, so that a sweep's edits run as one kernel."""
    if len(places) == 1:
        return places[0]
    joined = {
        name: torch.cat([getattr(place, name) for place in places])
        for name in ("rows", "prompts", "positions", "owners", "source_positions", "units")
        if getattr(places[0], name) is not None
    }
    return replace(places[0], **joined)


def plain_wants(model: Model, patches: Sequence[Patch], n_prompts: int) -> list[Want]:
    """What the patches need of the runs: residuals to resume from, and source activations where they are used."""
    wants: dict[Want, None] = {}
    for patch in patches:
        if supports_resume(model):
            wants[Want(patch.run, RESID_PRE, patch.start)] = None
        if patch.source is None or not patch.edit.uses_source:
            continue
        where = patch.positions if patch.source.positions is None else patch.source.positions
        used = {p for prompt in range(n_prompts) for p in positions_of(where, prompt)}
        for site in (patch.site, *patch.edit.reads):
            for layer in patch.layers:
                wants[Want(patch.source.run, site, layer, tuple(sorted(used)))] = None
    return list(wants)
