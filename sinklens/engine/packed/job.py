"""Patches through the packed pass, in batches, and the check that the pass is the model's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sinklens.engine.apply import source_at
from sinklens.engine.hooks import readouts_in
from sinklens.engine.packed.blocks import PATTERN_BYTES, PackedPass
from sinklens.engine.packed.heads import first_tokens, head_ends
from sinklens.engine.packed.known import check_reading, packed_model, rounding_allowed, unsupported
from sinklens.engine.packed.layout import IntArray, Layout, to_device
from sinklens.engine.packed.points import Points, is_known, reach
from sinklens.engine.packed.rows import Plan, Rows
from sinklens.engine.packed.weights import PackedModel
from sinklens.engine.places import NOWHERE
from sinklens.engine.store import ActivationStore, Want
from sinklens.engine.trust import checked_combined
from sinklens.models.view import Model, model_shape
from sinklens.patches import Patch, Runs
from sinklens.readouts.base import PositionReadout, Readout
from sinklens.sites import LOGITS, RESID_POST, RESID_PRE, HookSite, V


def unpackable(
    model: Model, length: int, readouts: Sequence[Readout], runs: Runs, patches: Sequence[Patch] = ()
) -> str | None:
    """Why the packed pass cannot do this; None when it can."""
    return unknown_place(model, length, places_of(readouts, runs, patches))


def places_of(readouts: Sequence[Readout], runs: Runs, patches: Sequence[Patch] = ()) -> set[tuple[HookSite, int]]:
    """All sites and blocks in which anything is read or edited."""
    places = {(readout.site, layer) for readout in readouts for layer in readout.layers}
    for patch in [*patches, *(root for roots in runs.values() for root in roots)]:
        for part in patch.parts:
            for layer in part.layers:
                places.add((part.site, layer))
                places.update((place.site, place.layer) for place in part.edit.reads_in(layer))
    return places


def unknown_place(model: Model, length: int, places: Collection[tuple[HookSite, int]]) -> str | None:
    """What of some places of a model, or of the model itself, the packed pass does not know; None when it knows all."""
    unknown = next((site for site, _ in places if not is_known(site)), None)
    if unknown is not None:
        return f"the site {unknown.template}"
    if (why := unsupported(model, length)) is not None:
        return why
    packed = packed_model(model, length)
    lacking = (packed.lacks(site, layer) for site, layer in places if site != LOGITS)
    return next((why for why in lacking if why is not None), None)


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of rows (see :mod:`sinklens.engine.packed.heads`), which go through one block before the whole rows do."""

    layer: int
    """That block."""
    of: IntArray
    """Which rows of the batch they are of."""
    rows: Rows
    """They themselves, as rows."""
    points: Points
    """All that happens to them in that block."""


class PackedJob:
    """All rows of a list of patches; see :class:`sinklens.engine.plain.PlainJob` for the interface."""

    def __init__(
        self,
        packed: PackedModel,
        tokens: Tensor,
        patches: Sequence[Patch],
        readouts: Sequence[Readout],
        runs: Runs,
        device: torch.device,
        unchecked: bool = True,
        pattern_bytes: int = PATTERN_BYTES,
    ) -> None:
        self.packed, self.readouts, self.device, self.pattern_bytes = packed, readouts, device, pattern_bytes
        self.tokens = tokens
        (n_prompts, length), self.n_layers = tokens.shape, model_shape(packed.model).n_layers
        self.last = max((layer for readout in readouts for layer in readout.layers), default=-1)
        stops = reach(readouts, n_prompts, length).numpy()
        ends = head_ends(readouts, n_prompts, length, min(self.last, self.n_layers - 1))
        self.plan = Plan(patches, runs, n_prompts, stops, self.last, device, ends)
        self.rows, self.length, self.stops = self.plan.rows, length, stops
        self.parts = self.plan.parts
        self.changed = torch.zeros(len(self.parts), dtype=torch.int32, device=device)
        self.finite = torch.ones(len(patches), dtype=torch.bool, device=device)
        self.unchecked = unchecked
        self.ran = self.plan.acting()

    def wants(self) -> list[Want]:
        """What must have been captured of the runs."""
        return [*self._run_wants(), *self._read_wants(), *self._source_wants()]

    def attach(self, store: ActivationStore, out: Tensor) -> None:
        """Where the captured runs are, and where results go: ``[readout, patch, prompt]``."""
        self.store, self.out = store, out

    def end(self, begin: int, max_rows: int) -> int:
        """Where the batch that begins at row ``begin`` ends."""
        return min(begin + max_rows, len(self.rows))

    def work(self, begin: int, end: int) -> float:
        """What a batch costs, in tokens times blocks."""
        rows = self.rows[begin:end]
        return float(((rows.stops - rows.starts) * (self.last - rows.entries + 1)).sum())

    def forward(self, begin: int, end: int) -> None:
        """Run a batch of rows; with the first one goes the check that the pass is the model's.

        Raises:
            DifferentModelError: when it is not.
        """
        rows = self.rows[begin:end]
        tries = self._tries(int(rows.firsts.min())) if self.unchecked else rows[:0]
        batch = tries.followed_by(rows)
        heads, points, begun = self._heads(batch), self._points(batch, self.last), {}
        for head in heads:
            part = PackedPass(self.packed, head.points.layout, head.points, self.pattern_bytes)
            tokens = first_tokens(points.layout.offsets[head.of], batch.heads[head.of])
            begun[head.layer + 1] = (tokens, part.run(head.layer, head.layer, to_end=True))
        whole = PackedPass(self.packed, points.layout, points, self.pattern_bytes, begun)
        x = whole.run(int(batch.entries.min()), self.last)
        self._note_finite(x, points.layout, rows, len(tries))
        readings = {readout.name: self._reading(readout, points, batch, heads) for readout in self.readouts}
        if self.unchecked:
            self._check(tries, readings)
            self.unchecked = False
        patches, prompts = to_device(np.stack([rows.patches, rows.prompts]), self.device)
        for i, readout in enumerate(self.readouts):
            self.out[i, patches, prompts] = readings[readout.name][len(tries) :].to(self.out)

    def _tries(self, entry: int) -> Rows:
        """The first prompt of every run, unpatched, from the first position and from the middle."""
        starts = sorted({0, int(self.stops[0]) // 2})
        runs = np.repeat(np.arange(len(self.plan.names), dtype=np.int64), len(starts))
        zeros = np.zeros_like(runs)
        begins = np.array(starts * len(self.plan.names), dtype=np.int64)
        contexts, stops = runs * self.plan.n_prompts, zeros + self.stops[0]
        return Rows(zeros - 1, zeros, contexts, begins, stops, zeros + entry, zeros)

    def _heads(self, batch: Rows) -> list[Heads]:
        """The heads of a batch's rows, by the block that they are edited in."""
        found = []
        for layer in (np.unique(batch.entries[batch.heads > 0]) - 1).tolist():
            of = ((batch.heads > 0) & (batch.entries == layer + 1)).nonzero()[0]
            rows = batch[of].cut_to_heads()
            found.append(Heads(layer, of, rows, self._points(rows, layer)))
        return found

    def _check(self, tries: Rows, readings: dict[str, Tensor]) -> None:
        with rounding_allowed(self.packed, self.tokens[:1]):
            for readout in self.readouts:
                expected, found = readout.combine(self._before(readout, tries)), readings[readout.name][: len(tries)]
                check_reading(readout, found, expected, self.packed.dtype)

    def _points(self, rows: Rows, last: int) -> Points:
        """All that happens in a pass over ``rows`` that ends with the block ``last``."""
        layout = rows.layout(self.length, self.device)
        readouts = readouts_in(self.readouts, int(rows.entries.min()))
        return Points(
            layout,
            self.plan.ops(rows, layout, min(last, self.n_layers - 1)),
            [(readout, layer) for readout, layer in readouts if layer <= last],
            captured=lambda site, layer: self.store.joined(self.plan.names, site, layer),
            source_of=lambda op, site, layer: source_at(self.store.gather, op, site, layer),
            changed=self.changed,
            n_layers=self.n_layers,
        )

    def _note_finite(self, x: Tensor, layout: Layout, rows: Rows, n_tries: int) -> None:
        """Remember the patches whose last residual is not finite; the first ``n_tries`` rows have no patch."""
        bad = ~torch.isfinite(x).all(-1).to(self.device)
        # An index_add_ of integers is exact in any order.
        count = torch.zeros(n_tries + len(rows), dtype=torch.int32, device=self.device)
        count.index_add_(0, layout.row[: len(x)].to(self.device), bad.to(count.dtype))
        owners = to_device(rows.patches, self.device)
        self.finite &= (
            torch.zeros(len(self.finite), dtype=torch.int32, device=self.device).index_add_(0, owners, count[n_tries:])
            == 0
        )

    def _reading(self, readout: Readout, points: Points, rows: Rows, heads: Sequence[Heads] = ()) -> Tensor:
        """A readout of every row."""
        stack = self._before(readout, rows)
        for i, layer in enumerate(readout.layers):
            if (value := points.readings.get((readout.name, layer))) is None:
                continue
            n = len(value)
            value = value.to(self.device)
            if isinstance(readout, PositionReadout):
                value = value + self._prefix(readout, layer, rows[slice(0, n)])
            stack[i, :n] = value
        for head in heads:
            if (value := head.points.readings.get((readout.name, head.layer))) is not None:
                assert isinstance(readout, PositionReadout)  # any other wants whole prompts
                value = value.to(self.device) + self._prefix(readout, head.layer, head.rows)
                stack[readout.layers.index(head.layer), to_device(head.of, self.device)] = value
        return checked_combined(readout, stack)

    def _before(self, readout: Readout, rows: Rows) -> Tensor:
        """``[layer, row, ...]``: the runs' own readings, which stand where a row is not patched yet."""
        contexts = to_device(rows.contexts, self.device)
        runs = [
            [self.store.readings[name, readout.name, layer] for name in self.plan.names] for layer in readout.layers
        ]
        return torch.stack([torch.cat(parts)[contexts] for parts in runs])

    def _prefix(self, readout: PositionReadout, layer: int, rows: Rows) -> Tensor:
        """The part of the readout's sum that lies before each row's first token."""
        before = torch.cat([self.store.before[name, readout.name, layer] for name in self.plan.names])
        contexts, starts = to_device(np.stack([rows.contexts, rows.starts]), self.device)
        return before[contexts, starts]

    def _run_wants(self) -> Iterable[Want]:
        entries = sorted({*np.unique(self.rows.entries).tolist(), *np.unique(self.rows.firsts).tolist()})
        if not entries:
            return
        for run in self.plan.names:
            for layer in entries:
                yield Want(run, RESID_PRE, layer)
            for layer in range(entries[0], min(self.last, self.n_layers - 1) + 1):
                yield Want(run, self.packed.keys_site, layer)
                yield Want(run, V, layer)
            for readout in self.readouts:
                if not isinstance(readout, PositionReadout):
                    at_end = readout.site == LOGITS
                    site, layers = (RESID_POST, (self.n_layers - 1,)) if at_end else (readout.site, readout.layers)
                    yield from (Want(run, site, layer) for layer in layers if layer >= entries[0])

    def _read_wants(self) -> Iterable[Want]:
        """What edits read of earlier blocks: rows that were not under way there have it from their run."""
        roots = [root for roots in self.plan.roots.values() for root in roots]
        for patch in [*(part.edit for part in self.parts), *roots]:
            for layer in patch.layers:
                for place in patch.edit.reads_in(layer):
                    if place.layer < layer <= self.last:
                        yield from (Want(run, place.site, place.layer) for run in self.plan.names)

    def _source_wants(self) -> Iterable[Want]:
        for group in self.plan.groups:
            like = group.like
            if like.source is None or not like.edit.uses_source:
                continue
            used = tuple(int(p) for p in group.source_positions.unique() if p != NOWHERE)
            for layer in like.layers:
                if layer <= self.last:
                    yield Want(like.source.run, like.site, layer, used)
                    yield from (Want(like.source.run, p.site, p.layer, used) for p in like.edit.reads_in(layer))
