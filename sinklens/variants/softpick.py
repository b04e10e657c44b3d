"""Softpick."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinklens.variants.base import AttentionSizes, Variant


class Softpick(Variant):
    """``w_j = relu(e^{s_j} - 1) / (sum_i |e^{s_i} - 1| + eps)``: keys with a score of zero or less get nothing.

    Source: Zuhri et al., arXiv 2504.20966 (naive_softpick_attn.py of their code). Both sides are divided by e^m, with
    m the largest score and zero at least, before eps (1e-8) is added. Keys that are not seen are in no sum. No
    parameters. Rows sum to at most one, and may be all zero: shares are of the row's sum. Pitfalls: where all scores
    of a row are below zero nothing is passed back through it; at 1.8B parameters its authors lose quality.
    """

    name = "softpick"
    claim = "no sink forms and activations stay small, as rows need not sum to one"

    def __init__(self, sizes: AttentionSizes, *, eps: float = 1e-8) -> None:
        super().__init__(sizes)
        self.eps = eps

    def options(self) -> dict[str, float]:
        """See :meth:`Variant.options`."""
        return {"eps": self.eps}

    def weights(
        self,
        scores: Float[Tensor, "*batch head key"],
        slot: Float[Tensor, "*batch head"] | None,
        x: Float[Tensor, "*batch d_model"],
    ) -> tuple[Float[Tensor, "*batch head key"], None]:
        """See :meth:`Variant.weights`."""
        m = scores.detach().amax(-1, keepdim=True).clamp_min(0)
        over = ((scores - m).exp() - (-m).exp()).masked_fill(scores.isneginf(), 0)
        return over.relu() / (over.abs().sum(-1, keepdim=True) + self.eps), None
