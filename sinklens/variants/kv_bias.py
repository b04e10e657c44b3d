"""Key and value bias: a learned key with a learned value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.variants.base import AttentionSizes, Slot
from sinklens.variants.k_bias import KBias


class KVBias(KBias):
    """One more key ``k*_h`` with value ``v*_h``.

    Sources: Gu et al., arXiv 2410.10781, table 4; Sun et al., arXiv 2402.17762, equation 3 ("explicit attention bias").
    Both start from a normal with sd 0.02; else as :class:`KBias`. The pattern is that of the tokens, and what the
    learned value writes is in the output alone.
    """

    name = "kv_bias"
    claim = "the sink moves from the first token to the learned key, and massive activations go"
    drawn: ClassVar[Mapping[str, float]] = {"k": 0.02, "v": 0.02}

    def __init__(self, sizes: AttentionSizes, *, shared: bool = False) -> None:
        super().__init__(sizes, shared=shared)
        self.v = nn.Parameter(torch.zeros_like(self.k))

    def slot(self, q: Float[Tensor, "*batch head d_head"]) -> Slot:
        """See :meth:`KBias.slot`."""
        return Slot(super().slot(q).logit, self.by_head(self.v))
