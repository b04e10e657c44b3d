"""Patches in groups that are estimated together: the same site, blocks, edit and runs, at many places.

A group holds its patches' places as tensors, so that a hundred thousand patches cost a few kernels, not a hundred
thousand steps of Python.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.view import ModelShape
from sinklens.patches import Patch, Positions
from sinklens.sites import HookSite

NOWHERE = -1
"""Fills the places of prompts that have fewer positions than others."""


@dataclass(frozen=True, eq=False)
class Group:
    """Patches that differ only in where they are."""

    like: Patch
    """One of them: site, blocks, edit and runs are those of all."""
    patches: Int[Tensor, " patch"]
    """Their indices."""
    positions: Int[Tensor, "patch prompt slot"]
    """Positions; one prompt on that axis where they are the same for all, :data:`NOWHERE` where there are no more."""
    source_positions: Int[Tensor, "patch prompt slot"] | None
    """Positions in the source run, in the same order; ``None``: the same."""
    units: Int[Tensor, "patch unit"] | None
    """Selected units."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The (patch, prompt, position) triples of a slice of a group, one row for each."""

    patches: Int[Tensor, " pair"]
    """Index of the patch within the slice."""
    rows: Int[Tensor, " pair"]
    """Index of the prompt within the pass."""
    positions: Int[Tensor, " pair"]
    """Token position."""
    source_positions: Int[Tensor, " pair"]
    """Token position in the source run."""
    units: Int[Tensor, "pair unit"] | None
    """Selected units."""


def group_patches(patches: Iterable[Patch], first: int, device: torch.device) -> list[Group]:
    """Groups of patches whose indices start at ``first``."""
    found: dict[tuple, list[tuple[int, Patch]]] = defaultdict(list)
    for index, patch in enumerate(patches, first):
        found[_key(patch)].append((index, patch))
    return [_group(members, device) for members in found.values()]


def check_places(group: Group, shape: ModelShape, n_prompts: int, length: int) -> None:
    """Refuse positions and units that do not exist, which on a GPU would bring the process down.

    Raises:
        InputError: with what is wrong.
    """
    for places in (group.positions, group.source_positions):
        if places is None:
            continue
        if places.shape[1] not in (1, n_prompts):
            raise InputError(f"positions are given for {places.shape[1]} prompts, but there are {n_prompts}")
        if (places >= length).any() or (places < NOWHERE).any() or (places == NOWHERE).all(-1).any():
            raise InputError(f"positions are not all in 0..{length - 1}: {group.like.describe()}")
    if group.units is not None:
        size = unit_count(shape, group.like.site)
        if (group.units < 0).any() or (group.units >= size).any():
            raise InputError(f"units are not all in 0..{size - 1}: {group.like.describe()}")


def unit_count(shape: ModelShape, site: HookSite) -> int:
    """How many units a site has.

    Raises:
        InputError: when it has none.
    """
    sizes = {"head": shape.n_heads, "kv_head": shape.n_kv_heads, "d_mlp": shape.d_mlp, "d_model": shape.d_model}
    if site.unit_name is None:
        raise InputError(f"{site.template} has no units to select")
    return sizes[site.unit_name]


def pairs_of(group: Group, chosen: slice, prompts: Int[Tensor, " prompt"]) -> Pairs:
    """The pairs of the patches in ``chosen`` on some prompts."""
    positions = _on(group.positions[chosen], prompts)
    source = positions if group.source_positions is None else _on(group.source_positions[chosen], prompts)
    patch, row, slot = (positions != NOWHERE).nonzero(as_tuple=True)
    return Pairs(
        patches=patch,
        rows=row,
        positions=positions[patch, row, slot],
        source_positions=source.expand(*positions.shape[:2], -1)[patch, row, slot],
        units=None if group.units is None else group.units[chosen][patch],
    )


def _on(places: Tensor, prompts: Tensor) -> Int[Tensor, "patch prompt slot"]:
    return places.expand(-1, len(prompts), -1) if places.shape[1] == 1 else places[:, prompts]


def _key(patch: Patch) -> tuple:
    source = patch.source
    return (
        patch.site,
        patch.layers,
        id(patch.edit),  # every group keeps its edit alive, so no other edit gets the same id
        None if patch.units is None else len(patch.units),
        patch.run,
        None if source is None else source.run,
        None if source is None or source.positions is None else _shape(source.positions),
        _shape(patch.positions),
    )


def _shape(positions: Positions) -> int:
    """How many prompts positions are given for: 1 where they are the same for all."""
    return len(positions) if positions and isinstance(positions[0], tuple) else 1


def _group(members: Sequence[tuple[int, Patch]], device: torch.device) -> Group:
    like = members[0][1]
    sources = [patch.source.positions for _, patch in members if patch.source and patch.source.positions is not None]
    units = None
    if like.units is not None:
        units = torch.tensor([patch.units for _, patch in members], device=device)
    return Group(
        like=like,
        patches=torch.tensor([index for index, _ in members], device=device),
        positions=_table([patch.positions for _, patch in members]).to(device),
        source_positions=_table(sources).to(device) if sources else None,
        units=units,
    )


def _table(places: Sequence[Positions]) -> Int[Tensor, "patch prompt slot"]:
    rows = [p if p and isinstance(p[0], tuple) else (p,) for p in places]
    longest = max(len(one) for row in rows for one in row)  # type: ignore[arg-type]  # every entry is a tuple now
    padded = [[(*one, *[NOWHERE] * (longest - len(one))) for one in row] for row in rows]  # type: ignore[misc, arg-type]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), -1, longest)
