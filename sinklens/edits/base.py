"""What an edit is: a name, the sites that it must see, and a call on gathered activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from sinklens.records.fingerprint import fingerprint_of
from sinklens.sites import HookSite

Gathered: TypeAlias = Float[Tensor, "pair unit *rest"]


@dataclass(frozen=True, eq=False)
class EditSite:
    """What an edit may know about the places that it is applied to."""

    layer: int
    """Block index."""
    prompts: Int[Tensor, " pair"]
    """Index of the prompt that each pair comes from."""
    positions: Int[Tensor, " pair"]
    """Token position of each pair."""
    units: Int[Tensor, "pair unit"] | None = None
    """Selected unit indices, or ``None`` for the whole axis."""
    live: Mapping[str, Gathered] = field(default_factory=dict)
    """Activations of this forward pass at the places in ``Edit.reads``, by :func:`read_key`."""
    source_live: Mapping[str, Gathered] = field(default_factory=dict)
    """The source run's activations there."""

    def read(self, site: HookSite, block: int | None = None) -> Gathered:
        """What ``Edit.reads`` asked for at ``site``, in the edit's own block or in ``block``."""
        return self.live[read_key(site, block)]

    def read_source(self, site: HookSite, block: int | None = None) -> Gathered:
        """The same of the source run."""
        return self.source_live[read_key(site, block)]


Read: TypeAlias = HookSite | tuple[HookSite, int]
"""A place that an edit must see: a site of its own block, or a site of a block that it names."""


def read_key(site: HookSite, block: int | None = None) -> str:
    """What a read is called in :attr:`EditSite.live`: the template in the edit's own block, else the hook point."""
    return site.template if block is None else site.at(block)


@dataclass(frozen=True)
class ReadPlace:
    """A read of an edit in one block, as a place of the model."""

    key: str
    """What it is called in :attr:`EditSite.live`."""
    site: HookSite
    """Where."""
    layer: int
    """In which block."""


@dataclass(frozen=True)
class Table:
    """Values that an edit brings along, and what they must fit."""

    values: Mapping[int, Tensor] | Tensor
    """Per block, or the same for all."""
    front: tuple[str, ...] = ()
    """Axes in front of the site's own: ``prompt``, ``pos``, ``query`` or ``key``, each of just that size."""
    optional: bool = False
    """Whether the first of those may be left out: one value for all prompts."""
    behind: int | None = None
    """How many of the site's own axes behind the position follow; all, or the last of them, with ``None``."""


@dataclass(frozen=True, eq=False)
class Edit:
    """Base class: a name, the other sites it must see, and a call."""

    name: str
    """Short name, used in tables."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Places, earlier in the forward pass, whose activations the edit needs at its own positions.

        A site is read in the edit's own block; ``(site, block)`` in that one. They are read as they stand there in this
        pass, with all edits of that place.
        """
        return ()

    def reads_in(self, layer: int) -> tuple[ReadPlace, ...]:
        """Where :attr:`reads` lie when the edit is in block ``layer``."""
        places = []
        for read in self.reads:
            site, block = (read, None) if isinstance(read, HookSite) else read
            places.append(ReadPlace(read_key(site, block), site, layer if block is None else block))
        return tuple(places)

    @property
    def uses_source(self) -> bool:
        """Whether the edit needs the activation of a source run."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        """Identities (:data:`sinklens.models.identities.IDENTITIES`) without which the edit is not what it says."""
        return ()

    @property
    def tables(self) -> tuple[Table, ...]:
        """The values that it brings along: the engine and hooks make sure that they fit the model and the prompts, so
        that none is broadcast or picked from wrongly.
        """
        return ()

    @property
    def strength(self) -> float:
        """How strong the edit is, where that is a number (the factor on a deviation, say); NaN where it is none."""
        return math.nan

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        """The edited activation, of the shape of ``x``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 over the class and all parameters: equal edits have equal fingerprints, in every process.

        Functions count by what they do (see :mod:`sinklens.records.fingerprint`).
        """
        return fingerprint_of(self)


@dataclass(frozen=True, eq=False)
class WrappingEdit(Edit):
    """Base class of edits that apply another one: what that one sees, takes, needs and brings along, they do."""

    @property
    def inner(self) -> Edit:
        """The edit that is applied."""
        raise NotImplementedError

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        return self.inner.reads

    @override
    def reads_in(self, layer: int) -> tuple[ReadPlace, ...]:
        return self.inner.reads_in(layer)

    @property
    @override
    def uses_source(self) -> bool:
        return self.inner.uses_source

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return self.inner.needs

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return self.inner.tables

    @property
    @override
    def strength(self) -> float:
        return self.inner.strength


@dataclass(frozen=True, eq=False)
class SourceEdit(Edit):
    """Base class of edits that need the activation of a source run."""

    @property
    @override
    def uses_source(self) -> bool:
        return True


def select(full: Float[Tensor, "unit ..."], like: Gathered, units: Int[Tensor, "pair unit"] | None) -> Tensor:
    """Per-unit parameters broadcast to the pairs of ``like``, on its device and in its dtype."""
    full = full.to(like)
    return full.unsqueeze(0) if units is None else full[units]


def select_own(full: Float[Tensor, "prompt unit ..."], like: Gathered, at: EditSite) -> Tensor:
    """The parameters of each pair's own prompt, on the device of ``like`` and in its dtype."""
    return units_of_each(full.to(like)[at.prompts.to(like.device)], at)


def units_of_each(own: Float[Tensor, "pair unit ..."], at: EditSite) -> Tensor:
    """The selected units of each pair's own parameters."""
    return own if at.units is None else own[torch.arange(len(own), device=own.device)[:, None], at.units]


def among_kept(
    pattern: Float[Tensor, "pair head key"], kept: Bool[Tensor, "pair 1 key"], *, slot: bool = False
) -> Float[Tensor, "pair head key"]:
    """Attention to some keys alone, ``p_j / sum_kept p_j``, computed in float32.

    Of a softmax this is the softmax of the keys that are kept: equal to masking the others with minus infinity before
    it. Where these have left the kept ones a weight of zero in the pattern's precision the result is NaN.

    Args:
        pattern: rows of the pattern.
        kept: which keys are kept.
        slot: whether what a row lacks of one goes to no key, and stays in the sum.
    """
    weights = pattern.float()
    total = (weights * kept).sum(-1, keepdim=True)
    if slot:
        total = total + (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
    return (weights * kept / total).to(pattern)


def need(source: Gathered | None, edit: Edit) -> Gathered:
    """``source``, or a ``ValueError`` that names the edit which cannot do without."""
    if source is None:
        raise ValueError(f"the edit {edit.name!r} needs a source run: give the patch source=Source(...)")
    return source
