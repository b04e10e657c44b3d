"""Softmax-off-by-one."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinklens.variants.base import Slot, Variant


class SoftmaxOffByOne(Variant):
    """``w_j = e^{s_j} / (1 + sum_i e^{s_i})``: softmax with one more key, of score 0 and value 0.

    Source: Miller, "Attention is off by one" (2023); Kaul et al., arXiv 2410.17174, who find that the sink goes and the
    outliers of the residual stream stay. No parameters. Rows sum to less than one: shares are of the row's sum.
    """

    name = "softmax_off_by_one"
    claim = "the sink is much weaker, as a query can attend to nothing; outliers stay"

    def slot(self, q: Float[Tensor, "*batch head d_head"]) -> Slot:
        """See :meth:`Variant.slot`."""
        return Slot(q.new_zeros(q.shape[:-1]))
