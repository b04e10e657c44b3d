"""Norms of queries and keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Variant, rms_normed


class QKNorm(Variant):
    """``q / RMS(q) * gain_q`` and ``k / RMS(k) * gain_k`` for every head, in front of the rotation.

    Sources: Henry et al., arXiv 2010.04245; with RMSNorm and gains ``[d_head]`` that the heads share, as in Qwen3.
    Scores are at most ``sqrt(d_head) max(gain_q) max(gain_k)``. Gains start at 1; eps is 1e-5. Pitfall: what Spike,
    Sparse, Sink (arXiv 2603.05498) calls QK-norm has its norms behind the sublayers, too (OLMo-2); see ``post_norm``.
    """

    name = "qk_norm"
    claim = "scores are bounded, and activations stay small; the sink stays"

    def __init__(self, sizes: AttentionSizes, *, eps: float = 1e-5) -> None:
        super().__init__(sizes)
        self.eps = eps
        self.gain_q, self.gain_k = (nn.Parameter(torch.ones(sizes.d_head)) for _ in range(2))

    def options(self) -> dict[str, float]:
        """See :meth:`Variant.options`."""
        return {"eps": self.eps}

    def queries(self, q: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch head d_head"]:
        """See :meth:`Variant.queries`."""
        return rms_normed(q, self.gain_q, self.eps)

    def keys(self, k: Float[Tensor, "*batch kv_head d_head"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """See :meth:`Variant.keys`."""
        return rms_normed(k, self.gain_k, self.eps)
