"""Learned sink logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Slot, Variant


class SinkLogit(Variant):
    """``w_j = e^{s_j} / (e^{b_h} + sum_i e^{s_i})``: one more key, with a learned score for each head and value 0.

    Source: gpt-oss (transformers, modular_gpt_oss.py). The score is not divided by sqrt(d_head), and starts from a
    normal with sd 0.02. Rows sum to less than one: shares are of the row's sum. A key bias whose value is zero
    (:mod:`sinklens.variants.k_bias`) has a score that depends on the query instead.
    """

    name = "sink_logit"
    claim = "no sink forms at the first token, as the logit takes its place"
    drawn: ClassVar[Mapping[str, float]] = {"logit": 0.02}

    def __init__(self, sizes: AttentionSizes) -> None:
        super().__init__(sizes)
        self.logit = nn.Parameter(torch.zeros(sizes.n_heads))

    def slot(self, q: Float[Tensor, "*batch head d_head"]) -> Slot:
        """See :meth:`Variant.slot`."""
        return Slot(self.logit.expand(q.shape[:-1]))
