"""Readouts: scalars that say how far a run has gone, for the engine to reduce inside the forward pass.

Each function builds a :class:`PositionReadout`, a weighted sum over positions, of which the engine
recomputes only what a patch can move. Positions are given as one position for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens import metrics
from sinklens.errors import InputError
from sinklens.patches import Positions, Where
from sinklens.readouts.base import PositionReadout, Rows, Tokens
from sinklens.sites import LOGITS, PATTERN, HookSite

OnePosition = Int[Tensor, " prompt"]


def at_position(act: Tensor, site: HookSite, rows: Rows, positions: OnePosition) -> Tensor:
    """``[row, unit, ...]``: the activation at each row's own position."""
    canonical = site.to_canonical(act)
    where = positions.to(act.device)[rows.prompts]
    return canonical[torch.arange(len(where), device=act.device), where]


def over_positions(
    name: str,
    site: HookSite,
    layers: Sequence[int],
    at: Callable[[Float[Tensor, "token *unit"], Tokens], Float[Tensor, "token *rest"]],
    weigh: Callable[[int], Float[Tensor, "prompt pos"]],
    combine: Callable[[Tensor], Tensor] | None = None,
) -> PositionReadout:
    """``sum_i weight[prompt, i] * at(activation at i)``, averaged over blocks unless ``combine`` says otherwise.

    Args:
        name: column name in tables.
        site: where; for attention patterns ``at`` is given rows ``[token, head, key]``, else ``[token, unit, ...]``.
        layers: blocks.
        at: ``(activation, tokens) -> [token, ...]``; may use a token's own activation only.
        weigh: length of the prompts to the weights ``[prompt pos]``; 0 where a position does not count.
        combine: ``[layer, row, ...] -> [row]``.
    """
    options = {} if combine is None else {"combine": combine}
    return PositionReadout(name, site, tuple(layers), at=at, weigh=weigh, **options)


def attention_received(name: str, layers: Sequence[int], positions: Where, n_prompts: int) -> PositionReadout:
    """Attention received by each prompt's position from later queries, averaged over heads and blocks."""
    key = Positions.of(positions).single(n_prompts)

    def weigh(length: int) -> Tensor:
        later = (torch.arange(length, device="cpu") > key[:, None]).float()
        return later / later.sum(-1, keepdim=True)

    def at(row: Tensor, tokens: Tokens) -> Tensor:
        own = key.to(row.device)[tokens.prompts]
        return row.take_along_dim(own[:, None, None], dim=-1).squeeze(-1).float().mean(1)

    return over_positions(name, PATTERN, layers, at, weigh)


def attention_ordinary(name: str, layers: Sequence[int], ordinary: Float[Tensor, "prompt pos"]) -> PositionReadout:
    """Attention received by an ordinary position: the mean over each prompt's positions that ``ordinary`` marks
    with 1.
    """
    n, length = ordinary.shape
    queries = (length - 1 - torch.arange(length, device="cpu")).clamp(min=1)  # later queries of every key
    share = ordinary / ordinary.sum(-1, keepdim=True) / queries

    def at(row: Tensor, tokens: Tokens) -> Tensor:
        own = share.to(row.device)[tokens.prompts]
        keys = torch.arange(row.shape[-1], device=row.device)
        return (row.float().mean(1) * own[:, : len(keys)] * (keys < tokens.positions[:, None])).sum(-1)

    return over_positions(name, PATTERN, layers, at, lambda length: torch.ones(n, length, device="cpu"))


def vector_readout(
    name: str,
    site: HookSite,
    layers: Sequence[int],
    positions: Where,
    n_prompts: int,
    function: Callable[[Tensor, int], Tensor],
    combine: Callable[[Tensor], Tensor] | None = None,
) -> PositionReadout:
    """``function(vector [row, unit, ...], block) -> [row, ...]`` of the activation at each prompt's position."""
    where = Positions.of(positions).single(n_prompts)

    def weigh(length: int) -> Tensor:
        return torch.nn.functional.one_hot(where, length).float()

    return over_positions(name, site, layers, lambda x, tokens: function(x, tokens.layer), weigh, combine)


def deviation(
    name: str,
    site: HookSite,
    layers: Sequence[int],
    positions: Where,
    n_prompts: int,
    statistics: Mapping[int, tuple[Tensor, Tensor]],
) -> PositionReadout:
    """Squared deviation from the ordinary mean in units of the ordinary variance; ``statistics`` is (mean,
    variance).
    """

    def function(x: Tensor, layer: int) -> Tensor:
        mean, variance = statistics[layer]
        return metrics.relative_deviation(x.flatten(1), mean.flatten().to(x.device), variance.to(x.device))

    return vector_readout(name, site, layers, positions, n_prompts, function)


def next_token_loss(name: str, tokens: Int[Tensor, "prompt pos"], n_layers: int, begin: int = 0) -> PositionReadout:
    """Mean cross entropy of the next token over the positions from ``begin`` to the last but one, nats.

    Args:
        name: column name in tables.
        tokens: the prompts, whose next tokens are predicted.
        n_layers: blocks of the model: logits are read behind the last.
        begin: the first position whose next token counts.

    Raises:
        InputError: no position from ``begin`` on has a next token.
    """
    if not 0 <= begin < tokens.shape[1] - 1:
        raise InputError(f"no token of {tokens.shape[1]} is predicted from position {begin} on: begin earlier")

    def at(logits: Tensor, places: Tokens) -> Tensor:
        nexts = tokens.to(logits.device)[places.prompts, places.positions + 1]
        return torch.nn.functional.cross_entropy(logits.float(), nexts, reduction="none")

    def weigh(length: int) -> Tensor:
        position, last = torch.arange(length, device="cpu"), length - 1
        counts = (position >= begin) & (position < last)
        return counts.float().expand(len(tokens), -1) / (last - begin)

    return over_positions(name, LOGITS, (n_layers,), at, weigh)


def attention_rows(
    name: str, layers: Sequence[int], statistic: Callable[[Tensor], Tensor], queries: Float[Tensor, "prompt pos"]
) -> PositionReadout:
    """``statistic(pattern) -> [batch head query]`` averaged over heads and over the queries that ``queries`` marks."""

    def at(row: Tensor, _tokens: Tokens) -> Tensor:
        return statistic(row.unsqueeze(2)).flatten(1).mean(1)

    return over_positions(name, PATTERN, layers, at, lambda _length: queries / queries.sum(-1, keepdim=True))
