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
    wide = wide.masked_fill(~finite[..., None, None], 0)
    # By the smaller Gram matrix: far quicker than a decomposition of the whole, above all on a GPU.
    gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
    squares = torch.linalg.eigvalsh(gram)
    noise = squares[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    values = squares.masked_fill(squares <= noise, 0).sqrt()
    share = values / values.sum(-1, keepdim=True)  # 0 / 0 is NaN for a zero matrix
    share = share.masked_fill(~finite[..., None], torch.nan)
    return torch.special.entr(share).sum(-1).exp().float()


def stable_rank(x: Float[Tensor, "... n d"]) -> Float[Tensor, "..."]:
    """``||X||_F^2 / ||X||_2^2``: 1 for what all points one way, at most ``min(n, d)``; NaN for a zero matrix.

    Of what attention writes it tells a broadcast (one vector for all queries) from a mixture (Fesser et al. 2026).
    """
    wide = x.double()
    return (wide.pow(2).sum((-2, -1)) / torch.linalg.matrix_norm(wide, ord=2).pow(2)).float()
