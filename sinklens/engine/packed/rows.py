"""From patches to packed rows and edits, by whole arrays: what is done per patch in Python is done once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sinklens.edits import Edit, Transplant
from sinklens.engine.packed.layout import IntArray, Layout, to_device
from sinklens.engine.packed.points import PackedOp
from sinklens.patches import Patch, Positions, Runs
from sinklens.sites import RESID_PRE, HookSite


@dataclass(frozen=True, eq=False)
class _Group:
    """Patches that differ only in positions and units: one kernel edits them all."""

    site: HookSite
    layers: tuple[int, ...]
    edit: Edit
    source_run: str | None
    patches: IntArray
    """``[group]``: their indices."""
    positions: IntArray
    """``[group, prompt or 1, place]``."""
    source_positions: IntArray
    """The same of the source."""
    units: IntArray | None
    """``[group, unit]``."""


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
    """Block that is edited first."""

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, chosen: slice | IntArray) -> Rows:
        return Rows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

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
        self, patches: Sequence[Patch], runs: Runs, n_prompts: int, reach: IntArray, last: int, device: torch.device
    ) -> None:
        self.runs, self.n_prompts, self.device = runs, n_prompts, device
        self.names = list(dict.fromkeys(patch.run for patch in patches))
        """Runs that are patched; a context is ``index of the run * number of prompts + prompt``."""
        self.groups = _grouped(patches, n_prompts)
        self._reach, self._last, self._n = reach, last, len(patches)
        self.rows = self._rows(patches)

    def _rows(self, patches: Sequence[Patch]) -> Rows:
        first = np.zeros((self._n, self.n_prompts), dtype=np.int64)
        for group in self.groups:
            first[group.patches] = group.positions.min(-1)
        entry = np.array([patch.start for patch in patches], dtype=np.int64)
        run = np.array([self.names.index(patch.run) for patch in patches], dtype=np.int64)
        # What is read before the edit, in depth or in position, cannot move: such rows are not run at all.
        moved = (first < self._reach) & (entry <= self._last)[:, None]
        patch, prompt = moved.nonzero()
        order = np.argsort(entry[patch], kind="stable")
        patch, prompt = patch[order], prompt[order]
        return Rows(
            patch, prompt, run[patch] * self.n_prompts + prompt, first[patch, prompt], self._reach[prompt], entry[patch]
        )

    def ops(self, rows: Rows, layout: Layout, last: int) -> list[PackedOp]:
        """The edits of some rows: the root edits of each row's run, then each row's own patch."""
        found = []
        for name in self.names:
            for root in self.runs[name]:
                found += self._root(root, self.names.index(name), rows, layout, last)
        own = (rows.patches >= 0).nonzero()[0]
        row_of = np.full((self._n, self.n_prompts), -1, dtype=np.int64)
        row_of[rows.patches[own], rows.prompts[own]] = own
        present = np.zeros(self._n, dtype=bool)
        present[rows.patches[own]] = True
        for group in self.groups:
            mine = present[group.patches]
            if mine.any():
                found += self._own(group, mine, row_of, layout, last)
        return found

    def _own(self, group: _Group, mine: IntArray, row_of: IntArray, layout: Layout, last: int) -> list[PackedOp]:
        patches = group.patches[mine]
        row = row_of[patches]
        which, prompt = (row >= 0).nonzero()
        row = row[which, prompt]
        by_prompt = prompt if group.positions.shape[1] > 1 else np.zeros_like(prompt)
        positions = group.positions[mine][which, by_prompt]
        sources = group.source_positions[mine][which, by_prompt]
        places = positions.shape[1]
        row, prompt, which = (np.repeat(x, places) for x in (row, prompt, which))
        inside = positions.ravel() < self._reach[prompt]  # of several positions some may lie behind what is read
        positions, sources = positions.ravel()[inside], sources.ravel()[inside]
        row, prompt, which = row[inside], prompt[inside], which[inside]
        table = to_device(
            np.stack([layout.tokens_of(row, positions), prompt, positions, patches[which], sources]), self.device
        )
        units = None if group.units is None else to_device(group.units[mine][which], self.device)
        return [
            PackedOp(
                group.site,
                layer,
                group.edit,
                table[0],
                table[1],
                table[2],
                units=units,
                owners=table[3],
                source_run=group.source_run,
                source_positions=table[4],
            )
            for layer in group.layers
            if layer <= last
        ]

    def _root(self, root: Patch, run: int, rows: Rows, layout: Layout, last: int) -> list[PackedOp]:
        where = _positions(root.positions, self.n_prompts)
        mine = (rows.contexts // self.n_prompts == run).nonzero()[0]
        prompt = rows.prompts[mine]
        positions = where[prompt if len(where) > 1 else np.zeros_like(prompt)]
        places = positions.shape[1]
        row, prompt, positions = np.repeat(mine, places), np.repeat(prompt, places), positions.ravel()
        # Before a row's first token the run's own keys and values stand, in which the root edit is already in force.
        inside = (positions >= rows.starts[row]) & (positions < rows.stops[row])
        row, prompt, positions = row[inside], prompt[inside], positions[inside]
        table = to_device(np.stack([layout.tokens_of(row, positions), prompt, positions]), self.device)
        units = None if root.units is None else torch.tensor(root.units, device=self.device).expand(len(row), -1)
        ops = []
        for layer in root.layers:
            # A row comes into its first block with a residual stream that was captured after the root edit there.
            under_way = layout.n_rows(layer - (root.site == RESID_PRE))
            n = int(np.searchsorted(row, under_way))
            if n and layer <= last:
                tokens, prompts, at = table[:, :n]
                mine = None if units is None else units[:n]
                ops.append(PackedOp(root.site, layer, root.edit, tokens, prompts, at, units=mine))
        return ops


def _grouped(patches: Sequence[Patch], n_prompts: int) -> list[_Group]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, patch in enumerate(patches):
        # Transplants have no parameters: one is as good as another.
        edit = Transplant if type(patch.edit) is Transplant else id(patch.edit)
        size = None if patch.units is None else len(patch.units)
        source = patch.source
        shapes = (_shape(patch.positions), None if source is None else (source.run, _shape(source.positions)))
        groups[patch.site, patch.layers, edit, size, *shapes].append(index)
    return [_group([patches[i] for i in indices], np.array(indices), n_prompts) for indices in groups.values()]


def _shape(positions: Positions | None) -> tuple[bool, int]:
    """Whether they are given per prompt, and how many there are (prompts with unequal numbers stand alone)."""
    if positions is None:
        return False, 0
    if not isinstance(positions[0], tuple):
        return False, len(positions)
    sizes = {len(mine) for mine in positions}  # type: ignore[arg-type]
    return True, sizes.pop() if len(sizes) == 1 else -id(positions)


def _group(patches: Sequence[Patch], indices: IntArray, n_prompts: int) -> _Group:
    one = patches[0]
    positions = _stacked([patch.positions for patch in patches], n_prompts)
    sources = positions
    if one.source is not None and one.source.positions is not None:
        sources = _stacked([patch.source.positions for patch in patches], n_prompts)  # type: ignore[union-attr]
        positions, sources = np.broadcast_arrays(positions, sources)
    return _Group(
        site=one.site,
        layers=one.layers,
        edit=one.edit,
        source_run=one.source.run if one.source else None,
        patches=indices,
        positions=positions,
        source_positions=sources,
        units=None if one.units is None else np.array([patch.units for patch in patches], dtype=np.int64),
    )


def _stacked(positions: Sequence[Positions], n_prompts: int) -> IntArray:
    """``[patch, prompt or 1, place]``."""
    if not isinstance(positions[0][0], tuple):
        return np.array(positions, dtype=np.int64)[:, None]
    return np.stack([_positions(mine, n_prompts) for mine in positions])


def _positions(positions: Positions, n_prompts: int) -> IntArray:
    """``[prompt or 1, place]``; where prompts have unequal numbers, the last of each is repeated."""
    if not isinstance(positions[0], tuple):
        return np.array(positions, dtype=np.int64)[None]
    most = max(len(mine) for mine in positions)  # type: ignore[arg-type]
    filled = [[*mine, *[mine[-1]] * (most - len(mine))] for mine in positions]  # type: ignore[misc]
    assert len(filled) == n_prompts
    return np.array(filled, dtype=np.int64)
