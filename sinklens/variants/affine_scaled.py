"""Affine-scaled attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Variant


class AffineScaled(Variant):
    """``w = alpha(x) softmax(s) + beta(x)``, with ``alpha = clip(x W / 10 + 1/2, 0, 1)``, ``beta = (ma - alpha) / n``.

    Source: arXiv 2602.23057. ``alpha`` is one number a head and query, of the query's normed input; ``n`` is how many
    keys the query sees, and ``ma [head]`` a running mean of ``alpha``, ``ma <- rho ma + (1 - rho) mean(alpha)`` with
    rho 0.9, that starts at 0. So rows sum to ``ma``, and weights may be negative: shares are of the row's sum.

    What is ours: ``ma`` is moved behind each step of training, by the mean over all tokens of the step, and a pass uses
    what stood before. Else a token's output would depend, through the mean, on tokens that follow it, and the loss on
    how a batch is split. Evaluation uses ``ma`` as it is. It is a parameter without a gradient, and so it is saved, and
    counted, with the weights. W starts from a normal with sd 0.02 and is decayed.
    """

    name = "affine_scaled"
    claim = "the sink is weaker, as a query can scale its attention down"
    decays = True
    drawn: ClassVar[Mapping[str, float]] = {"W": 0.02}

    def __init__(self, sizes: AttentionSizes, *, rho: float = 0.9) -> None:
        super().__init__(sizes)
        self.rho = rho
        self.W = nn.Parameter(torch.zeros(sizes.d_model, sizes.n_heads))
        self.mean = nn.Parameter(torch.zeros(sizes.n_heads), requires_grad=False)
        self._seen: tuple[Tensor, int] | None = None  # sums of alpha, and of how many, in this step

    def options(self) -> dict[str, float]:
        """See :meth:`Variant.options`."""
        return {"rho": self.rho}

    def weights(
        self,
        scores: Float[Tensor, "*batch head key"],
        slot: Float[Tensor, "*batch head"] | None,
        x: Float[Tensor, "*batch d_model"],
    ) -> tuple[Float[Tensor, "*batch head key"], None]:
        """See :meth:`Variant.weights`."""
        alpha = ((x @ self.W).to(scores.dtype) / 10 + 0.5).clamp(0, 1)
        if self.training:
            total, n = self._seen or (0, 0)
            flat = alpha.detach().flatten(0, -2)
            self._seen = (total + flat.sum(0), n + len(flat))
        seen = ~scores.isneginf()
        beta = (self.mean - alpha)[..., None] / seen.sum(-1, keepdim=True).clamp_min(1)
        return (alpha[..., None] * scores.softmax(-1) + beta) * seen, None

    def stepped(self) -> None:
        """Move the running mean; over all processes, where several train one model."""
        if self._seen is None:
            return
        total, n = self._seen
        self._seen = None
        sums = torch.cat([total, total.new_tensor([n])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        with torch.no_grad():
            self.mean.mul_(self.rho).add_((sums[:-1] / sums[-1]).to(self.mean.dtype), alpha=1 - self.rho)
