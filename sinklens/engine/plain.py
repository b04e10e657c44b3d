"""Patches through TransformerLens's own forward pass: for models and hook points that the packed pass does not know.

Rows start from the cached residual stream at their first edited block where the backend can do that, at the tokens
where it cannot, and run all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.engine.apply import Op, source_at
from sinklens.engine.capture import warn_of_split
from sinklens.engine.hooks import Program, execute, readouts_in, root_ops
from sinklens.engine.places import group_parts, pairs_of, parts_of
from sinklens.engine.store import ActivationStore, Want
from sinklens.engine.trust import checked_combined
from sinklens.models.state import foreign_hooks
from sinklens.models.view import Model, can_resume
from sinklens.patches import Patch, Runs
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
        self.names = list(dict.fromkeys(patch.run for patch in patches))
        self.hooked = bool(foreign_hooks(model))
        self.resume = resumes(model)
        self.parts = parts_of(patches)
        self.patch_of_part = torch.tensor([part.patch for part in self.parts], dtype=torch.long, device=self.device)
        self.changed = torch.zeros(len(self.parts), dtype=torch.int32, device=self.device)
        self.broken = torch.zeros_like(self.changed)
        self.finite = torch.ones(len(patches), dtype=torch.bool, device=self.device)
        last = max(layer for readout in readouts for layer in readout.layers) if readouts else -1
        self.ran = torch.tensor([part.edit.start <= last for part in self.parts], dtype=torch.bool)
        order = sorted((patch.start, index) for index, patch in enumerate(patches) if patch.start <= last)
        self.rows: list[Row] = [(index, prompt) for _, index in order for prompt in range(len(tokens))]

    def end(self, begin: int, max_rows: int) -> int:
        """Where the batch that begins at row ``begin`` ends: rows of one forward pass start at the same block."""
        patch, _ = self.rows[begin]
        if self.hooked:  # somebody's hook may act on a row by its number: it sees the prompts, all and in their order
            warn_of_split(len(self.tokens), max_rows)
            same = takewhile(lambda row: row[0] == patch, self.rows[begin : begin + max_rows])
        else:
            start = self.patches[patch].start
            same = takewhile(lambda row: self.patches[row[0]].start == start, self.rows[begin : begin + max_rows])
        return begin + sum(1 for _ in same)

    def work(self, begin: int, end: int) -> float:
        """What a batch costs, in rows: those of one forward pass cost the same."""
        return float(end - begin)

    def forward(self, begin: int, end: int) -> None:
        """Run a batch of rows."""
        chunk = self.rows[begin:end]
        start = self.patches[chunk[0][0]].start
        owners, prompts = torch.tensor(chunk, device=self.device).unbind(-1)
        contexts = self._contexts(chunk)
        first = start if self.resume else 0
        program = Program(
            prompts,
            ops=self._ops(chunk, first),
            readouts=readouts_in(self.readouts, start),
            source_of=lambda op, site, layer: source_at(self.store.gather, op, site, layer),
            before_of=lambda op, site, layer: self._before(op, site, layer, contexts),
            first=first,
            changed=self.changed,
            broken=self.broken,
        )
        last = max(layer for _, layer in program.readouts)
        program.ops = [op for op in program.ops if op.layer <= last]
        x = self._run_of(RESID_PRE, first)[contexts] if self.resume else self.tokens.to(self.device)[prompts]
        execute(self.model, x, program, stop_at=last + 1)
        assert program.finite is not None
        self.finite[owners[~program.finite.to(self.device)]] = False
        self.finite[self.patch_of_part[self.broken > 0]] = False
        for i, readout in enumerate(self.readouts):
            parts = [self._reading(program, readout, layer, contexts) for layer in readout.layers]
            self.out[i, owners, prompts] = checked_combined(readout, torch.stack(parts)).to(self.out)

    def _contexts(self, chunk: Sequence[Row]) -> Int[Tensor, " row"]:
        """The (run, prompt) pair of every row, as one index into what was captured of all runs."""
        n_prompts = len(self.tokens)
        contexts = [self.names.index(self.patches[index].run) * n_prompts + prompt for index, prompt in chunk]
        return torch.tensor(contexts, device=self.device)

    def _run_of(self, site: HookSite, layer: int) -> Tensor:
        """``[context, pos, unit, ...]``: the unpatched runs' own activation."""
        return self.store.joined(self.names, site, layer)

    def _before(self, op: Op, site: HookSite, layer: int, contexts: Int[Tensor, " row"]) -> Tensor:
        """What an edit reads in a block before its row's first one: the run's own activation."""
        rows, positions = op.address
        held = self._run_of(site, layer)
        return held[contexts[rows].to(held.device), positions.to(held.device)]

    def _reading(self, program: Program, readout: Readout, layer: int, contexts: Int[Tensor, " row"]) -> Tensor:
        if (readout.name, layer) in program.readings:
            return program.readings[readout.name, layer].to(self.device)
        # Nothing before the first edited block can have moved: the run's own reading is exact.
        return torch.cat([self.store.readings[run, readout.name, layer] for run in self.names])[contexts]

    def _ops(self, chunk: Sequence[Row], first: int) -> list[Op]:
        """All edits of a batch from block ``first`` on: root edits of each row's run, then the row's own patch."""
        return [*self._root_ops(chunk, first), *self._own_ops(chunk)]

    def _root_ops(self, chunk: Sequence[Row], first: int) -> list[Op]:
        ops = []
        for run in dict.fromkeys(self.patches[index].run for index, _ in chunk):
            rows = [(row, prompt) for row, (index, prompt) in enumerate(chunk) if self.patches[index].run == run]
            for root in (part for patch in self.runs[run] for part in patch.parts):
                # The residual stream that rows resume from was captured after the root edit there.
                begin = first + (self.resume and root.site == RESID_PRE)
                ops += root_ops(root, rows, [layer for layer in root.layers if layer >= begin], self.device)
        return ops

    def _own_ops(self, chunk: Sequence[Row]) -> list[Op]:
        ops = []
        rows_of: dict[int, list[int]] = {}
        for row, (index, _) in enumerate(chunk):
            rows_of.setdefault(index, []).append(row)
        present = [part for part in self.parts if part.patch in rows_of]
        prompts = torch.tensor([prompt for _, prompt in chunk])
        for group in group_parts(present):
            rows = [rows_of[patch] for patch in group.patches.tolist()]
            members = torch.tensor([member for member, mine in enumerate(rows) for _ in mine])
            row = torch.tensor([row for mine in rows for row in mine])
            pairs = pairs_of(group, members, prompts[row])
            like, row = group.like, row[pairs.of]
            op = Op(
                like.site,
                like.layers[0],
                like.edit,
                (row, pairs.positions),
                prompts[row],
                pairs.positions,
                pairs.units,
                source_run=like.source.run if like.source else None,
                source_positions=pairs.source_positions,
            ).on(self.device)
            owners = group.members[members[pairs.of]].to(self.device)
            ops += [replace(op, layer=layer, owners=owners) for layer in like.layers]
        return ops


def resumes(model: Model) -> bool:
    """Whether rows start from a run's residual stream: not under somebody's hooks, which would act on it again."""
    return can_resume(model) and not foreign_hooks(model)


def plain_wants(model: Model, patches: Sequence[Patch], runs: Runs, n_prompts: int) -> list[Want]:
    """What the patches need of the runs: residuals to resume from, what edits read before, source activations."""
    wants: dict[Want, None] = {}
    names = list(dict.fromkeys(patch.run for patch in patches))
    for patch in patches:
        if resumes(model):
            # Of every run that is patched: they are looked up together.
            for run in names:
                wants[Want(run, RESID_PRE, patch.start)] = None
                roots = [part for root in runs[run] for part in root.parts]
                for place in reads_before(patch.start, [*patch.parts, *roots]):
                    wants[Want(run, *place)] = None
        for part in patch.parts:
            if part.source is None or not part.edit.uses_source:
                continue
            used = {p for prompt in range(n_prompts) for p in part.source_where.at(prompt)}
            for site, layer in source_places(part):
                wants[Want(part.source.run, site, layer, tuple(sorted(used)))] = None
    return list(wants)


def reads_before(start: int, parts: Sequence[Patch]) -> list[tuple[HookSite, int]]:
    """What edits in force from block ``start`` on read in blocks before it."""
    places = [
        (place.site, place.layer)
        for part in parts
        for layer in part.layers
        if layer >= start
        for place in part.edit.reads_in(layer)
        if place.layer < start
    ]
    return list(dict.fromkeys(places))


def source_places(part: Patch) -> list[tuple[HookSite, int]]:
    """Where the source run's activations are needed."""
    return [
        (site, block)
        for layer in part.layers
        for site, block in ((part.site, layer), *((p.site, p.layer) for p in part.edit.reads_in(layer)))
    ]
