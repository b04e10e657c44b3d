"""Sigmoid attention."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from sinklens.variants.base import AttentionSizes, Variant


class Sigmoid(Variant):
    """``sigmoid(q k^T / sqrt(d_head) + offset) v``, each key on its own; ``normalised`` divides by the row's sum.

    Sources: Gu et al., arXiv 2410.10781, tables 6 and 15 (no offset; normalised, the sink comes back); Ramapuram et
    al., arXiv 2409.04431 (``offset``: minus the logarithm of the longest sequence, so that a row starts near a sum of
    one). The offset is a constant of the model: with the length of the prompt in its place, later tokens would change
    earlier ones. Without ``normalised`` rows do not sum to one, and shares are of the row's sum.
    """

    name = "sigmoid"
    claim = "no sink forms, as a query need not attend to anything"

    def __init__(self, sizes: AttentionSizes, *, normalised: bool = False, offset: bool = False) -> None:
        super().__init__(sizes)
        self.normalised, self.offset = normalised, offset

    def options(self) -> dict[str, bool]:
        """See :meth:`Variant.options`."""
        return {"normalised": self.normalised, "offset": self.offset}

    def weights(
        self,
        scores: Float[Tensor, "*batch head key"],
        slot: Float[Tensor, "*batch head"] | None,
        x: Float[Tensor, "*batch d_model"],
    ) -> tuple[Float[Tensor, "*batch head key"], None]:
        """See :meth:`Variant.weights`."""
        pattern = (scores - math.log(self.sizes.n_ctx) if self.offset else scores).sigmoid()
        return (pattern / (pattern.sum(-1, keepdim=True) + 1e-8) if self.normalised else pattern), None
