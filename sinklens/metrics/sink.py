"""Attention received: how much of later queries' attention goes to a position.

``received[k] = mean over queries i > k of A[i, k]``. A token's attention to itself is left out, because it is no sink.
``alpha`` counts it, as Gu et al. (ICLR 2025) do: the mean over ``i >= k``. The two differ little for early keys and
much for late ones: the last position has no later query, so what it receives is NaN (not 0), and its alpha is its
attention to itself alone.

Attention that is no softmax (sigmoid, softpick, a difference of two) need not sum to one over keys: give these
functions ``normalised_rows`` of it, as Gu et al. do, and say what is missing. A softmax of which a part goes to no key
(a sink logit, a key bias) is left as it is: there that part is a share like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.metrics.sums import running_sum

EPS = 0.3
"""Attention beyond which a head is a sink head, as Gu et al. (ICLR 2025) have it."""

Pattern = Float[Tensor, "batch head query key"]


def attention_received(pattern: Pattern, *, include_self: bool = False) -> Float[Tensor, "batch head key"]:
    """Mean attention that each key position receives from later queries.

    Args:
        pattern: attention probabilities, causal: zero where ``key > query``.
        include_self: count the query at the key's own position too (alpha_k of Gu et al.).
    """
    mask = _counted(pattern, include_self)
    total = pattern.float().masked_fill(~mask, 0).sum(-2)
    return total / mask.sum(-2)  # 0 / 0 is NaN where there is no later query


def alpha(pattern: Pattern) -> Float[Tensor, "batch head key"]:
    """``alpha_k`` of Gu et al. (ICLR 2025): the mean over queries ``i >= k`` of ``A[i, k]``, the key's own included."""
    return attention_received(pattern, include_self=True)


def normalised_rows(
    pattern: Pattern, eps: float = 1e-8
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query"]]:
    """Attention whose rows need not sum to one as shares of its rows, and the sums that the rows had.

    Every row is divided by the sum of its magnitudes plus ``eps``, as Gu et al. (ICLR 2025) do before they take alpha
    of attention that is not normalised, or has negative weights. A row of zeros stays one. What a sum lacks of one is
    the *missing mass*: what a slot that is no token was given, or what was given to nothing.
    """
    wide = pattern.float()
    return wide / (wide.abs().sum(-1, keepdim=True) + eps), wide.sum(-1)


def received_at_lengths(
    pattern: Pattern, lengths: Sequence[int], *, include_self: bool = False
) -> Float[Tensor, "batch head length key"]:
    """Attention received when the sequence is cut to its first T tokens, for every T of ``lengths``.

    Only queries before T count. Exact in a causal model, whose first T rows do not know what follows; not where the
    positions depend on the whole length (dynamic scaling of rotary embeddings). NaN where no later query is left, keys
    beyond the cut among them.

    Args:
        pattern: attention probabilities, causal: zero where ``key > query``.
        lengths: numbers of tokens, 1 to the pattern's own.
        include_self: count the query at the key's own position too (alpha_k of Gu et al.).
    """
    if not all(1 <= length <= pattern.shape[-2] for length in lengths):
        raise ValueError(f"lengths must lie between 1 and the pattern's {pattern.shape[-2]} queries: {list(lengths)}")
    mask = _counted(pattern, include_self)
    last = torch.tensor(lengths, dtype=torch.long, device=pattern.device) - 1
    # Running sums over queries: one pass, however many lengths there are.
    total = running_sum(pattern.float().masked_fill(~mask, 0), -2)[..., last, :]
    return total / mask.cumsum(-2)[last]


def sink_rate(received: Float[Tensor, "*leading key"], eps: float = EPS) -> Float[Tensor, " key"]:
    """Share of all leading entries (heads, layers, prompts) in which a key receives more than ``eps``.

    Sink^eps_k of Gu et al. (ICLR 2025) when given ``alpha`` of every prompt, layer and head: like them it compares each
    entry with ``eps``, strictly, and averages afterwards; do not average over prompts before. They use ``eps = 0.3`` at
    T = 64 and print percent. Given ``attention_received`` it is the same rate without a token's attention to itself.
    NaN where ``received`` is: a position without later queries has no rate, not a rate of 0.
    """
    above = (received > eps).float().masked_fill(received.isnan(), torch.nan)
    return above.reshape(-1, received.shape[-1]).mean(0)


def _counted(pattern: Pattern, include_self: bool) -> Bool[Tensor, "query key"]:
    length = pattern.shape[-1]
    offset = 0 if include_self else -1
    return torch.ones(length, length, dtype=torch.bool, device=pattern.device).tril(offset)
