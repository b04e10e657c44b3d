"""Differential attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Variant, rms_normed


class Differential(Variant):
    """``A = softmax(s_1) - lam softmax(s_2)`` for the heads of a pair, then ``(1 - lam_0) RMSNorm(A [v_1, v_2])``.

    Source: Ye et al., arXiv 2410.05258 (multihead_diffattn.py in microsoft/unilm). Heads 2i and 2i + 1 are a pair: each
    has its queries and keys, both get the same pattern A, and their two values side by side are the pair's one value
    of twice the width. ``lam = exp(lq1 lk1) - exp(lq2 lk2) + lam_0``, with vectors ``[d_head]`` that the heads of a
    block share, from a normal with sd 0.1, and ``lam_0 = 0.8 - 0.6 exp(-0.3 layer)``, layers from 0. The norm's gain
    ``[2 d_head]`` is shared by the pairs and starts at 1; eps is 1e-5. Rows sum to ``1 - lam``, and weights may be
    negative: shares are of the row's sum. As many heads as softmax attention has parameters for, and so half as many
    pairs. Grouped heads are refused: there the two values of a pair would be one.
    """

    name = "differential"
    claim = "massive activations are half as large; its authors do not say what becomes of the sink"
    drawn: ClassVar[Mapping[str, float]] = {name: 0.1 for name in ("lq1", "lk1", "lq2", "lk2")}

    def __init__(self, sizes: AttentionSizes, *, eps: float = 1e-5) -> None:
        super().__init__(sizes)
        if sizes.n_heads % 2 or sizes.n_kv_heads != sizes.n_heads:
            raise ValueError(
                "its heads come in pairs, each with a key head of its own: give an even number, not grouped"
            )
        self.eps = eps
        self.lq1, self.lk1, self.lq2, self.lk2 = (nn.Parameter(torch.zeros(sizes.d_head)) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(2 * sizes.d_head))
        self.lam_0 = 0.8 - 0.6 * math.exp(-0.3 * sizes.layer)

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
        first, second = scores.softmax(-1).unflatten(-2, (-1, 2)).unbind(-2)
        lam = (self.lq1 * self.lk1).sum().exp() - (self.lq2 * self.lk2).sum().exp() + self.lam_0
        return (first - lam * second).repeat_interleave(2, -2), None

    def output(
        self, z: Float[Tensor, "*batch head d_head"], x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch head d_head"]:
        """See :meth:`Variant.output`."""
        pairs = z.unflatten(-2, (-1, 2)).flatten(-2)
        return ((1 - self.lam_0) * rms_normed(pairs, self.gain, self.eps)).view(z.shape)
