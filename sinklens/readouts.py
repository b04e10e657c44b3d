"""Readouts: scalars that say how far a run has gone, for the engine to reduce inside the forward pass.

Each function builds a :class:`~sinklens.patches.Readout`; positions are given as one position for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens import metrics
from sinklens.patches import Positions, Readout, Rows, per_prompt_index
from sinklens.sites import PATTERN, HookSite

OnePosition = Int[Tensor, " prompt"]


def at_position(act: Tensor, site: HookSite, rows: Rows, positions: OnePosition) -> Tensor:
    """``[row, unit, ...]``: the activation at each row's own position."""
    canonical = site.to_canonical(act)
    where = positions.to(act.device)[rows.prompts]
    return canonical[torch.arange(len(where), device=act.device), where]


def attention_received(name: str, layers: Sequence[int], positions: Positions, n_prompts: int) -> Readout:
    """Attention received by each prompt's position from later queries, averaged over heads and blocks."""
    where = per_prompt_index(positions, n_prompts)

    def reduce(act: Tensor, rows: Rows) -> Tensor:
        key = where.to(act.device)[rows.prompts]
        column = act.float().take_along_dim(key[:, None, None, None], dim=-1).squeeze(-1).mean(1)
        later = torch.arange(act.shape[-2], device=act.device) > key[:, None]
        return (column * later).sum(-1) / later.sum(-1)

    return Readout(name, PATTERN, tuple(layers), reduce)


def attention_ordinary(name: str, layers: Sequence[int], ordinary: Float[Tensor, "prompt pos"]) -> Readout:
    """Attention received by an ordinary position: the mean over each prompt's positions that ``ordinary`` marks
    with 1.
    """

    def reduce(act: Tensor, rows: Rows) -> Tensor:
        received = metrics.attention_received(act).mean(1)
        weight = ordinary.to(received)[rows.prompts]
        return torch.where(weight > 0, received * weight, 0).sum(-1) / weight.sum(-1)

    return Readout(name, PATTERN, tuple(layers), reduce)


def vector_readout(
    name: str,
    site: HookSite,
    layers: Sequence[int],
    positions: Positions,
    n_prompts: int,
    function: Callable[[Tensor, int], Tensor],
    combine: Callable[[Tensor], Tensor] | None = None,
) -> Readout:
    """``function(vector [row, unit, ...], block) -> [row, ...]`` of the activation at each prompt's position."""
    where = per_prompt_index(positions, n_prompts)

    def reduce(act: Tensor, rows: Rows) -> Tensor:
        return function(at_position(act, site, rows, where), rows.layer)

    if combine is None:
        return Readout(name, site, tuple(layers), reduce)
    return Readout(name, site, tuple(layers), reduce, combine)


def deviation(
    name: str,
    site: HookSite,
    layers: Sequence[int],
    positions: Positions,
    n_prompts: int,
    statistics: Mapping[int, tuple[Tensor, Tensor]],
) -> Readout:
    """Squared deviation from the ordinary mean in units of the ordinary variance; ``statistics`` is (mean,
    variance).
    """

    def function(x: Tensor, layer: int) -> Tensor:
        mean, variance = statistics[layer]
        return metrics.relative_deviation(x.flatten(1), mean.flatten().to(x.device), variance.to(x.device))

    return vector_readout(name, site, layers, positions, n_prompts, function)


def attention_rows(
    name: str, layers: Sequence[int], statistic: Callable[[Tensor], Tensor], queries: Float[Tensor, "prompt pos"]
) -> Readout:
    """``statistic(pattern) -> [batch head query]`` averaged over heads and over the queries that ``queries`` marks."""

    def reduce(act: Tensor, rows: Rows) -> Tensor:
        values = statistic(act).mean(1)
        weight = queries.to(values)[rows.prompts]
        return (values * weight).sum(-1) / weight.sum(-1)

    return Readout(name, PATTERN, tuple(layers), reduce)
