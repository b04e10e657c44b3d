"""Deviation of an activation from a mean, in units of what is ordinary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def relative_deviation(
    x: Float[Tensor, "batch d"], mean: Float[Tensor, " d"], variance: Float[Tensor, ...]
) -> Float[Tensor, " batch"]:
    """Mean over dimensions of ``(x - mean)^2``, divided by ``variance`` (a scalar: the ordinary mean square deviation).

    About 1 for an ordinary token; averaged over prompts it is the per-dimension variance ratio.
    """
    return (x.float() - mean).pow(2).mean(-1) / variance
