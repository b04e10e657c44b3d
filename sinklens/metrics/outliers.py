"""Outliers: robust scores, and the massive activations of a hidden state.

A massive activation of Sun et al. (COLM 2024) is ``|x| > 100`` and ``|x| > 1000 median |x|``, the median over all
positions and dimensions of that hidden state. Both bounds are conventions of theirs (for the second they say "around"):
a small model can have a sink whose activations reach neither, and ``dominance_ratio`` is the graded measure.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ROUNDINGS = 16
"""Roundings of one number within which two values are equal: a sum over neurons in another order moves it so far."""


def robust_z(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """``(x - median) / (1.4826 MAD)`` along the last axis: a z-score that outliers themselves do not move.

    1.4826 makes the median absolute deviation agree with the standard deviation of a normal distribution. Infinite or
    NaN where more than half of the values are equal, up to what rounding in float32 (in float64 for values in float64)
    makes of equal ones: which of them differ by it, and so the score of each, would go by the processor.
    """
    wide, eps = x.double(), torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    median = wide.quantile(0.5, dim=-1, keepdim=True)
    deviation = wide - median
    deviation = deviation.masked_fill(deviation.abs() <= ROUNDINGS * eps * median.abs(), 0.0)
    return (deviation / (1.4826 * deviation.abs().quantile(0.5, dim=-1, keepdim=True))).float()


def massive_activations(
    x: Float[Tensor, "... pos d"], absolute: float = 100.0, relative: float = 1000.0
) -> Bool[Tensor, "... pos d"]:
    """Which entries are massive activations; every leading entry is a hidden state with a median of its own.

    A NaN is never massive and does not count in the median. Padding does count: cut it off first.

    Args:
        x: hidden states, such as the residual stream after a block.
        absolute: the magnitude to exceed.
        relative: how many times the hidden state's median magnitude to exceed.
    """
    magnitude = x.float().abs()
    flat = magnitude.flatten(-2)
    # The lower and the upper of the two middle values: `quantile` refuses more than 2^24 of them, a long prompt's.
    median = (flat.nanmedian(-1).values - (-flat).nanmedian(-1).values) / 2
    return (magnitude > absolute) & (magnitude > relative * median[..., None, None])
