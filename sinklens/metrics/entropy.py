"""How spread attention is: entropy in nats, and how many values a query effectively averages."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Pattern = Float[Tensor, "batch head query key"]


def attention_entropy(pattern: Pattern) -> Float[Tensor, "batch head query"]:
    """Shannon entropy of every attention row, nats: 0 when one key has it all, ``log n`` when n share it equally."""
    return torch.special.entr(pattern.float()).sum(-1)


def effective_values(pattern: Pattern) -> Float[Tensor, "batch head query"]:
    """Effective number of values that a query averages, ``1 / sum_j A_ij^2``: 1 without mixing, n for a uniform row."""
    return 1 / pattern.float().pow(2).sum(-1)
