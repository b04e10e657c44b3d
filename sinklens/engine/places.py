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
from sinklens.errors import InputError
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
    """Their numbers among all interventions."""
    patches: Int[Tensor, " member"]
    """Numbers of the patches that they belong to."""
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


@dataclass(frozen=True, eq=False)
class Part:
    """One intervention of a patch, which may have several."""

    number: int
    """Its number among all interventions."""
    patch: int
    """Number of the patch that it belongs to."""
    rank: int
    """Its place in that patch: at one hook point interventions act in this order."""
    edit: Patch
    """The intervention, without those that go with it."""


def parts_of(patches: Sequence[Patch], first: int = 0) -> list[Part]:
    """All interventions of some patches, those of a lower rank first; the first patch has the number ``first``."""
    ranked = [(rank, first + number, part) for number, p in enumerate(patches) for rank, part in enumerate(p.parts)]
    ranked.sort(key=lambda item: item[0])
    return [Part(number, patch, rank, part) for number, (rank, patch, part) in enumerate(ranked)]


def group_parts(parts: Iterable[Part], device: torch.device = HOST, *, by_run: bool = False) -> list[PlaceGroup]:
    """Groups of interventions, those of a lower rank first.

    Args:
        parts: the interventions.
        device: where the index arrays go.
        by_run: whether interventions in different runs are kept apart.
    """
    groups: dict[Hashable, list[Part]] = defaultdict(list)
    for part in parts:
        groups[part.rank, _key(part.edit, by_run)].append(part)
    return [_group(members, device) for members in groups.values()]


def group_of(patch: Patch, device: torch.device = HOST) -> PlaceGroup:
    """A group of one intervention alone."""
    return _group([Part(0, 0, 0, patch)], device)


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


def _group(members: Sequence[Part], device: torch.device) -> PlaceGroup:
    edits = [part.edit for part in members]
    like = edits[0]
    positions = _table([patch.where for patch in edits]).to(device)
    own_sources = like.source is not None and like.source.positions is not None
    return PlaceGroup(
        like=like,
        members=torch.tensor([part.number for part in members], device=device),
        patches=torch.tensor([part.patch for part in members], device=device),
        positions=positions,
        source_positions=_sources(edits, positions.shape[-1]).to(device) if own_sources else positions,
        units=None if like.units is None else torch.tensor([patch.units for patch in edits], device=device),
    )


def _table(wheres: Sequence[Positions]) -> Int[Tensor, "member prompt place"]:
    negative = next((row for where in wheres for row in where.rows if row and min(row) < 0), None)
    if negative is not None:  # it would pass for NOWHERE
        raise InputError(f"positions {negative} are not all in 0..: they count from the first token of a prompt")
    longest = max(len(positions) for where in wheres for positions in where.rows)
    padded = [[(*row, *[NOWHERE] * (longest - len(row))) for row in where.rows] for where in wheres]
    return torch.tensor(padded, dtype=torch.long).view(len(wheres), -1, longest)


def _sources(edits: Sequence[Patch], places: int) -> Int[Tensor, "member prompt place"]:
    """Source positions for so many places each; where there is but one it serves all of them."""
    wheres = [patch.source_where for patch in edits]
    repeated = [Positions(tuple(row * places if len(row) == 1 else row for row in w.rows), w.shared) for w in wheres]
    return _table(repeated)
