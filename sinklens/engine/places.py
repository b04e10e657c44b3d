"""Patches as index arrays: patches that differ only in their places, as one group.

A group holds its members' positions and units as tensors, so that a hundred thousand patches cost a few kernels, not a
hundred thousand steps of Python. :func:`pairs_of` says which single places the patches of a group have on some prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.edits import Transplant
from sinklens.patches import Patch, Positions

NOWHERE = -1
"""Fills the positions of prompts that have fewer than others."""
HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class PlaceGroup:
    """Interventions that differ only in where they are."""

    like: Patch
    """One of them: site, blocks, edit and source run are those of all."""
    members: Int[Tensor, " member"]
    """Their numbers."""
    positions: Int[Tensor, "member prompt place"]
    """Positions; one prompt on that axis where all share them, :data:`NOWHERE` where there are no more."""
    source_positions: Int[Tensor, "member prompt place"]
    """Positions in the source run, in the same order."""
    units: Int[Tensor, "member unit"] | None
    """Selected units; ``None``: all."""

    def first(self) -> Int[Tensor, "member prompt"]:
        """The first position of every member, in every prompt (or in all)."""
        beyond = torch.iinfo(self.positions.dtype).max
        return self.positions.masked_fill(self.positions == NOWHERE, beyond).amin(-1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Single places of some members of a group on some prompts."""

    of: Int[Tensor, " pair"]
    """Which of the (member, prompt) combinations that were asked for each belongs to."""
    positions: Int[Tensor, " pair"]
    """Token position."""
    source_positions: Int[Tensor, " pair"]
    """Token position in the source run."""
    units: Int[Tensor, "pair unit"] | None
    """Selected units."""


def group_patches(
    numbered: Iterable[tuple[int, Patch]], device: torch.device = HOST, *, by_run: bool
) -> list[PlaceGroup]:
    """Groups of interventions, in the order in which each group's first one comes.

    Args:
        numbered: interventions (patches without companions), with their numbers.
        device: where the index arrays go.
        by_run: whether interventions in different runs are kept apart.
    """
    groups: dict[Hashable, list[tuple[int, Patch]]] = defaultdict(list)
    for number, patch in numbered:
        groups[_key(patch, by_run)].append((number, patch))
    return [_group(members, device) for members in groups.values()]


def numbered_parts(patches: Sequence[Patch], first: int = 0) -> tuple[list[tuple[int, Patch]], list[int]]:
    """All interventions of some patches, and for each the number of its patch.

    First ones come first, then all second ones and so on: at one place a patch's edits act in their order.
    """
    parts = [
        (rank, first + number, part) for number, patch in enumerate(patches) for rank, part in enumerate(patch.parts)
    ]
    parts.sort(key=lambda item: item[0])
    return [(index, part) for index, (_, _, part) in enumerate(parts)], [number for _, number, _ in parts]


def pairs_of(group: PlaceGroup, members: Int[Tensor, " combination"], prompts: Int[Tensor, " combination"]) -> Pairs:
    """The single places of (member, prompt) combinations; ``members`` are indices within the group."""
    rows = prompts if group.positions.shape[1] > 1 else torch.zeros_like(prompts)
    positions = group.positions[members, rows]
    sources = group.source_positions[
        members, prompts if group.source_positions.shape[1] > 1 else torch.zeros_like(prompts)
    ]
    of, place = (positions != NOWHERE).nonzero(as_tuple=True)
    units = None if group.units is None else group.units[members[of]]
    return Pairs(of, positions[of, place], sources[of, place], units)


def _key(patch: Patch, by_run: bool) -> Hashable:
    source = patch.source
    return (
        patch.site,
        patch.layers,
        # Transplants have no parameters: one is as good as another. Of other edits a group keeps one alive, so that no
        # other gets the same id.
        Transplant if type(patch.edit) is Transplant else id(patch.edit),
        None if patch.units is None else len(patch.units),
        patch.run if by_run else None,
        None if source is None else source.run,
        None if source is None or source.positions is None else Positions.of(source.positions).shared,
        patch.where.shared,
    )


def _group(members: Sequence[tuple[int, Patch]], device: torch.device) -> PlaceGroup:
    like = members[0][1]
    positions = _table([patch.where for _, patch in members]).to(device)
    own_sources = like.source is not None and like.source.positions is not None
    units = None
    if like.units is not None:
        units = torch.tensor([patch.units for _, patch in members], device=device)
    return PlaceGroup(
        like=like,
        members=torch.tensor([number for number, _ in members], device=device),
        positions=positions,
        source_positions=_table([p.source_where for _, p in members]).to(device) if own_sources else positions,
        units=units,
    )


def _table(wheres: Sequence[Positions]) -> Int[Tensor, "member prompt place"]:
    longest = max(len(positions) for where in wheres for positions in where.rows)
    padded = [[(*row, *[NOWHERE] * (longest - len(row))) for row in where.rows] for where in wheres]
    return torch.tensor(padded, dtype=torch.long).view(len(wheres), -1, longest)
