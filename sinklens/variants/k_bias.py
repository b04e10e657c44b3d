"""Key bias: a learned key with value zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Slot, Variant


class KBias(Variant):
    """One more key ``k*_h`` with value 0: its score is ``q k*_h / sqrt(d_head)``.

    Source: Gu et al., arXiv 2410.10781, tables 4, 12 and 13 (lit_gpt/model.py of their code). It is added after the
    rotation, so it is at no position; it starts from a normal with sd 0.02. One for each key head, or with ``shared``
    one for all, which keeps less of the sink off. Rows sum to less than one: shares are of the row's sum.
    """

    name = "k_bias"
    claim = "the sink moves from the first token to the learned key"
    drawn: ClassVar[Mapping[str, float]] = {"k": 0.02}

    def __init__(self, sizes: AttentionSizes, *, shared: bool = False) -> None:
        super().__init__(sizes)
        self.shared = shared
        self.k = nn.Parameter(torch.zeros(1 if shared else sizes.n_kv_heads, sizes.d_head))

    def options(self) -> dict[str, bool]:
        """See :meth:`Variant.options`."""
        return {"shared": self.shared}

    def slot(self, q: Float[Tensor, "*batch head d_head"]) -> Slot:
        """See :meth:`Variant.slot`."""
        return Slot((q * self.by_head(self.k)).sum(-1) / self.sizes.d_head**0.5)

    def by_head(self, learned: Float[Tensor, "kv_head d_head"]) -> Float[Tensor, "head d_head"]:
        """What is learned, once for every query head."""
        return learned.repeat_interleave(self.sizes.n_heads // len(learned), 0)
