"""Values scaled by their own norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Variant


class ValueScale(Variant):
    """``phi(|v|^2) v`` with ``phi(s) = (1 + s / d_head)^theta``, one theta for each value head of a block.

    Source: Chen, Lin, Yao, arXiv 2603.17771: a value's own norm tells how far it is scaled, so that the norm of the
    residual stream need not grow to damp the gradients that pile up at the sink. Their phi is not published: this one
    is our choice, because it is smooth, positive, damps (theta < 0) or amplifies, and is the identity at the start
    (theta = 0). Theta is not decayed. ``hook_v`` has values before they are scaled.
    """

    name = "value_scale"
    claim = "massive activations go while the sink stays"

    def __init__(self, sizes: AttentionSizes) -> None:
        super().__init__(sizes)
        self.theta = nn.Parameter(torch.zeros(sizes.n_kv_heads))

    def values(self, v: Float[Tensor, "*batch kv_head d_head"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """See :meth:`Variant.values`."""
        wide = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
        phi = (self.theta * wide.square().mean(-1).log1p()).exp()
        return (wide * phi[..., None]).to(v.dtype)
