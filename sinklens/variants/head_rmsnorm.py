"""Head-wise RMSNorm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Variant, rms_normed


class HeadRMSNorm(Variant):
    """``z[t, h] / RMS(z[t, h]) * gain``, in every block, with one gain ``[d_head]`` that the heads share.

    Source: Li, Jiang, Sun, Hu, arXiv 2605.06611, section 5.1. Where the paper says nothing, this is what the norm at
    the same place in the Differential Transformer does: eps 1e-5 under the root, the gain starts at 1 and is not
    decayed. Statistics are float32.
    """

    name = "head_rmsnorm"
    claim = "no sink forms, as all positions and heads write with the same variance; the loss is lower"

    def __init__(self, sizes: AttentionSizes, *, eps: float = 1e-5) -> None:
        super().__init__(sizes)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(sizes.d_head))

    def options(self) -> dict[str, float]:
        """See :meth:`Variant.options`."""
        return {"eps": self.eps}

    def output(
        self, z: Float[Tensor, "*batch head d_head"], x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch head d_head"]:
        """See :meth:`Variant.output`."""
        return rms_normed(z, self.gain, self.eps)
