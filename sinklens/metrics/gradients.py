"""Gradients that pile up on a token, and what a norm makes of them (Chen, Lin, Yao, arXiv 2603.17771).

``R_GS(s) = |g_s| / mean_{t != s} |g_t|`` for the gradient ``g`` of the loss at the output of the norm in front of
attention. On its way back to the residual stream ``h`` it is multiplied by the norm's Jacobian, about ``1 / |h|``. With
``g1`` the gradient that comes by the residual stream, ``g2`` that at the norm's output and ``g3 = J(h)^T g2``::

    Bloat = |g2| / |g1|    Compress = |g3| / |g2|    Change = |g1 + g3| / |g1|
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sinklens.metrics.norms import vector_norm


class GradientFlow(NamedTuple):
    """What a norm does to the gradients that come back through it, token by token."""

    bloat: Float[Tensor, "*tokens"]
    """``|g2| / |g1|``."""
    compress: Float[Tensor, "*tokens"]
    """``|g3| / |g2|``."""
    change: Float[Tensor, "*tokens"]
    """``|g1 + g3| / |g1|``."""


def gradient_ratio(gradient: Float[Tensor, "batch pos d"], token: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """``R_GS``: norm of the gradient at one token of every prompt over the mean of that at the others."""
    norm = vector_norm(gradient)
    at = norm.take_along_dim(token.to(norm.device)[:, None], -1)[:, 0]
    return at / ((norm.sum(-1) - at) / (norm.shape[-1] - 1))


def gradient_flow(
    before: Float[Tensor, "*tokens d"], at_norm: Float[Tensor, "*tokens d"], through: Float[Tensor, "*tokens d"]
) -> GradientFlow:
    """Bloat, Compress and Change of ``g1``, ``g2`` and ``g3`` (see the module's docstring); NaN where one is zero."""
    g1, g2, g3 = (vector_norm(g) for g in (before, at_norm, through))
    return GradientFlow(g2 / g1, g3 / g2, vector_norm(before.float() + through.float()) / g1)


def back_through_norm(
    h: Float[Tensor, "*tokens d"],
    gradient: Float[Tensor, "*tokens d"],
    eps: float = 1e-5,
    *,
    centred: bool = False,
) -> Float[Tensor, "*tokens d"]:
    """``J(h)^T g`` of the norm ``h / sqrt(mean h^2 + eps)``, without its weight: the gradient at its input.

    Args:
        h: what enters the norm.
        gradient: the gradient at what it gives, before its weight is applied.
        eps: the norm's constant.
        centred: LayerNorm, which takes the mean over dimensions away first.
    """
    wide, g = h.double(), gradient.double()
    if centred:
        wide, g = wide - wide.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True)
    square = wide.pow(2).mean(-1, keepdim=True) + eps
    along = (wide * g).mean(-1, keepdim=True) / square
    return ((g - wide * along) / square.sqrt()).float()
