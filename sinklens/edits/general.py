"""General edits: exchange, ablate, rescale, project, permute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sinklens.edits.base import (
    Edit,
    EditSite,
    Gathered,
    Read,
    SourceEdit,
    Table,
    WrappingEdit,
    need,
    select,
    select_own,
    units_of_each,
)
from sinklens.sites import HookSite


@dataclass(frozen=True, eq=False)
class Transplant(SourceEdit):
    """Replace the activation with the source run's."""

    name: str = "transplant"

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        return need(source, self)


@dataclass(frozen=True, eq=False)
class Interpolate(SourceEdit):
    """Go a part of the way to the source: ``x + amount (source - x)``, beyond it with an amount above 1."""

    name: str = "interpolate"
    amount: float = 0.5
    """The part of the way."""

    @property
    @override
    def strength(self) -> float:
        return self.amount

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        # The ends are exact: all of the way is the source itself.
        return torch.lerp(x, need(source, self), self.amount)


@dataclass(frozen=True, eq=False)
class Function(SourceEdit):
    """A function of the activation and the source's: the short way to an edit of your own.

    ``Function("halfway", lambda x, source: (x + source) / 2)``
    """

    name: str = "function"
    function: Callable[[Gathered, Gathered], Gathered] = lambda _x, source: source
    """``(x, source) -> new``, each ``[pair, unit, ...]``."""

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        return self.function(x, need(source, self))


def resized(x: Float[Tensor, "*any d"], like: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
    """Vectors at the length of others, along the last axis (for every head by itself, where there are heads); 0 where
    there is no direction.
    """
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, x / size * like.norm(dim=-1, keepdim=True), torch.zeros_like(x))


DIRECTION_ONLY = Function("direction_only", lambda x, source: resized(source, x))
"""The source's direction at the activation's own norm."""
NORM_ONLY = Function("norm_only", lambda x, source: resized(x, source))
"""The activation's own direction at the source's norm."""


@dataclass(frozen=True, eq=False)
class Constant(Edit):
    """Replace the activation with a constant: zero by default, a mean when ``values`` is given."""

    name: str = "zero"
    values: Mapping[int, Float[Tensor, "unit ..."]] | None = None
    """Per block, the constant for every unit of the site; ``None`` is zero."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return () if self.values is None else (Table(self.values),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        if self.values is None:
            return torch.zeros_like(x)
        return select(self.values[at.layer], x, at.units).expand_as(x)


@dataclass(frozen=True, eq=False)
class PerPrompt(Edit):
    """Replace the activation with a value of each prompt's own: resample ablation."""

    name: str = "resample"
    values: Mapping[int, Float[Tensor, "prompt unit *rest"]] = field(default_factory=dict)
    """Per block, the new value of every unit for every prompt."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.values, ("prompt",)),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        return select_own(self.values[at.layer], x, at)


@dataclass(frozen=True, eq=False)
class PerPosition(Edit):
    """Replace the activation with a value of each prompt's and position's own: what another run has there, say."""

    name: str = "per_position"
    values: Mapping[int, Float[Tensor, "prompt pos unit *rest"]] = field(default_factory=dict)
    """Per block, the new value of every unit for every prompt and position, of which those of the patch are taken."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.values, ("prompt", "pos")),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        full = self.values[at.layer].to(x)
        return units_of_each(full[at.prompts.to(x.device), at.positions.to(x.device)], at)


@dataclass(frozen=True, eq=False)
class Rescale(Edit):
    """Rescale the deviation from a mean: ``mean + scale * (x - mean)``.

    With a scalar scale this is variance amplification; with ``scale = sigma_target / sigma`` per dimension it matches
    second moments and leaves the mean alone.
    """

    name: str = "rescale"
    mean: Mapping[int, Float[Tensor, "..."]] = field(default_factory=dict)
    """Per block, the mean that is left in place, ``[unit, ...]``, or ``[prompt, unit, ...]``: each prompt its own."""
    scale: Mapping[int, Float[Tensor, "..."]] = field(default_factory=dict)
    """Per block, the factor on the deviation; broadcasts against the mean."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.mean, ("prompt",), optional=True),)

    @property
    @override
    def strength(self) -> float:
        """The factor, averaged over blocks, units and dimensions."""
        return float(torch.cat([scale.detach().float().flatten().cpu() for scale in self.scale.values()]).mean())

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        full, own = self.mean[at.layer], self.mean[at.layer].ndim == x.ndim
        mean = select_own(full, x, at) if own else select(full, x, at.units)
        full_scale = self.scale[at.layer].to(x).expand(full.shape[1:] if own else full.shape)
        return mean + select(full_scale, x, at.units) * (x - mean)


@dataclass(frozen=True, eq=False)
class SameNormScaling(WrappingEdit):
    """The norm-only control of another edit: scale ``x`` uniformly to the norm which that edit would give it."""

    name: str = "same_norm"
    of: Edit = field(default_factory=lambda: Constant())
    """The edit whose output norm is copied."""

    @property
    @override
    def inner(self) -> Edit:
        return self.of

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        target = self.of(x, source, at).flatten(1).norm(dim=-1)
        norm = x.flatten(1).norm(dim=-1)
        factor = torch.where(norm > 0, target / norm, 1.0)  # a zero vector has no direction to keep
        return x * factor.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class Subspace(SourceEdit):
    """Transplant only the component in the span of an orthonormal basis: ``x + (source - x) B B^T``."""

    name: str = "subspace"
    basis: Float[Tensor, "d_model rank"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Orthonormal columns."""

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        basis = self.basis.to(x)
        return x + (need(source, self) - x) @ basis @ basis.T


@dataclass(frozen=True, eq=False)
class OutsideSubspace(Subspace):
    """Transplant all but the component in the span of an orthonormal basis: ``source - (source - x) B B^T``."""

    name: str = "outside_subspace"

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        return x + need(source, self) - super().__call__(x, source, at)


@dataclass(frozen=True, eq=False)
class WrittenBy(SourceEdit):
    """Carry over what some sites of earlier blocks have written differently, in the span of an orthonormal basis.

    ``x + sum_i (w_i_source - w_i) B B^T`` over the writers ``w_i``, for ``x`` in the residual stream: over all that
    write to it, this is :class:`Subspace`.
    """

    name: str = "written_by"
    basis: Float[Tensor, "d_model rank"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Orthonormal columns."""
    writers: tuple[tuple[HookSite, int], ...] = ()
    """Sites and blocks that write."""

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        return self.writers

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        need(source, self)
        basis, written = self.basis.to(x), torch.zeros_like(x)
        for site, block in self.writers:
            written += at.read_source(site, block) - at.read(site, block)
        return x + written @ basis @ basis.T


@dataclass(frozen=True, eq=False)
class Masked(SourceEdit):
    """Transplant only some units, which may be others in every block."""

    name: str = "masked"
    masks: Mapping[int, Float[Tensor, " unit"]] = field(default_factory=dict)
    """Per block, 1 for the units that are transplanted and 0 for the rest."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.masks, behind=1),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        mask = select(self.masks[at.layer], x, at.units)
        mask = mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))
        return torch.where(mask > 0, need(source, self), x)


@dataclass(frozen=True, eq=False)
class PermuteWithin(Edit):
    """Permute the entries of every unit's vector (for ``hook_z``: within each head).

    The per-position variance and the norm stay exactly the same, the alignment with what reads the vector is
    destroyed; permuting the activation is the same as permuting the rows of the matrix that reads it.
    """

    name: str = "permuted"
    permutation: Int[Tensor, "unit d_head"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """For every unit, a permutation of its entries."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.permutation),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        order = self.permutation.to(x.device)
        order = order.unsqueeze(0).expand(len(x), -1, -1) if at.units is None else order[at.units]
        return x.gather(-1, order)


@dataclass(frozen=True, eq=False)
class RemoveDirection(Edit):
    """Remove the component along a unit direction: ``x - (x . u) u``, one direction per block and unit."""

    name: str = "direction_removed"
    directions: Mapping[int, Float[Tensor, "unit d_head"]] = field(default_factory=dict)
    """Per block, a unit vector for every unit."""

    @property
    @override
    def tables(self) -> tuple[Table, ...]:
        return (Table(self.directions),)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        u = select(self.directions[at.layer], x, at.units)
        return x - (x * u).sum(-1, keepdim=True) * u


@dataclass(frozen=True, eq=False)
class OfSource(WrappingEdit):
    """Apply another edit to the source's activation and transplant the result."""

    name: str = "of_source"
    edit: Edit = field(default_factory=lambda: Constant())
    """The edit that is applied to the source run's activation."""
    background: tuple[int, ...] | None = None
    """Units that the inner edit applies to while all units are transplanted; ``None``: all of them."""

    @property
    @override
    def inner(self) -> Edit:
        return self.edit

    @property
    @override
    def uses_source(self) -> bool:
        return True

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        source = need(source, self)
        at = replace(at, live=at.source_live)
        if self.background is None:
            return self.edit(source, source, at)
        units = torch.tensor(self.background, device=source.device)
        inner = source[:, units]
        out = source.clone()
        out[:, units] = self.edit(inner, inner, replace(at, units=units.expand(len(source), -1)))
        return out
