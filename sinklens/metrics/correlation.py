"""Rank correlation: Kendall's tau-b.

``tau = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(n_x n_y)``, where ``n_x`` is the number of pairs that x does
not tie. It asks only whether two quantities rise together, so a few huge values (of W_O, or a variance) do not decide
it. Its standard deviation under independence is about ``2 / (3 sqrt(n))``. The taus of one x with many y are not
independent, so judge their mean against that of permuted draws of x.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Signs of one tile of pairs, for every draw and item, in bytes. A tile's sums stay whole numbers far below 2^24, which
# float32 adds without error.
_TILE_BYTES = 256_000_000
_LARGEST_TILE = 64  # larger ones are slower: they leave the processor's cache and waste more of the diagonal


def kendall_tau(x: Float[Tensor, "draw n"], y: Float[Tensor, "item n"]) -> Float[Tensor, "draw item"]:
    """Kendall's tau-b between every row of x and every row of y; NaN where either is constant or holds a NaN.

    The pairs are counted exactly, on the device of the inputs, as matrix products of signs over tiles of pairs.
    """
    n = x.shape[-1]
    if y.shape[-1] != n:
        raise ValueError(f"x and y must have as many values in each row, not {n} and {y.shape[-1]}")
    tile = max(1, min(_LARGEST_TILE, math.isqrt(_TILE_BYTES // (4 * max(1, len(x) + len(y))))))
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    agreement = torch.zeros(len(x), len(y), dtype=torch.long, device=x.device)
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            signs = _signs(ranks_x, i, j, tile)
            if i == j:
                signs = signs.triu(1)  # each pair once, and none with itself
            agreement += (signs.flatten(1) @ _signs(ranks_y, i, j, tile).flatten(1).T).long()
    scale = _untied_pairs(ranks_x).sqrt()[:, None] * _untied_pairs(ranks_y).sqrt()
    tau = (agreement / scale).clamp(-1, 1)  # 0 / 0 is NaN where all pairs are tied
    return tau.masked_fill(x.isnan().any(-1)[:, None] | y.isnan().any(-1), torch.nan).float()


def _ranks(x: Float[Tensor, "row n"]) -> Float[Tensor, "row n"]:
    # How many are smaller. Differences of ranks have the signs of the values' own, also where those are infinite or
    # closer than float32 tells.
    x = x.contiguous()
    return torch.searchsorted(x.sort(dim=-1).values, x).float()


def _signs(ranks: Float[Tensor, "row n"], i: int, j: int, tile: int) -> Float[Tensor, "row left right"]:
    return (ranks[:, i : i + tile, None] - ranks[:, None, j : j + tile]).clamp_(-1, 1)


def _untied_pairs(ranks: Float[Tensor, "row n"]) -> Float[Tensor, " row"]:
    n = ranks.shape[-1]
    ordered = ranks.sort(dim=-1).values
    equal = torch.searchsorted(ordered, ranks, right=True) - torch.searchsorted(ordered, ranks)
    return (n * n - equal.sum(-1)).double() / 2
