"""Effective rank: how many directions a set of vectors spreads over.

``exp(H(p))`` with ``p_i = s_i / sum_j s_j`` of the singular values s (Roy & Vetterli 2007), between 1 and
``min(n, d)``. Singular values, not their squares, whose entropy gives another, smaller number. Nothing is centred: a
mean that all vectors share, or one huge sink token among them, brings it near 1 by itself. Take that token out to see
the rank of the others.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(x: Float[Tensor, "... n d"]) -> Float[Tensor, "..."]:
    """``exp`` of the entropy of the normalised singular values; NaN for a zero matrix, or one that is not finite."""
    wide = x.double()  # beside a massive one, the many small singular values would drown in float32's rounding
    finite = wide.isfinite().flatten(-2).all(-1)
    # LAPACK stops at a NaN, which would take the rest of the batch with it.
    values = torch.linalg.svdvals(wide.masked_fill(~finite[..., None, None], 0))
    share = values / values.sum(-1, keepdim=True)  # 0 / 0 is NaN for a zero matrix
    return torch.special.entr(share).sum(-1).exp().float()
