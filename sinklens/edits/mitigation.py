"""Edits that take a sink away without training: keys evicted, massive activations, dimensions scaled down,
a subspace removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from sinklens.edits.base import Edit, EditSite, Gathered, among_kept


@dataclass(frozen=True, eq=False)
class KeepKeys(Edit):
    """Let a query see the first keys and the last ones alone: what is evicted from a key-value cache is not there.

    On ``hook_pattern``, as masking the others with minus infinity before the softmax does. Pitfall: where the evicted
    keys have left all others a weight of zero in the pattern's precision, the result is NaN.
    """

    name: str = "evicted"
    window: int = 0
    """How many keys the cache keeps of those just before the query's own, which it always sees."""
    first: int = 0
    """How many of the prompt's first keys it keeps besides."""
    slot: bool = False
    """Whether a part of the attention goes to no key (a sink logit, softmax-off-by-one): that part stays in the sum."""

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        keys, queries = torch.arange(x.shape[-1], device=x.device), at.positions.to(x.device)[:, None]
        kept = (keys < self.first) | (keys >= queries - self.window)
        return among_kept(x, kept[:, None], slot=self.slot)


@dataclass(frozen=True, eq=False)
class ReplaceMassive(Edit):
    """Replace the massive activations of a hidden state, wherever they are.

    An entry of ``dims`` is massive where its magnitude exceeds ``limit``. It becomes zero, a value of its dimension's
    own, or is cut to a magnitude. All other entries stay.
    """

    name: str = "massive_zero"
    dims: tuple[int, ...] = ()
    """Dimensions of the residual stream that massive activations are looked for in."""
    limit: float = 100.0
    """Magnitude that a massive activation exceeds."""
    values: Float[Tensor, " dim"] | None = None
    """What takes its place, for each of the dimensions; ``None`` is zero."""
    cut: float | None = None
    """Keep its sign and cut its magnitude to this, in place of ``values``."""
    instead: tuple[int, ...] = ()
    """The control: at the same tokens, as many other dimensions are replaced, one for each of ``dims``."""

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        massive, targets = x[:, list(self.dims)].abs() > self.limit, list(self.instead or self.dims)
        old = x[:, targets]
        if self.cut is not None:
            replaced = old.clamp(-self.cut, self.cut)
        else:
            replaced = torch.zeros_like(old) if self.values is None else self.values.to(x).expand_as(old)
        new = x.clone()
        new[:, targets] = torch.where(massive, replaced, old)
        return new


@dataclass(frozen=True, eq=False)
class Attenuate(Edit):
    """Scale some dimensions of a vector down: ``x_d (1 - amount)`` for chosen d.

    The dimensions are given, or are each vector's own ``k`` largest by ``|x_d w_d|``.
    """

    name: str = "attenuated"
    amount: float = 1.0
    """How much of them is taken away: all with 1."""
    dims: tuple[int, ...] = ()
    """The dimensions, where they are given."""
    k: int = 0
    """How many of each vector's own are taken, where they are not."""
    weights: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)
    """Per block, what the vector is multiplied by behind the edit, w; one where there is none."""

    @property
    @override
    def strength(self) -> float:
        return self.amount

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        mask = torch.zeros_like(x)
        if self.k:
            sizes = x.float() * (self.weights[at.layer].to(x.device) if at.layer in self.weights else 1.0)
            mask.scatter_(-1, sizes.abs().topk(self.k, -1).indices, 1.0)
        else:
            mask[..., list(self.dims)] = 1.0
        return x * (1 - self.amount * mask)


@dataclass(frozen=True, eq=False)
class RemoveSubspace(Edit):
    """Remove the component in the span of an orthonormal basis: ``x - x B B^T``."""

    name: str = "subspace_removed"
    basis: Float[Tensor, "d_model rank"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Orthonormal columns."""

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        basis = self.basis.to(x)
        return x - x @ basis @ basis.T
