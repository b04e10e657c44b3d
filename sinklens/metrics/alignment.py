"""Directions: cosines, and the principal direction of a set of vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cosine(x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """Cosine similarity along the last axis, in float32; 0 for a zero vector."""
    return torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)


def principal_direction(vectors: Float[Tensor, "... n d"]) -> Float[Tensor, "... d"]:
    """Top right singular vector (uncentred), with the sign that makes its product with the mean vector positive.

    Computed from the Gram matrix in float64: n may be large, d is a head's width. Arbitrary where the two largest
    singular values are equal, as for zero vectors.
    """
    wide = vectors.double()
    direction = torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -1]
    sign = torch.where((direction * wide.mean(-2)).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * direction).float()
