"""One call of attribution patching: what has to be traced, the passes over the prompts, and the estimates of groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.attribution.qk import Attention, attention, nodes_for_fix
from sinklens.attribution.trace import Node, Trace, trace_run, without
from sinklens.engine.apply import Op, edited, gather
from sinklens.engine.capture import warn_of_split, without_sources
from sinklens.engine.memory import check_limits, is_out_of_memory, release_cached, row_budget
from sinklens.engine.places import NOWHERE, PlaceGroup, group_parts, pairs_of, parts_of
from sinklens.engine.validation import validate
from sinklens.errors import EngineError, InputError
from sinklens.models.state import foreign_hooks
from sinklens.models.view import Model, ModelShape, device_of, model_shape
from sinklens.patches import Patch, Runs
from sinklens.readouts.base import Readout
from sinklens.sites import LOGITS, HookSite, K, Q, unit_count

SLAB = 1 << 16
"""Patches that are held as objects at once, where they are built as they are asked for."""
ENTRIES = 1 << 24
"""Entries of an activation that are worked on at once."""


@dataclass(frozen=True, eq=False)
class Needs:
    """What must be traced of every run."""

    keep: dict[str, set[Node]]
    """Run name to activations."""
    wrt: dict[str, set[Node]]
    """Run name, for the runs that are patched, to activations with their gradients."""

    def cover(self, other: Needs) -> bool:
        """Whether all that ``other`` needs is among this."""
        pairs = ((self.keep, other.keep), (self.wrt, other.wrt))
        return all(run in mine and nodes <= mine[run] for mine, theirs in pairs for run, nodes in theirs.items())

    def in_all_blocks(self, last: int) -> Needs:
        """The same in every block up to ``last``."""

        def everywhere(nodes: set[Node]) -> set[Node]:
            return {node._replace(layer=layer) for node in nodes for layer in range(last + 1)}

        return Needs(*({run: everywhere(nodes) for run, nodes in part.items()} for part in (self.keep, self.wrt)))


class Pairs(NamedTuple):
    """The (intervention, prompt, position) triples of a slice of a group, one row for each."""

    members: Int[Tensor, " pair"]
    """Index of the intervention within the slice."""
    rows: Int[Tensor, " pair"]
    """Index of the prompt within the pass."""
    op: Op
    """The edit at these places, by (row, position)."""


class Estimation:
    """One call: the model, the prompts, the readouts, and what was read in the runs so far."""

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        readouts: Sequence[Readout],
        runs: Runs,
        qk_fix: bool,
        drop_blocks: bool = False,
    ) -> None:
        self.model, self.tokens, self.readouts, self.given, self.runs = model, tokens, readouts, runs, runs
        self.qk_fix, self.device, self.shape = qk_fix, device_of(model), model_shape(model)
        self.last = max((layer for readout in readouts for layer in readout.layers), default=-1)
        self.last_block = min(self.last, self.shape.n_layers - 1)  # the logits stand behind it
        self.drops = range(self.last_block + 1) if drop_blocks else range(0)
        self.names = [without(readout.name, drop) for readout in readouts for drop in (None, *self.drops)]
        self.readings: dict[str, dict[str, list[Tensor]]] = {}
        self.n_forwards = self.n_backwards = 0
        self._grouped: tuple[Sequence[Patch], list[PlaceGroup]] | None = None
        self._attention: tuple[Trace, int, Attention] | None = None

    def slabs(self, patches: Sequence[Patch]) -> Iterator[list[PlaceGroup]]:
        """The patches in groups, some tens of thousands at a time."""
        if self._grouped is not None and self._grouped[0] is patches:
            yield self._grouped[1]
            return
        stream, first = iter(patches), 0
        while slab := list(islice(stream, SLAB)):
            groups = group_parts(parts_of(slab, first), self.device, by_run=True)
            if len(slab) == len(patches):
                self._grouped = (patches, groups)
            yield groups
            first += len(slab)

    def needs(self, patches: Sequence[Patch]) -> Needs:
        """What has to be traced for these patches, which are checked on the way."""
        needs = Needs({}, {})
        self._grouped = None  # the caller may have changed the list since
        for groups in self.slabs(patches):
            validate(self.model, self.tokens, [group.like for group in groups], self.readouts, self.given)
            for group in groups:
                check_places(group, self.shape, *self.tokens.shape)
                self._need(group.like, needs)
        return needs

    def _need(self, patch: Patch, needs: Needs) -> None:
        keep, wrt = needs.keep.setdefault(patch.run, set()), needs.wrt.setdefault(patch.run, set())
        for layer in self._moving(patch):
            if self._fixed(patch.site):
                more_keep, more_wrt = nodes_for_fix(self.model, layer)
                keep |= more_keep
                wrt |= more_wrt
            else:
                wrt.add(Node(patch.site, layer))
            reads = {Node(place.site, place.layer) for place in patch.edit.reads_in(layer)}
            keep |= reads
            if patch.source is not None and patch.edit.uses_source:
                needs.keep.setdefault(patch.source.run, set()).update(reads, {Node(patch.site, layer)})

    def _moving(self, patch: Patch) -> list[int]:
        """The patch's blocks that are not past everything that is read."""
        return [layer for layer in patch.layers if layer <= self.last]

    def _fixed(self, site: HookSite) -> bool:
        return self.qk_fix and site in (Q, K)

    def passes(
        self, needs: Needs, memory_budget: int | None, max_rows: int | None
    ) -> Iterator[tuple[Tensor, dict[str, Trace]]]:
        """Traces of every run over one batch of prompts after the other, as many as fit."""
        check_limits(memory_budget, max_rows)
        rows = max_rows or self._rows(needs, memory_budget)
        # The model may have changed since the last time, and what root patches take from other runs with it.
        self.runs, n_forwards = without_sources(self.model, self.tokens, self.given, max_rows=rows)
        self.n_forwards += n_forwards
        begin = 0
        if foreign_hooks(self.model):
            warn_of_split(len(self.tokens), rows)
        while begin < len(self.tokens):
            prompts = torch.arange(begin, min(begin + rows, len(self.tokens)), device=self.device)
            try:
                traces = self._trace(prompts, needs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(prompts) == 1:
                    raise EngineError(
                        "not even one prompt fits in memory with its gradient: use shorter prompts or a smaller dtype"
                    ) from error
                rows = max(1, len(prompts) // 2)
                release_cached(self.device)
                continue
            begin += len(prompts)
            self._attention = None
            for run in needs.wrt:
                found = self.readings.setdefault(run, {readout.name: [] for readout in self.readouts})
                for name, value in traces[run].readings.items():
                    found[name].append(value)
            yield prompts, traces

    def _rows(self, needs: Needs, memory_budget: int | None) -> int:
        """A graph holds the activations of all its blocks: as many fewer prompts fit as in a plain forward pass."""
        first = min((node.layer for nodes in needs.wrt.values() for node in nodes), default=0)
        logits = any(readout.site == LOGITS for readout in self.readouts)
        return max(1, row_budget(self.model, self.tokens.shape[1], memory_budget, logits) // (self.last - first + 2))

    def _trace(self, prompts: Tensor, needs: Needs) -> dict[str, Trace]:
        traces = {}
        for run in dict.fromkeys([*needs.wrt, *needs.keep]):
            wrt, keep = needs.wrt.get(run, set()), needs.keep.get(run, set())
            readouts = self.readouts if run in needs.wrt else ()
            if not (wrt or keep or readouts):
                continue
            tokens = self.tokens[prompts.to(self.tokens.device)]
            traces[run] = trace_run(
                self.model, tokens, prompts, self.runs[run], readouts, keep=keep, wrt=wrt, drops=self.drops
            )
            self.n_forwards += 1
            self.n_backwards += len(readouts) * (1 + len(self.drops)) if wrt else 0
        return traces

    def add(self, group: PlaceGroup, prompts: Tensor, traces: Mapping[str, Trace], out: Tensor) -> None:
        """Add a group's estimates to ``out[readout, patch, prompt]``."""
        for layer in self._moving(group.like):
            for patches, rows, change in self.changes(group, layer, prompts, traces):
                index = (patches, prompts[rows])
                for i in range(len(self.names)):
                    out[i].index_put_(index, change[i].sum(-1), accumulate=True)

    def changes(
        self, group: PlaceGroup, layer: int, prompts: Tensor, traces: Mapping[str, Trace]
    ) -> Iterator[tuple[Tensor, Tensor, Float[Tensor, "readout pair unit"]]]:
        """``(patch of each pair, row of each pair, estimates unit by unit)``, one slice of the group after another."""
        like = group.like
        trace = traces[like.run]
        fixed = self._attention_of(trace, layer) if self._fixed(like.site) else None
        size = max(1, ENTRIES // self._entries(group, len(prompts), trace, layer))
        for begin in range(0, len(group.patches), size):
            chosen = slice(begin, begin + size)
            pairs = self._pairs(group, chosen, layer, prompts)
            old, new = self._edited(like.run, pairs.op, traces)
            if fixed is None:
                node = Node(like.site, layer)
                change = torch.stack([_dot(old, new, trace.grads.get((name, node)), pairs.op) for name in self.names])
                members, rows = pairs.members, pairs.rows
            else:
                change, members, rows = _recomputed(fixed, like.site, old, new, pairs, len(prompts))
            yield group.patches[chosen][members], rows, change

    def _pairs(self, group: PlaceGroup, chosen: slice, layer: int, prompts: Tensor) -> Pairs:
        """The places of some members of a group in a block, on the prompts of a pass."""
        n_members = len(group.members[chosen])
        members = torch.arange(n_members, device=self.device).repeat_interleave(len(prompts))
        rows = torch.arange(len(prompts), device=self.device).repeat(n_members)
        first = chosen.start
        single = pairs_of(group, members + first, prompts[rows])
        members, rows = members[single.of], rows[single.of]
        like = group.like
        op = Op(
            like.site,
            layer,
            like.edit,
            (rows, single.positions),
            prompts[rows],
            single.positions,
            single.units,
            source_run=like.source.run if like.source else None,
            source_positions=single.source_positions,
        )
        return Pairs(members, rows, op)

    def _attention_of(self, trace: Trace, layer: int) -> Attention:
        """The block's attention, recomputed once for all groups in it."""
        held = self._attention
        if held is None or held[0] is not trace or held[1] != layer:
            self._attention = held = (trace, layer, attention(self.model, layer, trace, self.names))
        return held[2]

    def _entries(self, group: PlaceGroup, n_prompts: int, trace: Trace, layer: int) -> int:
        """Entries that one patch of a group takes: of the activation, or of rows of attention for every head."""
        act = trace.acts[Node(group.like.site, layer)]
        units = act.shape[2] if group.units is None else group.units.shape[1]
        each = act[0, 0, 0].numel() * units
        if self._fixed(group.like.site):
            each *= act.shape[1] * (self.shape.n_heads // act.shape[2])
            if group.positions.shape[2] > 1:  # whole rows of attention
                each += act.shape[1] ** 2 * self.shape.n_heads
        return group.positions.shape[2] * n_prompts * each

    def _edited(
        self, run: str, op: Op, traces: Mapping[str, Trace]
    ) -> tuple[Float[Tensor, "pair unit *rest"], Float[Tensor, "pair unit *rest"]]:
        """The activation at an op's places in a run, and as the edit would have it."""
        rows, positions = op.address

        def source_of(op: Op, site: HookSite, layer: int) -> Tensor:
            assert op.source_positions is not None
            units = op.units if site == op.site else None
            return gather(traces[op.source_run or run].acts[Node(site, layer)], (rows, op.source_positions), units)

        def at(site: HookSite, layer: int) -> Tensor:
            return gather(traces[run].acts[Node(site, layer)], (rows, positions), None)

        old = gather(traces[run].acts[Node(op.site, op.layer)], op.address, op.units)
        live = {place.key: at(place.site, place.layer) for place in op.edit.reads_in(op.layer)}
        return old, edited(op, old, live, source_of if op.source_run is not None else None)


def check_places(group: PlaceGroup, shape: ModelShape, n_prompts: int, length: int) -> None:
    """Refuse positions and units that do not exist, which on a GPU would bring the process down.

    Raises:
        InputError: with what is wrong.
    """
    for places in (group.positions, group.source_positions):
        if places.shape[1] not in (1, n_prompts):
            raise InputError(f"positions are given for {places.shape[1]} prompts, but there are {n_prompts}")
        if (places >= length).any() or (places < NOWHERE).any():
            raise InputError(f"positions are not all in 0..{length - 1}: {group.like.describe()}")
    if not group.positions.numel() or (group.positions == NOWHERE).all(-1).any():
        raise InputError(f"there is a prompt without positions: {group.like.describe()}")
    own = group.positions.sort(-1).values
    if ((own[..., 1:] == own[..., :-1]) & (own[..., 1:] != NOWHERE)).any():
        raise InputError(f"positions repeat: {group.like.describe()}")
    if group.units is not None:
        own = group.units.sort(-1).values
        if (own[..., 1:] == own[..., :-1]).any():
            raise InputError(f"units repeat: {group.like.describe()}")
        size = unit_count(group.like.site, shape)
        if size is None:
            raise InputError(f"{group.like.site.template} has no units to select: {group.like.describe()}")
        if (group.units < 0).any() or (group.units >= size).any():
            raise InputError(f"units are not all in 0..{size - 1}: {group.like.describe()}")


def _dot(old: Float[Tensor, "pair unit *rest"], new: Tensor, grad: Tensor | None, op: Op) -> Float[Tensor, "pair unit"]:
    wide = (new.double() - old.double()).flatten(1).view(*old.shape[:2], -1)
    if grad is None:  # nothing leads from here to the readout
        return wide.new_zeros(wide.shape[:2])
    return (wide * gather(grad, op.address, op.units).view_as(wide)).sum(-1)


def _recomputed(
    fixed: Attention, site: HookSite, old: Tensor, new: Tensor, pairs: Pairs, n_prompts: int
) -> tuple[Float[Tensor, "readout pair unit"], Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Estimates with an exact softmax: for every query and every key, keys of the same patch together."""
    units = pairs.op.units
    if units is None:
        units = torch.arange(old.shape[1], device=old.device).expand(len(old), -1)
    where = (pairs.rows, pairs.op.positions, units)
    if site == Q:
        return fixed.queries(old, new, *where), pairs.members, pairs.rows
    places, number = torch.unique(pairs.members * n_prompts + pairs.rows, return_inverse=True)
    if len(places) == len(number):
        return fixed.keys(old, new, *where), pairs.members, pairs.rows
    together = fixed.keys_together(old, new, *where, number, len(places))
    return together, places // n_prompts, places % n_prompts
