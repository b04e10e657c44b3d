"""Attention received: how much of later queries' attention goes to a position.

``received[k] = mean over queries i > k of A[i, k]``. A token's attention to itself is left out, because it is no sink.
With ``include_self=True`` this is alpha_k of Gu et al. (ICLR 2025), the mean over ``i >= k``. The last position has no
later query: its value is NaN, not 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Pattern = Float[Tensor, "batch head query key"]


def attention_received(pattern: Pattern, *, include_self: bool = False) -> Float[Tensor, "batch head key"]:
    """Mean attention that each key position receives from later queries.

    Args:
        pattern: attention probabilities, causal: zero where ``key > query``.
        include_self: count the query at the key's own position too (alpha_k of Gu et al.).
    """
    length = pattern.shape[-1]
    offset = 0 if include_self else -1
    mask = torch.ones(length, length, dtype=torch.bool, device=pattern.device).tril(offset)
    total = pattern.float().masked_fill(~mask, 0).sum(-2)
    return total / mask.sum(-2)  # 0 / 0 is NaN where there is no later query


def sink_rate(received: Float[Tensor, "*leading key"], eps: float = 0.3) -> Float[Tensor, " key"]:
    """Share of all leading entries (heads, layers, prompts) in which a key receives more than ``eps``.

    Sink^eps_k of Gu et al. (ICLR 2025) when given alpha of every layer and head; they use ``eps = 0.3`` at T = 64. NaN
    where ``received`` is: a position without later queries has no rate, not a rate of 0.
    """
    above = (received > eps).float().masked_fill(received.isnan(), torch.nan)
    return above.reshape(-1, received.shape[-1]).mean(0)
