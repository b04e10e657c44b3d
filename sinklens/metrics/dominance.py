"""Dimension disparity: how far a few dimensions dominate a vector."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def dominance_ratio(x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """``max_j |x_j| / mean_j |x_j|``: 1 when all are equal, d when one dimension holds everything; NaN for a zero
    vector.
    """
    magnitude = x.float().abs()
    return magnitude.amax(-1) / magnitude.mean(-1)


def energy_share(x: Float[Tensor, "... d"], dims: Sequence[int]) -> Float[Tensor, "..."]:
    """Share of the squared norm that lies in ``dims``, between 0 and 1; NaN for a zero vector."""
    square = x.float().pow(2)
    return square[..., list(dims)].sum(-1) / square.sum(-1)
