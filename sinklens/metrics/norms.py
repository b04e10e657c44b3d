"""Euclidean norms of keys, values and residuals."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def vector_norm(x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """Euclidean norm along the last axis, in float32: float16 holds neither the square of a massive activation nor
    always its norm.
    """
    return torch.linalg.vector_norm(x.float(), dim=-1)
