"""Robust outlier scores."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def robust_z(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """``(x - median) / (1.4826 MAD)`` along the last axis: a z-score that outliers themselves do not move.

    1.4826 makes the median absolute deviation agree with the standard deviation of a normal distribution. Infinite or
    NaN where more than half of the values are equal.
    """
    wide = x.double()
    deviation = wide - wide.quantile(0.5, dim=-1, keepdim=True)
    return (deviation / (1.4826 * deviation.abs().quantile(0.5, dim=-1, keepdim=True))).float()
