"""Dimension disparity: how far a few dimensions dominate a vector.

Four views of one thing. The dominance ratio ``max_j |x_j| / mean_j |x_j|`` sees the largest dimension alone. The
energy share ``sum_{j in S} x_j^2 / sum_j x_j^2`` is that of given dimensions, or of the k largest. The excess kurtosis
``m4 / m2^2 - 3`` is about the tails, the Gini coefficient ``sum_ij ||x_i| - |x_j|| / (2 n sum_j |x_j|)`` about all
magnitudes together. Only the kurtosis sees signs, and none sees scale. All depend on d: compare vectors of one width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def dominance_ratio(x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """``max_j |x_j| / mean_j |x_j|``: 1 when all are equal, d when one dimension holds everything; NaN for a zero
    vector.
    """
    magnitude = x.float().abs()
    return magnitude.amax(-1) / magnitude.mean(-1)


def top1_over_median(x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """``max_j |x_j| / median_j |x_j|``: the ratio by which massive activations are told; infinite where more than half
    are zero, NaN for a zero vector.
    """
    magnitude = x.float().abs()
    return magnitude.amax(-1) / magnitude.quantile(0.5, dim=-1)


def energy_share(x: Float[Tensor, "... d"], dims: Sequence[int]) -> Float[Tensor, "..."]:
    """Share of the squared norm that lies in ``dims``, between 0 and 1; NaN for a zero vector."""
    square = x.float().pow(2)
    return square[..., list(dims)].sum(-1) / square.sum(-1)


def top_energy_share(x: Float[Tensor, "... d"], k: int) -> Float[Tensor, "..."]:
    """Share of the squared norm that lies in each vector's own ``k`` largest dimensions; NaN for a zero vector.

    At least ``k / d``, which is its value when all are equal.
    """
    square = x.float().pow(2)
    return square.topk(k, dim=-1).values.sum(-1) / square.sum(-1)


def excess_kurtosis(x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """Fisher's kurtosis ``m4 / m2^2 - 3``, biased moments about the mean: about 0 for normal values, near d when one of
    many dimensions holds everything; NaN where all are equal.
    """
    wide = x.double()
    deviation = wide - wide.mean(-1, keepdim=True)
    kurtosis = (deviation / deviation.pow(2).mean(-1, keepdim=True).sqrt()).pow(4).mean(-1) - 3
    # Asked of the values themselves: the mean of equal values is rounded, and leaves deviations that mean nothing.
    return kurtosis.masked_fill(wide.amax(-1) == wide.amin(-1), torch.nan).float()


def gini(x: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """Gini coefficient of the magnitudes: 0 when all are equal, ``(n - 1) / n`` when one holds everything; NaN when all
    are zero.
    """
    magnitude = x.double().abs().sort(dim=-1).values
    n = magnitude.shape[-1]
    # In ascending order the i-th of n is the larger one in i - 1 pairs and the smaller one in n - i.
    pairs = torch.arange(1 - n, n, 2, dtype=magnitude.dtype, device=magnitude.device)
    return ((pairs * magnitude).sum(-1) / (n * magnitude.sum(-1))).float()
