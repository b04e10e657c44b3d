"""Variance of an activation, and deviation from a mean in units of what is ordinary.

``position_variance[t] = mean over j of the variance across prompts of x[prompt, t, j]``. Under a causal mask later
tokens average more values, so that of ``hook_z`` falls with t. A few large dimensions can make the mean over j; the
median tells of an ordinary one. A first token that is the same in every prompt (BOS) has no variance at all.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sinklens.errors import InputError


def position_variance(
    x: Float[Tensor, "prompt pos *unit d"], average: Literal["mean", "median"] = "mean"
) -> Float[Tensor, " pos"]:
    """Unbiased variance across prompts of every dimension at each position, averaged over all dimensions.

    Args:
        x: activations of several prompts, position by position; axes behind ``pos`` (head, d_head) all are dimensions.
        average: how the dimensions are brought together.
    """
    if len(x) < 2:
        raise InputError(f"a variance across prompts needs at least two prompts, not {len(x)}: give more")
    variance = x.float().var(0).flatten(1)
    if average == "mean":
        return variance.mean(-1)
    if average == "median":
        return variance.quantile(0.5, dim=-1)  # not `median`, which gives the lower of the two middle values
    raise ValueError(f"unknown average {average!r}: mean or median")


def relative_to_later(variance: Float[Tensor, "block pos"]) -> Float[Tensor, "block pos"]:
    """Variances by position, in units of each block's median over the positions after the first."""
    variance = variance.float()
    return variance / variance[:, 1:].quantile(0.5, dim=-1, keepdim=True)


def first_over_later(variance: Float[Tensor, "block pos"]) -> Float[Tensor, ""]:
    """Variance of the first position over the median of later ones, geometric mean over blocks."""
    return relative_to_later(variance)[:, 0].log().mean().exp()


def relative_deviation(
    x: Float[Tensor, "batch d"], mean: Float[Tensor, " d"], variance: Float[Tensor, ...]
) -> Float[Tensor, " batch"]:
    """Mean over dimensions of ``(x - mean)^2``, divided by ``variance`` (a scalar: the ordinary mean square deviation).

    About 1 for an ordinary token; averaged over prompts it is the per-dimension variance ratio.
    """
    return (x.float() - mean).pow(2).mean(-1) / variance
