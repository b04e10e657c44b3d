"""From patches to packed rows and edits, by whole arrays: what is done per patch in Python is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sinklens.engine.apply import Op
from sinklens.engine.packed.heads import can_begin_alone, edited_until
from sinklens.engine.packed.layout import IntArray, Layout, to_device
from sinklens.engine.places import PlaceGroup, group_of, group_parts, pairs_of, parts_of
from sinklens.patches import Patch, Runs
from sinklens.sites import RESID_PRE


@dataclass(frozen=True, eq=False)
class Rows:
    """Patch-prompt pairs, in the order in which they are run."""

    patches: IntArray
    """Index of the patch, -1 for none."""
    prompts: IntArray
    contexts: IntArray
    """Index of the (run, prompt) pair in what was captured."""
    starts: IntArray
    """First position that is edited."""
    stops: IntArray
    """One past the last position that matters."""
    entries: IntArray
    """Block in which the whole row is under way first."""
    heads: IntArray
    """How many of its first tokens go through the block before by themselves: only these are edited there, and what the
    others are behind it cannot move (see :mod:`sinklens.engine.packed.heads`)."""

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def firsts(self) -> IntArray:
        """Block in which anything is computed first."""
        return self.entries - (self.heads > 0)

    def __getitem__(self, chosen: slice | IntArray) -> Rows:
        return Rows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def cut_to_heads(self) -> Rows:
        """The heads alone, in the block that they are edited in."""
        return replace(self, stops=self.starts + self.heads, entries=self.entries - 1, heads=np.zeros_like(self.heads))

    def followed_by(self, other: Rows) -> Rows:
        """These rows and then the others."""
        names = self.__dataclass_fields__
        return Rows(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def layout(self, length: int, device: torch.device) -> Layout:
        """Where their tokens lie."""
        return Layout(
            prompts=self.prompts,
            contexts=self.contexts,
            starts=self.starts,
            stops=self.stops,
            entries=self.entries,
            length=length,
            device=device,
        )


class Plan:
    """All rows of a list of patches, and the edits of any batch of them."""

    def __init__(
        self,
        patches: Sequence[Patch],
        runs: Runs,
        n_prompts: int,
        reach: IntArray,
        last: int,
        device: torch.device,
        head_ends: Callable[[int], IntArray] | None = None,
    ) -> None:
        self.n_prompts, self.device = n_prompts, device
        self.names = list(dict.fromkeys(patch.run for patch in patches))
        """Runs that are patched; a context is ``index of the run * number of prompts + prompt``."""
        self.roots = {name: [part for root in runs[name] for part in root.parts] for name in self.names}
        """Root edits of these runs."""
        self.parts = parts_of(patches)
        """All interventions of the patches."""
        self.groups = group_parts(self.parts)
        """The same in groups that are edited together."""
        self._reach, self._last, self._n = reach, last, len(patches)
        self.rows = self._rows(patches)
        if head_ends is not None:
            self.rows = self._with_heads(patches, runs, head_ends)

    def _rows(self, patches: Sequence[Patch]) -> Rows:
        first = np.full((self._n, self.n_prompts), np.iinfo(np.int64).max)
        for group in self.groups:
            np.minimum.at(first, group.patches.numpy(), group.first().numpy())
        entry = np.array([patch.start for patch in patches], dtype=np.int64)
        run = np.array([self.names.index(patch.run) for patch in patches], dtype=np.int64)
        # What is read before the edit, in depth or in position, cannot move: such rows are not run at all.
        moved = (first < self._reach) & (entry <= self._last)[:, None]
        patch, prompt = moved.nonzero()
        order = np.argsort(entry[patch], kind="stable")
        patch, prompt = patch[order], prompt[order]
        return Rows(
            patch,
            prompt,
            run[patch] * self.n_prompts + prompt,
            first[patch, prompt],
            self._reach[prompt],
            entry[patch],
            np.zeros_like(patch),
        )

    def _with_heads(self, patches: Sequence[Patch], runs: Runs, head_ends: Callable[[int], IntArray]) -> Rows:
        """The rows, with their heads, in the order of the blocks in which they are under way as a whole."""
        rows = self.rows
        ends = edited_until(self.groups, patches, self.n_prompts)[rows.patches, rows.prompts]
        may = np.array([can_begin_alone(patch, runs) for patch in patches], dtype=bool)[rows.patches]
        read = np.zeros_like(ends)
        for entry in np.unique(rows.entries):
            here = rows.entries == entry
            read[here] = head_ends(int(entry))[rows.prompts[here]]
        ends = np.minimum(np.maximum(ends, read), rows.stops)
        # A head that is most of its row saves little.
        alone = may & (2 * (ends - rows.starts) <= rows.stops - rows.starts)
        heads = np.where(alone, ends - rows.starts, 0)
        rows = replace(rows, heads=heads, entries=rows.entries + alone)
        return rows[np.argsort(rows.entries, kind="stable")]

    def acting(self) -> torch.Tensor:
        """``[intervention]`` boolean: whether each is applied at all, where anything is read behind it."""
        acts = torch.zeros(len(self.parts), dtype=torch.bool)
        for group in self.groups:
            if min(group.like.layers) <= self._last:
                acts[group.members] = (group.first() < torch.from_numpy(self._reach)).any(-1)
        return acts

    def ops(self, rows: Rows, layout: Layout, last: int) -> list[Op]:
        """The edits of some rows: the root edits of each row's run, then each row's own patch."""
        ops = []
        for number, name in enumerate(self.names):
            mine = (rows.contexts // self.n_prompts == number).nonzero()[0]
            for root in self.roots[name]:
                ops += self._root(root, mine, rows, layout, last)
        own = (rows.patches >= 0).nonzero()[0]
        row_of = np.full((self._n, self.n_prompts), -1, dtype=np.int64)
        row_of[rows.patches[own], rows.prompts[own]] = own
        for group in self.groups:
            row = row_of[group.patches.numpy()]
            member, prompt = (row >= 0).nonzero()
            if len(member):
                ops += self._own(group, member, prompt, row[member, prompt], layout, last)
        return ops

    def _own(
        self, group: PlaceGroup, member: IntArray, prompt: IntArray, row: IntArray, layout: Layout, last: int
    ) -> list[Op]:
        pairs = pairs_of(group, torch.from_numpy(member), torch.from_numpy(prompt))
        positions, of = pairs.positions.numpy(), pairs.of.numpy()
        inside = positions < self._reach[prompt[of]]  # of several positions some may lie behind what is read
        positions, of = positions[inside], of[inside]
        owners, sources = group.members.numpy()[member[of]], pairs.source_positions.numpy()[inside]
        tokens = layout.tokens_of(row[of], positions)
        table = to_device(np.stack([tokens, prompt[of], positions, owners, sources]), self.device)
        units = None if pairs.units is None else to_device(pairs.units.numpy()[inside], self.device)
        like, entries = group.like, layout.entries[row[of]]
        ops = []
        for layer in like.layers:
            if layer > last or not (under_way := entries <= layer).any():
                continue
            op = Op(
                like.site,
                layer,
                like.edit,
                (table[0],),
                table[1],
                table[2],
                units=units,
                owners=table[3],
                source_run=like.source.run if like.source else None,
                source_positions=table[4],
            )
            if not under_way.all():  # of the others the head was edited there
                mine = to_device(under_way, self.device)
                op = op.only(mine, table[0][mine])
            ops.append(op)
        return ops

    def _root(self, root: Patch, mine: IntArray, rows: Rows, layout: Layout, last: int) -> list[Op]:
        group = group_of(root)
        prompt = rows.prompts[mine]
        pairs = pairs_of(group, torch.zeros(len(prompt), dtype=torch.long), torch.from_numpy(prompt))
        positions, of = pairs.positions.numpy(), pairs.of.numpy()
        row = mine[of]
        # Before a row's first token the run's own keys and values stand, in which the root edit is already in force.
        inside = (positions >= rows.starts[row]) & (positions < rows.stops[row])
        row, prompt, positions = row[inside], prompt[of[inside]], positions[inside]
        table = to_device(np.stack([layout.tokens_of(row, positions), prompt, positions]), self.device)
        units = None if pairs.units is None else to_device(pairs.units.numpy()[inside], self.device)
        ops = []
        for layer in root.layers:
            # A row comes into its first block with a residual stream that was captured after the root edit there.
            under_way = layout.n_rows(layer - (root.site == RESID_PRE))
            n = int(np.searchsorted(row, under_way))
            if n and layer <= last:
                tokens, prompts, at = table[:, :n]
                ops.append(
                    Op(root.site, layer, root.edit, (tokens,), prompts, at, None if units is None else units[:n])
                )
        return ops
