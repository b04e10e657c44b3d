"""What a readout is: a number for every row of a batch, reduced on the device while the forward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.sites import HookSite


@dataclass(frozen=True, eq=False)
class Rows:
    """Which prompt each row of a batch is, for readouts."""

    prompts: Int[Tensor, " row"]
    """Prompt index of each row, on the device of the activation."""
    layer: int
    """Block that is being read."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A scalar for every row, reduced on the device while the forward pass runs.

    In each of its blocks ``reduce`` turns the activation ``[row, ...]`` into a small tensor ``[row, ...]``; ``combine``
    turns the stack ``[layer, row, ...]`` of these into one number for every row (the mean over blocks by default).
    """

    name: str
    """Column name in tables."""
    site: HookSite
    """Where it is read."""
    layers: tuple[int, ...]
    """Blocks in which it is read."""
    reduce: Callable[[Tensor, Rows], Tensor]
    """``(activation, rows) -> [row, ...]``."""
    combine: Callable[[Float[Tensor, "layer row *rest"]], Float[Tensor, " row"]] = lambda stack: stack.mean(0)
    """``[layer, row, ...] -> [row]``."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which token each entry of a packed activation is, for readouts."""

    prompts: Int[Tensor, " token"]
    """Prompt index of each token, on the device of the activation."""
    positions: Int[Tensor, " token"]
    """Position of each token in its prompt."""
    layer: int
    """Block that is being read."""


@dataclass(frozen=True, eq=False)
class PositionReadout(Readout):
    """A readout that is a weighted sum over positions: ``sum_i weight[prompt, i] * at(activation at i)``.

    Under a causal mask nothing before a patched position moves, so the engine recomputes the later terms alone and adds
    the run's own sum of the others. Most readouts are such: what a position receives is a sum over queries,
    a norm is a sum with one term, a loss a mean over positions. Make one with
    :func:`sinklens.readouts.over_positions`.
    """

    reduce: Callable[[Tensor, Rows], Tensor] = field(init=False, repr=False)
    """Follows from :attr:`at` and :attr:`weigh`, so that it cannot say anything else."""
    at: Callable[[Float[Tensor, "token *unit"], Tokens], Float[Tensor, "token *rest"]] = lambda act, _tokens: act
    """``(activation [token, unit, ...], tokens) -> [token, ...]``; attention rows are ``[token, head, key]``."""
    weigh: Callable[[int], Float[Tensor, "prompt pos"]] = lambda length: torch.ones(1, length, device="cpu")
    """Length of the prompts to the weight of every position; where it is 0 the activation is not looked at."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduce", self._sum)

    def _sum(self, act: Tensor, rows: Rows) -> Tensor:
        return self.terms(self.site.to_canonical(act), rows).sum(1)

    def terms(self, canonical: Float[Tensor, "row pos *unit"], rows: Rows) -> Float[Tensor, "row pos *rest"]:
        """The weighted terms of every position: their sum over positions is the reading."""
        weights = self.weigh(canonical.shape[1]).to(canonical.device)[rows.prompts]
        row, position = weights.nonzero(as_tuple=True)
        found = self.at(canonical[row, position], Tokens(rows.prompts[row], position, rows.layer)).float()
        out = found.new_zeros(*weights.shape, *found.shape[1:])
        out[row, position] = found * weights[row, position].view(-1, *[1] * (found.ndim - 1))
        return out
